"""What a user names as a source of weights, opened: the one place that knows all kinds of them."""

from pathlib import Path

from coeld.errors import ModelError
from coeld.model.checkpoint import Checkpoint
from coeld.model.gguf_file import GgufFile


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Raises ModelError when there is nothing to open, BadModelFile, UnsupportedModel."""
    path = Path(source)
    try:
        return GgufFile(path)
    except OSError as exc:
        raise ModelError(f"cannot open {path}: {exc.strerror}.") from exc
