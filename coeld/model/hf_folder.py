"""Opens a Hugging Face folder: config.json, safetensors in one file or in shards, tokenizer.

Only what is needed is opened, by plain names: a file must lie in the folder itself, or be one of
the links into `blobs/` that the hub's cache consists of; an index or a link that points elsewhere
is refused. Pickled weights (pytorch_model.bin, *.pt) are never opened, whatever is in them.
"""

import hashlib
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NoReturn, Self

import numpy as np
from numpy.typing import NDArray

from coeld.errors import BadModelFile, ModelError, UnsupportedModel
from coeld.model.checkpoint import Kind, Vocabulary
from coeld.model.safetensors_file import SafetensorsFile, parse_object

CONFIG: Final = "config.json"
WHOLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
TEXTS: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
)
"""Beside the configuration, what an import depends on; each may be absent."""
CARD: Final = "README.md"
"""Says the licence."""

SHARDS_MAX: Final = 1000
CONFIG_BYTES_MAX: Final = 64 << 20
TEXT_BYTES_MAX: Final = 256 << 20
CARD_BYTES: Final = 64 << 10
"""Of the card, as much as is looked at."""
PICKLED: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class Folder:
    """Files of one folder, by plain names. Everything in them is untrusted."""

    def __init__(self, folder: Path, source: str) -> None:
        """`source`: what to call it."""
        self.folder, self.source = folder, source

    def has(self, name: str) -> bool:
        return (self.folder / name).exists()

    def path(self, name: str) -> Path:
        """Where a file of the folder really is. Raises BadModelFile when that is elsewhere."""
        path = self.folder / name
        real, home = path.resolve(), self.folder.resolve()
        blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
        plain = name == Path(name).name and name not in ("", ".", "..") and "\0" not in name
        if not plain or real.parent not in (home, blobs):
            raise BadModelFile(
                f"{self.source}: {name[:200]!r} points out of the folder. Nothing outside of it "
                "is read; get the folder again, or copy the file into it."
            )
        if path.exists() and not path.is_file():
            self._bad(f"{name} is not a file")  # a pipe could be waited for for ever
        return path

    def text(self, name: str, limit: int = TEXT_BYTES_MAX) -> bytes:
        """A whole file. Raises BadModelFile when it is absurdly large, ModelError."""
        try:
            with self.path(name).open("rb") as file:
                data = file.read(limit + 1)
        except OSError as exc:
            raise ModelError(f"cannot read {self.folder / name}: {exc.strerror}.") from exc
        if len(data) > limit:
            self._bad(f"{name} has more than {limit} bytes")
        return data

    def json(self, name: str) -> dict[str, Any]:
        """A JSON object. Raises BadModelFile, ModelError."""
        data = self.text(name, CONFIG_BYTES_MAX)
        return parse_object(data, lambda what: self._bad(f"{name} {what}"))

    def _bad(self, what: str) -> NoReturn:
        raise BadModelFile(
            f"{self.source} is not a usable model: {what}. It is damaged, incomplete or something "
            "else; get it again."
        )


def read_config(folder: Path, source: str) -> dict[str, Any]:
    """config.json. Raises BadModelFile, ModelError."""
    found = Folder(folder, source)
    if not found.has(CONFIG):
        raise ModelError(
            f"{source} has no {CONFIG}: it is not a model in Hugging Face's form. Of GGUF files, "
            "name the file itself; one that is on the hub has to be downloaded first."
        )
    return found.json(CONFIG)


class HfFolder(Folder):
    """An open folder, a Checkpoint."""

    kind: Kind = "huggingface"

    def __init__(self, folder: Path, source: str | None = None) -> None:
        """`source`: what to call it. Raises BadModelFile, UnsupportedModel, ModelError."""
        super().__init__(folder, source or folder.resolve().name)
        self._files: dict[str, SafetensorsFile] = {}
        self._place: dict[str, SafetensorsFile] = {}
        try:
            self.config: Mapping[str, Any] = read_config(folder, self.source)
            self._open_tensors()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self._files.values())

    @property
    def licence(self) -> str:
        """The line `license:` in the head of the model card."""
        if not self.has(CARD):
            return "unknown"
        with self.path(CARD).open("rb") as file:
            head = file.read(CARD_BYTES).decode(errors="replace").split("\n---", 1)[0]
        found = re.search(r"^license:\s*['\"]?([\w.+-]{1,64})", head, re.MULTILINE)
        return found[1] if head.startswith("---") and found else "unknown"

    def names(self) -> Collection[str]:
        return self._place.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._place[name].tensors[name].shape

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        if name not in self._place:
            raise BadModelFile(f"{self.source} has no tensor {name}: it is not a complete model.")
        count = self.shape(name)[0]
        return self._place[name].read(name, start, count if stop is None else min(stop, count))

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name in sorted([*self._files, CONFIG, *filter(self.has, TEXTS)]):
            with self.path(name).open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{name}\0{content}\n".encode())
        return digest.hexdigest()

    def vocabulary(self, rows: int) -> Vocabulary | None:
        from coeld.model.hf_vocabulary import read_vocabulary  # which reads what is open here

        return read_vocabulary(self, rows)

    # Tensors

    def _open_tensors(self) -> None:
        if self.has(WHOLE):
            self._open(WHOLE)
            return
        if not self.has(INDEX):
            self._refuse_others()
        index = self.json(INDEX).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(v, str) for v in index.values()):
            self._bad(f"{INDEX} has no weight_map")
        shards = sorted(set(index.values()))
        if len(shards) > SHARDS_MAX:
            self._bad(f"{INDEX} names {len(shards)} files")
        for shard in shards:
            self._open(shard)
        for name, shard in index.items():
            if self._place.get(name) is not self._files[shard]:
                self._bad(f"{INDEX} says that {name!r} is in {shard}, and it is not")
        if unlisted := self._place.keys() - index.keys():
            self._bad(f"{INDEX} does not list {min(unlisted)!r}")

    def _open(self, name: str) -> None:
        path = self.path(name)
        if not path.exists():
            self._bad(f"{name}, which {INDEX} names, is missing")
        if path.suffix != ".safetensors":
            self._bad(f"{INDEX} names {name!r}, which is not a safetensors file")
        try:
            file = self._files[name] = SafetensorsFile(path)
        except OSError as exc:
            raise ModelError(f"cannot open {path}: {exc.strerror}.") from exc
        for tensor in file.tensors:
            if tensor in self._place:
                self._bad(f"tensor {tensor!r} occurs twice")
            self._place[tensor] = file

    def _refuse_others(self) -> NoReturn:
        for pattern in PICKLED:
            if found := next(self.folder.glob(pattern), None):
                raise UnsupportedModel(
                    f"{self.folder} has its weights in {found.name}, a pickle, which can run any "
                    "program when it is opened. coeld never does; use a checkpoint in safetensors."
                )
        self._bad(f"there is neither {WHOLE} nor {INDEX}")
