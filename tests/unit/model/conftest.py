"""A tiny model, as GGUF file and imported, shared by the tests of this folder."""

from pathlib import Path

import pytest

from coeld.model.importer import Origin, import_gguf
from coeld.model.manifest import Manifest
from coeld.model.store import Store
from tests.reference.tiny_gguf import write_tiny_llama


def quiet(done: int, total: int, what: str) -> None:
    """Progress that nobody watches."""


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_gguf: Path) -> tuple[Store, Manifest]:
    """Read only: tests that change a store make their own."""
    store = Store(tmp_path_factory.mktemp("tiny") / "store")
    return store, import_gguf(store, tiny_gguf, "tiny", Origin("a test", "Apache-2.0"), quiet)
