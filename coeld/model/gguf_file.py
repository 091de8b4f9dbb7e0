"""Opens a GGUF file that nobody vouches for: metadata, and tensors as float32.

The header is walked here, with every length checked against the file before it is believed, because
the `gguf` package's reader trusts them (a damaged count makes it loop or raise anything) and takes
seconds to build an array object per token. The package's tables and dequantisation are used.
Nothing is memory-mapped: a file cut short while it is read is an error, not a bus error.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

import hashlib
import struct
from collections.abc import Collection
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, NoReturn, Self

import gguf
import numpy as np
from numpy.typing import NDArray

from coeld.errors import BadModelFile, UnsupportedModel
from coeld.model.checkpoint import Kind, Vocabulary, expect

Type = gguf.GGMLQuantizationType
SUPPORTED_TYPES: Final = (Type.F32, Type.F16, Type.Q8_0, Type.Q4_1)
VERSIONS: Final = (2, 3)
KEYS_MAX: Final = 10_000
TENSORS_MAX: Final = 100_000
DIMENSIONS_MAX: Final = 4
NAME_BYTES_MAX: Final = 1024
ALIGNMENT_MAX: Final = 1 << 20
ARRAY_MAX: Final = 4_000_000

SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?"} | {
    10: "Q",
    11: "q",
    12: "d",
}
"""Metadata value type to struct code."""
STRING: Final = 8
ARRAY: Final = 9


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor lies. `shape` is in numpy's order: the last dimension is contiguous."""

    name: str
    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    offset: int
    bytes: int


class GgufFile:
    """An open GGUF file, a Checkpoint. `config` values are int, float, bool, str, or lists."""

    kind: Kind = "gguf"

    def __init__(self, path: Path) -> None:
        """Raises BadModelFile or UnsupportedModel; OSError when the file cannot be opened."""
        self.path = path
        self.bytes = path.stat().st_size
        self._file = path.open("rb")
        try:
            header = _Header(path, self._file, self.bytes)
            self.config = header.metadata
            self.tensors = header.tensors
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def source(self) -> str:
        return self.path.name

    @property
    def licence(self) -> str:
        return expect(self, "general.license", str, lambda _: True, "unknown")

    def names(self) -> Collection[str]:
        return self.tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def fingerprint(self) -> str:
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def vocabulary(self, rows: int) -> Vocabulary | None:
        from coeld.model.tokenizer import read_vocabulary  # which reads what is open here

        return read_vocabulary(self, rows)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Rows start..stop (of the first dimension) of a tensor, dequantised.

        Raises BadModelFile when the tensor does not exist, the file got shorter, or a value is not
        finite.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise BadModelFile(f"{self.path} has no tensor {name}: it is not a complete model.")
        count, *rest = tensor.shape
        stop = count if stop is None else min(stop, count)
        row_bytes = tensor.bytes // count
        self._file.seek(tensor.offset + start * row_bytes)
        data = self._file.read((stop - start) * row_bytes)
        if len(data) != (stop - start) * row_bytes:
            raise BadModelFile(f"{self.path} became shorter while it was read.")
        last = row_bytes if rest else row_bytes * count
        raw = np.frombuffer(data, np.uint8).reshape(-1, last)
        with np.errstate(all="ignore"):  # checked below
            values = gguf.quants.dequantize(raw, tensor.type)
        if not np.isfinite(values).all():
            raise BadModelFile(
                f"tensor {name} of {self.path} holds infinities or NaN: the file is damaged. "
                "Get it again."
            )
        return np.array(values, np.float32).reshape(stop - start, *rest)


