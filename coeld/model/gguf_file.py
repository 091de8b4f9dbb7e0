"""Opens a GGUF file that nobody vouches for: metadata, and tensors as float32.

The header is walked here, with every length checked against the file before it is believed, because
the `gguf` package's reader trusts them (a damaged count makes it loop or raise anything) and takes
seconds to build an array object per token. The package's tables and dequantisation are used.
Nothing is memory-mapped: a file cut short while it is read is an error, not a bus error.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

import hashlib
import re
import struct
from collections.abc import Collection
from dataclasses import dataclass, replace
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
SUPPORTED_TYPES: Final = (
    *(Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1),
    *(Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.MXFP4),
)
VERSIONS: Final = (2, 3)
KEYS_MAX: Final = 10_000
TENSORS_MAX: Final = 100_000
DIMENSIONS_MAX: Final = 4
NAME_BYTES_MAX: Final = 1024
ALIGNMENT_MAX: Final = 1 << 20
ARRAY_MAX: Final = 4_000_000
COPY_BYTES: Final = 1 << 20
PARTS_MAX: Final = 1000
PART_NAME: Final = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf")
"""How llama.cpp names the parts of a split file."""

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
    part: int = 0
    """Which file of several."""


class GgufFile:
    """An open GGUF file, a Checkpoint. `config` values are int, float, bool, str, or lists."""

    kind: Kind = "gguf"

    def __init__(self, path: Path) -> None:
        """`path`: of a file, or of any of its parts.

        Raises BadModelFile or UnsupportedModel; OSError when the file cannot be opened.
        """
        self.path = path
        self._parts = [path]
        self._files: list[BinaryIO] = []
        try:
            header = self._open(path)
            self.tensors = header.tensors
            # llama-gguf-split writes 0 into what it merges.
            if header.metadata.get("split.count", 1) not in (0, 1):
                header = self._open_parts(header)
            self.config = header.metadata
        except BaseException:
            self._close()
            raise
        self.bytes = sum(part.stat().st_size for part in self._parts)

    def _open(self, path: Path) -> "_Header":
        file = path.open("rb")
        self._files.append(file)
        return _Header(path, file, path.stat().st_size)

    def _open_parts(self, found: "_Header") -> "_Header":
        """Opens all parts instead, united in `tensors`; returns the header of the first."""
        name, count = PART_NAME.fullmatch(self.path.name), found.metadata["split.count"]
        if type(count) is not int or not 1 < count <= PARTS_MAX:
            found.bad(f"it says that it is one of {str(count)[:20]!r} parts")
        if name is None or int(name[3]) != count:
            found.bad(
                f"it is one of {count} parts, but is not called NAME-00001-of-{count:05}.gguf"
            )
        self._close()
        self._files.clear()
        names = [f"{name[1]}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
        self._parts = [self.path.with_name(part) for part in names]
        self.tensors, headers = {}, []
        for number, part in enumerate(self._parts):
            if not part.exists():
                raise BadModelFile(
                    f"{part.name} is missing: {self.path.name} is one of {count} parts, and the "
                    "model needs all of them, in one folder."
                )
            header = self._open(part)
            headers.append(header)
            said = tuple(header.metadata.get(key) for key in ("split.no", "split.count"))
            if said != (number, count):
                header.bad(f"it is called part {number + 1} of {count}, and says {said}")
            for tensor in header.tensors.values():
                if tensor.name in self.tensors:
                    header.bad(f"tensor {tensor.name!r} occurs in two parts")
                self.tensors[tensor.name] = replace(tensor, part=number)
        total = headers[0].metadata.get("split.tensors.count", len(self.tensors))
        if total != len(self.tensors):
            headers[0].bad(f"the parts have {len(self.tensors)} tensors, it says {total}")
        return headers[0]

    def _close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._close()

    @property
    def source(self) -> str:
        return self._parts[0].name

    @property
    def licence(self) -> str:
        return expect(self, "general.license", str, lambda _: True, "unknown")

    def names(self) -> Collection[str]:
        return self.tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for part in self._parts:
            with part.open("rb") as file:
                while data := file.read(COPY_BYTES):
                    digest.update(data)
        return digest.hexdigest()

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
        file = self._files[tensor.part]
        file.seek(tensor.offset + start * row_bytes)
        data = file.read((stop - start) * row_bytes)
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

    def bad(self, what: str) -> NoReturn:
        raise BadModelFile(
            f"{self._path} is not a usable GGUF file: {what}. It is damaged, incomplete or "
            "something else; get it again."
        )

    def _start(self) -> tuple[int, int]:
        if self._size < 24 or self._take(4) != b"GGUF":
            self.bad("it does not begin like one")
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
            self.bad(f"it claims {tensors} tensors and {keys} keys")
        return tensors, keys

    def _take(self, count: int) -> bytes:
        if count > self._size - self._at:
            self.bad(f"it ends in the middle of its header, at byte {self._size}")
        data = self._file.read(count)
        if len(data) != count:
            self.bad("it became shorter while it was read")
        self._at += count
        return data

    def _unpack(self, code: str) -> tuple[Any, ...]:
        return struct.unpack(code, self._take(struct.calcsize(code)))

    def _text(self, limit: int | None = None) -> str:
        (length,) = self._unpack("<Q")
        if limit is not None and length > limit:
            self.bad(f"it has a name of {length} bytes")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            self.bad("a text in it is not UTF-8")

    def _key(self) -> None:
        name = self._text(NAME_BYTES_MAX)
        if name in self.metadata:
            self.bad(f"the key {name!r} occurs twice")
        (kind,) = self._unpack("<I")
        self.metadata[name] = self._array() if kind == ARRAY else self._scalar(kind)

    def _scalar(self, kind: int) -> Any:
        if kind == STRING:
            return self._text()
        if kind not in SCALARS:
            self.bad(f"it has a value of the unknown type {kind}")
        return self._unpack("<" + SCALARS[kind])[0]

    def _array(self) -> list[Any]:
        kind, count = self._unpack("<IQ")
        if count > min(ARRAY_MAX, self._size - self._at):
            self.bad(f"it claims an array of {count} values")
        if kind == STRING:
            return [self._text() for _ in range(count)]
        if kind not in SCALARS:
            self.bad(f"it has an array of the unknown type {kind}")
        width = struct.calcsize("<" + SCALARS[kind])
        return list(struct.unpack(f"<{count}{SCALARS[kind]}", self._take(count * width)))

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._text(NAME_BYTES_MAX)
        (dimensions,) = self._unpack("<I")
        if not 1 <= dimensions <= DIMENSIONS_MAX:
            self.bad(f"tensor {name!r} has {dimensions} dimensions")
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
            self.bad(f"its alignment is {alignment!r}")
        data = -(-self._at // alignment) * alignment
        free_from = data
        for name, shape, kind, offset in sorted(found, key=lambda tensor: tensor[3]):
            tensor = self._sized(name, shape, kind, data + offset)
            if name in self.tensors:
                self.bad(f"tensor {name!r} occurs twice")
            if offset % alignment or tensor.offset < free_from:
                self.bad(f"tensor {name!r} is misplaced")
            free_from = tensor.offset + tensor.bytes
            if free_from > self._size:
                self.bad(
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
            self.bad(f"tensor {name!r} has the shape {shape}")
        return GgufTensor(name, shape, Type(kind), offset, prod(shape) // block * block_bytes)
