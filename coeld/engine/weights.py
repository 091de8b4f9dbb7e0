"""Weights on their way into a session: mapped from the store's blobs, copied only where they must.

ONNX Runtime repacks a quantised matrix into its kernel's layout when a session is made, and does
not look at the original again. So the originals are best never held: a tensor of one blob is that
blob's bytes, mapped; the experts of a layer, which lie in as many blobs, are mapped next to each
other into one range of addresses, as the one matrix that the kernel wants. While the session is
being made the pages already read are given back again and again, so a load peaks at about what
it settles at. Only where the sizes do not fit the page size are parts joined by a copy.
"""

import ctypes
import mmap
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from coeld.model.manifest import BlobRef

Array = NDArray[Any]

PAGE_BYTES: Final = mmap.PAGESIZE
GIVE_BACK_S: Final = 0.005
"""How often pages are given back during a load: at 2 GB/s, 10 MB are read in between."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_PROT_NONE: Final = 0
_MAP_FIXED: Final = 0x10
_MAP_FAILED: Final = ctypes.c_void_p(-1).value
_MADV_DONTNEED: Final = 4


class Blobs(Protocol):
    """The store, as far as the engine reads it."""

    def tensors(self, ref: BlobRef) -> dict[str, Array]: ...
    def blob_path(self, ref: BlobRef) -> "os.PathLike[str] | None":
        """None: it is in no file."""


@dataclass(frozen=True)
class Stored:
    """Tensor `name` of one or several blobs; of several, below each other along the first axis."""

    store: Blobs
    refs: tuple[BlobRef, ...]
    name: str

    @cached_property
    def mapped(self) -> "Mapped | None":
        """The whole as one range of mapped memory, or None where pages do not allow it."""
        places = []
        for ref in self.refs:
            path = self.store.blob_path(ref)
            if path is None:
                return None
            places.append((path, ref.tensors[self.name]))
        last = len(places) - 1
        fits = all(
            tensor.offset % PAGE_BYTES == 0 and (i == last or tensor.bytes % PAGE_BYTES == 0)
            for i, (_path, tensor) in enumerate(places)
        )
        if not fits:
            return None
        first = places[0][1]
        shape = (first.shape[0] * len(places), *first.shape[1:])
        return Mapped(
            [(path, tensor.offset, tensor.bytes) for path, tensor in places],
            np.dtype(first.dtype),
            shape if len(places) > 1 else first.shape,
        )

    def copy(self) -> Array:
        """The same in memory of its own."""
        parts = [self.store.tensors(ref)[self.name] for ref in self.refs]
        return np.ascontiguousarray(parts[0]) if len(parts) == 1 else np.concatenate(parts)


@dataclass(frozen=True)
class Made:
    """Arrays joined along `axis`; joined only while they are being written."""

    parts: tuple[Array, ...]
    axis: int = 0

    def copy(self) -> Array:
        if len(self.parts) == 1:
            return np.ascontiguousarray(self.parts[0])
        return np.concatenate(self.parts, axis=self.axis)


Weight = Stored | Made


class Mapped:
    """File regions mapped next to each other, read-only, seen as one array. Raises OSError."""

    def __init__(
        self,
        places: Sequence[tuple["os.PathLike[str]", int, int]],
        dtype: np.dtype[Any],
        shape: tuple[int, ...],
    ) -> None:
        self.bytes = sum(size for _path, _offset, size in places)
        self._address = _map(None, self.bytes, _PROT_NONE, mmap.MAP_ANONYMOUS, -1, 0)
        weakref.finalize(self, _libc.munmap, self._address, self.bytes)
        at = self._address
        for path, offset, size in places:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                _map(at, size, mmap.PROT_READ, _MAP_FIXED, handle, offset)
            finally:
                os.close(handle)
            at += size
        whole = (ctypes.c_uint8 * self.bytes).from_address(self._address)
        self.array: Array = np.ctypeslib.as_array(whole).view(dtype).reshape(shape)
        """Valid as long as this object."""

    def give_back(self) -> None:
        """Let go of the pages. Whoever looks again reads them from the page cache or the disk."""
        _libc.madvise(self._address, self.bytes, _MADV_DONTNEED)


@contextmanager
def giving_back(mapped: Sequence[Mapped]) -> Iterator[None]:
    """While the body runs, and once after it, give back the pages that it has read."""
    done = threading.Event()

    def work() -> None:
        while not done.wait(GIVE_BACK_S):
            for weights in mapped:
                weights.give_back()

    thread = threading.Thread(target=work, name="weights.give_back", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        for weights in mapped:
            weights.give_back()


def _map(address: int | None, size: int, protection: int, flags: int, file: int, at: int) -> int:
    got: int = _libc.mmap(address, size, protection, mmap.MAP_PRIVATE | flags, file, at)
    if got == _MAP_FAILED:
        code = ctypes.get_errno()
        raise OSError(code, f"mapping weights: {os.strerror(code)}")
    return got