class _Header:
    """One pass over the header."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self._path, self._file, self._size, self._at = path, file, size, 0
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GgufTensor] = {}
        tensor_count, key_count = self._start()
        for _ in range(key_count):
            self._key()
        found = [self._tensor() for _ in range(tensor_count)]
        self._place(found)

    def _bad(self, what: str) -> NoReturn:
        raise BadModelFile(
            f"{self._path} is not a usable GGUF file: {what}. It is damaged, incomplete or "
            "something else; get it again."
        )

    def _start(self) -> tuple[int, int]:
        if self._size < 24 or self._take(4) != b"GGUF":
            self._bad("it does not begin like one")
        version, tensors, keys = self._unpack("<IQQ")
        if version not in VERSIONS:
            if version & 0xFFFF == 0:
                raise UnsupportedModel(
                    f"{self._path} is a big-endian GGUF file. coeld reads little-endian ones."
                )
            raise UnsupportedModel(
                f"{self._path} is a GGUF file of version {version}. coeld reads 2 and 3."
            )
        if tensors > TENSORS_MAX or keys > KEYS_MAX:
            self._bad(f"it claims {tensors} tensors and {keys} keys")
        return tensors, keys

    def _take(self, count: int) -> bytes:
        if count > self._size - self._at:
            self._bad(f"it ends in the middle of its header, at byte {self._size}")
        data = self._file.read(count)
        if len(data) != count:
            self._bad("it became shorter while it was read")
        self._at += count
        return data

    def _unpack(self, code: str) -> tuple[Any, ...]:
        return struct.unpack(code, self._take(struct.calcsize(code)))

    def _text(self, limit: int | None = None) -> str:
        (length,) = self._unpack("<Q")
        if limit is not None and length > limit:
            self._bad(f"it has a name of {length} bytes")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            self._bad("a text in it is not UTF-8")

    def _key(self) -> None:
        name = self._text(NAME_BYTES_MAX)
        if name in self.metadata:
            self._bad(f"the key {name!r} occurs twice")
        (kind,) = self._unpack("<I")
        self.metadata[name] = self._array() if kind == ARRAY else self._scalar(kind)

    def _scalar(self, kind: int) -> Any:
        if kind == STRING:
            return self._text()
        if kind not in SCALARS:
            self._bad(f"it has a value of the unknown type {kind}")
        return self._unpack("<" + SCALARS[kind])[0]

    def _array(self) -> list[Any]:
        kind, count = self._unpack("<IQ")
        if count > min(ARRAY_MAX, self._size - self._at):
            self._bad(f"it claims an array of {count} values")
        if kind == STRING:
            return [self._text() for _ in range(count)]
        if kind not in SCALARS:
            self._bad(f"it has an array of the unknown type {kind}")
        width = struct.calcsize("<" + SCALARS[kind])
        return list(struct.unpack(f"<{count}{SCALARS[kind]}", self._take(count * width)))

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._text(NAME_BYTES_MAX)
        (dimensions,) = self._unpack("<I")
        if not 1 <= dimensions <= DIMENSIONS_MAX:
            self._bad(f"tensor {name!r} has {dimensions} dimensions")
        shape = self._unpack(f"<{dimensions}Q")[::-1]
        kind, offset = self._unpack("<IQ")
        return name, shape, kind, offset

    def _place(self, found: list[tuple[str, tuple[int, ...], int, int]]) -> None:
        alignment = self.metadata.get("general.alignment", 32)
        if (
            type(alignment) is not int
            or not 1 <= alignment <= ALIGNMENT_MAX
            or alignment & (alignment - 1)
        ):
            self._bad(f"its alignment is {alignment!r}")
        data = -(-self._at // alignment) * alignment
        free_from = data
        for name, shape, kind, offset in sorted(found, key=lambda tensor: tensor[3]):
            tensor = self._sized(name, shape, kind, data + offset)
            if name in self.tensors:
                self._bad(f"tensor {name!r} occurs twice")
            if offset % alignment or tensor.offset < free_from:
                self._bad(f"tensor {name!r} is misplaced")
            free_from = tensor.offset + tensor.bytes
            if free_from > self._size:
                self._bad(
                    f"tensor {name!r} would end at byte {free_from}, the file ends at {self._size}"
                )
            self.tensors[name] = tensor

    def _sized(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
        if kind not in SUPPORTED_TYPES:
            known = Type(kind).name if kind in set(Type) else f"number {kind}"
            raise UnsupportedModel(
                f"tensor {name!r} of {self._path} has the type {known}. coeld imports "
                f"{', '.join(supported.name for supported in SUPPORTED_TYPES)}; convert the file, "
                "for example with llama-quantize to Q8_0."
            )
        block, block_bytes = gguf.GGML_QUANT_SIZES[Type(kind)]
        if min(shape) < 1 or shape[-1] % block:
            self._bad(f"tensor {name!r} has the shape {shape}")
        return GgufTensor(name, shape, Type(kind), offset, prod(shape) // block * block_bytes)
