"""Opens a safetensors file that nobody vouches for: tensors as float32, rows on demand.

The `safetensors` package hands out bfloat16 only to torch, so the header, one JSON object, is read
here, and every number in it checked against the file before it is believed. Nothing is
memory-mapped: a file cut short while it is read is an error, not a bus error.

Format: https://github.com/huggingface/safetensors#format. Tensors lie without gaps or overlaps.
"""

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from coeld.errors import BadModelFile, UnsupportedModel

HEADER_BYTES_MAX: Final = 100_000_000
"""As in the safetensors package."""
TENSORS_MAX: Final = 200_000
DIMENSIONS_MAX: Final = 8
NAME_CHARS_MAX: Final = 1024

STORED: Final[dict[str, np.dtype[Any]]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
}
"""Types that can be read. numpy has no bfloat16: it is the upper half of a float32. Bytes are read
as the numbers they are: a family that packs its weights (gpt-oss) knows what they mean."""
OTHERS: Final = frozenset(
    """
    BOOL I8 F8_E5M2 F8_E4M3 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ F4 F6_E2M3 F6_E3M2 I16 U16 I32 U32
    I64 U64 F64 C64
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies in its file. A scalar has the shape (1,)."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


class SafetensorsFile:
    """An open safetensors file. Close it when done."""

    def __init__(self, path: Path) -> None:
        """Raises BadModelFile or UnsupportedModel; OSError when the file cannot be opened."""
        self.path = path
        self.bytes = path.stat().st_size
        self._file = path.open("rb")
        try:
            self.tensors = self._header()
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        self._file.close()

    def read(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows start..stop of a tensor, a new array. Raises BadModelFile, naming the tensor."""
        tensor = self.tensors[name]
        stored = STORED[tensor.dtype]
        row = prod(tensor.shape[1:])
        self._file.seek(tensor.offset + start * row * stored.itemsize)
        data = bytearray((stop - start) * row * stored.itemsize)
        if self._file.readinto(data) != len(data):
            raise BadModelFile(f"{self.path} became shorter while tensor {name} was read.")
        raw = np.frombuffer(data, stored)
        if tensor.dtype == "BF16":
            values = (raw.astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.asarray(raw, np.float32)
        if not np.isfinite(values).all():
            raise BadModelFile(
                f"tensor {name} of {self.path} holds infinities or NaN: the file is damaged. "
                "Get it again."
            )
        return values.reshape(stop - start, *tensor.shape[1:])

    def _bad(self, what: str) -> NoReturn:
        raise BadModelFile(
            f"{self.path} is not a usable safetensors file: {what}. It is damaged, incomplete or "
            "something else; get it again."
        )

    def _header(self) -> dict[str, StoredTensor]:
        if self.bytes < 8:
            self._bad(f"it has {self.bytes} bytes")
        (length,) = struct.unpack("<Q", self._file.read(8))
        if length > min(HEADER_BYTES_MAX, self.bytes - 8):
            self._bad(f"it claims a header of {length} bytes, the file has {self.bytes}")
        value = parse_object(self._file.read(length), lambda what: self._bad(f"its header {what}"))
        value.pop("__metadata__", None)
        if len(value) > TENSORS_MAX:
            self._bad(f"it claims {len(value)} tensors")
        start, found, spans = 8 + length, {}, []
        for name, entry in value.items():
            tensor, span = self._tensor(name, entry, start)
            found[name] = tensor
            spans.append((*span, name))
        self._check_places(sorted(spans), self.bytes - start)
        return found

    def _tensor(self, name: str, entry: Any, start: int) -> tuple[StoredTensor, tuple[int, int]]:
        if len(name) > NAME_CHARS_MAX:
            self._bad(f"it has a name of {len(name)} characters")
        match entry:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end]}:
                numbers = [*shape, begin, end]
            case _:
                self._bad(f"tensor {name!r} is described as {str(entry)[:80]!r}")
        if len(shape) > DIMENSIONS_MAX or any(type(n) is not int or n < 0 for n in numbers):
            self._bad(f"tensor {name!r} is described as {str(entry)[:80]!r}")
        if dtype not in STORED:
            if dtype not in OTHERS:
                self._bad(f"tensor {name!r} has the unknown type {dtype[:20]!r}")
            raise UnsupportedModel(
                f"tensor {name!r} of {self.path} has the type {dtype}. coeld imports "
                f"{', '.join(STORED)}; use a checkpoint that is not quantised."
            )
        if end - begin != prod(shape) * STORED[dtype].itemsize or begin == end:
            self._bad(f"tensor {name!r} of shape {tuple(shape)} has {end - begin} bytes")
        return StoredTensor(dtype, tuple(shape) or (1,), start + begin), (begin, end)

    def _check_places(self, spans: list[tuple[int, int, str]], size: int) -> None:
        at = 0
        for begin, end, name in spans:
            if begin != at:
                self._bad(f"tensor {name!r} begins at {begin}, the one before ends at {at}")
            at = end
            if end > size:
                self._bad(f"tensor {name!r} would end at byte {end}, the data ends at {size}")
        if at != size:
            self._bad(f"its tensors end at {at}, its data at {size}")


def parse_object(data: bytes, bad: Callable[[str], NoReturn]) -> dict[str, Any]:
    """A JSON object in which no key occurs twice; `bad(what)` raises when it is none."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = next(key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index]))
            bad(f"has the key {twice[:80]!r} twice")
        return found

    try:
        value = json.loads(data, object_pairs_hook=once)
    except (ValueError, RecursionError) as exc:
        bad(f"is not JSON ({exc})")
    if not isinstance(value, dict):
        bad("is not a JSON object")
    return value
