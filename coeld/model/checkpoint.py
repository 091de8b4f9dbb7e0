"""What an import reads from: a GGUF file or a Hugging Face folder, behind one protocol.

The importer and the families know only this. A reader vouches for what it hands out: sizes are
checked against the file before they are believed, values are finite, nothing pickled is loaded.
What a configuration *means* is the family's business (`coeld.model.families`), not the reader's.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from coeld.errors import BadModelFile

T = TypeVar("T")

Kind = Literal["gguf", "huggingface"]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokenizer, and what the manifest says about it."""

    json: bytes
    """A `tokenizers` JSON file. The same source gives the same bytes on every machine."""
    bos_token: int | None
    eos_tokens: tuple[int, ...]
    """Any of them ends an answer. First the tokenizer's own, if it names one; then ascending."""
    add_bos: bool
    chat_template: str | None


class Checkpoint(Protocol):
    """An open checkpoint; a context manager that closes its files."""

    @property
    def kind(self) -> Kind: ...

    @property
    def config(self) -> Mapping[str, Any]:
        """GGUF: the metadata, "llama.block_count" and so on. Hugging Face: the parsed config.json.

        Untrusted: read it with `expect`.
        """

    @property
    def source(self) -> str:
        """For people: the file's or folder's name, or "hf:ORG/NAME@COMMIT"."""

    @property
    def licence(self) -> str:
        """As the source says it, else "unknown"."""

    @property
    def bytes(self) -> int:
        """Size of all files with tensors."""

    def names(self) -> Collection[str]:
        """All tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """In numpy's order, the last dimension contiguous. KeyError when there is none such.

        Known from the header alone. Every dimension is at least 1.
        """

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Rows start..stop along the first dimension, as float32, a new array: (stop - start, ...).

        Reads no more from disk than those rows, so that one expert of (E, N, K) can be read alone.
        A scalar or vector is read the same way. Raises BadModelFile, naming the tensor, when it
        does not exist, the file got shorter, or a value is not finite.
        """

    def fingerprint(self) -> str:
        """sha256 in hex over everything that an import depends on: all bytes of tensors, config
        and tokenizer files. Names the journal of an interrupted import."""

    def vocabulary(self, rows: int) -> Vocabulary | None:
        """The tokenizer. None when the source has none: the model can then only be measured.

        `rows`: of the embedding; every token must be below. Raises BadModelFile, UnsupportedModel.
        """

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None: ...


def expect(
    checkpoint: Checkpoint,
    key: str,
    kind: type[T],
    check: Callable[[T], bool],
    default: T | None = None,
) -> T:
    """A value of the configuration of exactly the type `kind` that passes `check`.

    `default` is what an absent or null key means; None: it must be there. Raises BadModelFile.
    """
    value = checkpoint.config.get(key)
    if value is None:
        value = default
    if type(value) is not kind or not check(value):
        raise BadModelFile(
            f"{checkpoint.source} gives {key} as {str(value)[:80]!r}, which cannot be. The file is "
            "damaged or made by a broken tool; get it again."
        )
    return value
