"""What a user names as a source of weights, opened: the one place that knows all kinds of them."""

from collections.abc import Callable
from pathlib import Path

from coeld.errors import ModelError
from coeld.model.checkpoint import Checkpoint
from coeld.model.gguf_file import GgufFile
from coeld.model.hf_folder import HfFolder
from coeld.model.hub import PREFIX, open_hub


def _unwatched(done: int, total: int, what: str) -> None:
    pass


def open_checkpoint(
    source: str | Path, progress: Callable[[int, int, str], None] = _unwatched
) -> Checkpoint:
    """A GGUF file (or one of its parts), a Hugging Face folder, or hf:ORG/NAME[@REVISION].

    Raises ModelError when there is nothing to open, FetchFailed, BadModelFile, UnsupportedModel.
    """
    if isinstance(source, str) and source.startswith(PREFIX):
        return open_hub(source, progress)
    path = Path(source)
    if path.exists() and not path.is_dir() and not path.is_file():
        raise ModelError(f"{path} is neither a file nor a folder.")
    try:
        return HfFolder(path) if path.is_dir() else GgufFile(path)
    except OSError as exc:
        raise ModelError(f"cannot open {path}: {exc.strerror}.") from exc
