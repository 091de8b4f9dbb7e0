"""`hf:ORG/NAME[@REVISION]`: a model on the Hugging Face hub, fetched into the hub's own cache.

The package huggingface_hub does the work, as in all other programs on the device that use the hub:
HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE mean what they mean there, a model that another
program has fetched is used as it is, and a broken connection is taken up where it broke. Files that
are complete stay when the command is interrupted.

The small files come first: a family that coeld cannot run costs no gigabytes.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from coeld.errors import FetchFailed, ModelError, UnsupportedModel
from coeld.model.families import check_family
from coeld.model.hf_folder import CARD, CONFIG, INDEX, TEXTS, WHOLE, HfFolder, read_config
from coeld.model.store import disk_errors

PREFIX: Final = "hf:"
NAME: Final = re.compile(
    r"(?!.*\.\.)(\w[\w.-]{0,95}/\w[\w.-]{0,95})(?:@(\w[\w./-]{0,199}))?", re.ASCII
)
"""Without "..": names and revisions become paths in the cache."""
SMALL: Final = [CONFIG, INDEX, CARD, *TEXTS]
WEIGHTS: Final = [WHOLE, "model-*-of-*.safetensors"]
WORKERS: Final = 2
"""Files at a time: an interruption costs at most the unfinished ones."""
WORDS_SHOWN: Final = 200

Progress = Callable[[int, int, str], None]


def open_hub(source: str, progress: Progress) -> HfFolder:
    """The checkpoint, fetched if need be. `source` begins with "hf:".

    Raises FetchFailed, DiskFull; UnsupportedModel, BadModelFile.
    """
    name, revision = _parse(source)
    folder = _fetch(name, revision, SMALL, progress)
    title = f"{PREFIX}{name}@{folder.name}"
    check_family("huggingface", read_config(folder, title), title)
    # By commit, so that both belong together whatever is pushed meanwhile.
    folder = _fetch(name, folder.name, [*SMALL, *WEIGHTS], progress)
    if not (folder / WHOLE).exists() and not (folder / INDEX).exists():
        raise UnsupportedModel(
            f"{title} has neither {WHOLE} nor {INDEX}. If its weights are in a pickle "
            "(pytorch_model.bin): that can run any program when it is opened, and coeld never "
            "does; use a checkpoint in safetensors. If they are in GGUF: download the file and "
            "name that."
        )
    return HfFolder(folder, title)


def fetch_config(source: str) -> tuple[dict[str, Any], str]:
    """config.json alone, and what to call it. Raises FetchFailed, DiskFull; BadModelFile."""
    name, revision = _parse(source)
    folder = _fetch(name, revision, [CONFIG], lambda *_: None)
    title = f"{PREFIX}{name}@{folder.name}"
    return read_config(folder, title), title


def _parse(source: str) -> tuple[str, str]:
    """Name and revision. Raises ModelError."""
    found = NAME.fullmatch(source.removeprefix(PREFIX))
    if found is None:
        raise ModelError(
            f"{source!r} does not name a model on the hub. Write hf:ORG/NAME or "
            "hf:ORG/NAME@REVISION, for example hf:Qwen/Qwen3-30B-A3B."
        )
    return found[1], found[2] or "main"


def _fetch(name: str, revision: str, patterns: list[str], progress: Progress) -> Path:
    """The snapshot's folder, called after the commit."""
    from huggingface_hub import constants, snapshot_download  # half a second, and only here

    cache = Path(constants.HF_HUB_CACHE)
    with _hub_errors(name, revision), disk_errors(cache):
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=patterns,
                tqdm_class=_bars(progress),
                max_workers=WORKERS,
            )
        )


@contextmanager
def _hub_errors(name: str, revision: str) -> Iterator[None]:
    """Turns what the package raises into what a user can do about it."""
    from huggingface_hub import errors

    what = f"{name} at {revision}"
    try:
        yield
    except errors.GatedRepoError as exc:
        raise FetchFailed(
            f"{what} is gated: its owner asks you to accept terms. Accept them on the model's page "
            "with your account, then set HF_TOKEN to a token of that account."
        ) from exc
    except errors.RevisionNotFoundError as exc:
        raise FetchFailed(
            f"the hub has {name}, but no revision {revision!r}. Use a branch, tag or commit that "
            "its page shows under Files."
        ) from exc
    except errors.RepositoryNotFoundError as exc:
        raise FetchFailed(
            f"the hub has no model {name}, or does not show it to you. Check the spelling; for a "
            "private model set HF_TOKEN."
        ) from exc
    except errors.LocalEntryNotFoundError as exc:
        raise FetchFailed(_offline(what, exc)) from exc
    except ModelError:
        raise
    except OSError as exc:
        if exc.errno is not None and not hasattr(exc, "response"):
            raise  # this machine's disk; disk_errors knows
        raise FetchFailed(_offline(what, exc)) from exc
    except Exception as exc:  # the HTTP library changes with the version of the package
        raise FetchFailed(_offline(what, exc)) from exc


def _offline(what: str, exc: BaseException) -> str:
    said = " ".join(str(exc).split())[:WORDS_SHOWN]
    return (
        f"the hub could not be asked for {what}, and it is not in the cache as a whole ({said}). "
        "Is this device online? Repeat the command and it continues. Without a connection: copy "
        "the model's folder from a device that has it and name the folder, or copy that device's "
        "HF_HOME and set HF_HUB_OFFLINE=1."
    )


def _bars(progress: Progress) -> type[Any]:
    """A class that the package takes for a progress bar and that tells `progress`.

    The package makes several, of bytes and of files, and their totals grow: what is told rises.
    """
    from tqdm.auto import tqdm

    told = 0

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": True})
            self._bytes = kwargs.get("unit") == "B"
            self.n, self.total = kwargs.get("initial") or 0, kwargs.get("total")

        def update(self, n: float | None = 1) -> None:
            nonlocal told
            self.n += n or 0
            if self._bytes and self.total and told < self.n <= self.total:
                told = int(self.n)
                progress(told, int(self.total), "downloading")

    return Bar
