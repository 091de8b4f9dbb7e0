"""Imports a file in one call, with a progress that nobody watches."""

from pathlib import Path
from typing import Any

from coeld.model.importer import Progress, import_checkpoint
from coeld.model.manifest import Manifest
from coeld.model.open_checkpoint import open_checkpoint
from coeld.model.store import Store


def quiet(done: int, total: int, what: str) -> None:
    pass


def import_file(
    store: Store, path: Path, name: str, progress: Progress = quiet, **options: Any
) -> Manifest:
    with open_checkpoint(path) as checkpoint:
        return import_checkpoint(store, checkpoint, name, progress, **options)
