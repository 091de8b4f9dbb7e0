"""The KV cache of one request: keys and values of layers that run here, bound in place.

GroupQueryAttention reads and writes the same buffer, so a token costs no copy. Memory is mapped for
CAPACITY_TOKENS at once and becomes real page by page, as tokens are written (SmolLM2-135M needs
46 KB a token), so an answer grows without a pause. Only a longer one is copied, into twice the
room, up to the context limit.
"""

import contextlib
import mmap
from collections.abc import Iterable
from math import prod
from typing import Final, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from coeld.model.manifest import Shape

CAPACITY_TOKENS: Final = 2048
PAGE_BYTES: Final = mmap.PAGESIZE
NO_RESERVE: Final = 0x4000
"""MAP_NORESERVE of Linux: room that is never written does not count as promised memory."""


class Bound(Protocol):
    """Bindings of a cache's buffers to graphs; they keep the buffers alive."""

    def release(self) -> None: ...


class KVCache:
    """Buffers float32 (1, kv_heads, capacity, head_dim), two per layer, and how many are used."""

    def __init__(self, shape: Shape, context_tokens: int, layers: Iterable[int]) -> None:
        self._shape = shape
        self._places = {layer: 2 * place for place, layer in enumerate(layers)}
        self._context_tokens = context_tokens
        self.length = 0
        """Tokens cached."""
        self.capacity = 0
        self._written = 0
        """The most tokens that there was to be room for since the buffers were mapped."""
        self.generation = 0
        """Raised whenever the buffers move: bindings made before are stale."""
        self._arrays: list[NDArray[np.float32]] = []
        self._values: list[ort.OrtValue] = []
        """k of the first layer, v of the first layer, k of the second, …"""
        self.bound: Bound | None = None
        """The pass that used it last; for the trunk alone."""

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` in all. At most the context limit (an assertion)."""
        assert tokens <= self._context_tokens
        if tokens > self.capacity:
            self._move(self._capacity_for(tokens))
        self._written = max(self._written, tokens)

    def values(self, layer: int) -> tuple[ort.OrtValue, ort.OrtValue]:
        """Keys and values of a layer."""
        place = self._places[layer]
        return self._values[place], self._values[place + 1]

    @property
    def bytes(self) -> int:
        """What is in memory, or will be once the reserved tokens are written."""
        return self._resident(self._written)

    def bytes_for(self, tokens: int) -> int:
        """What it takes with room for `tokens` in all."""
        return self._resident(max(tokens, self._written))

    def _resident(self, tokens: int) -> int:
        """Whole pages for every head."""
        row = 4 * self._shape.head_dim
        whole = -(-tokens * row // PAGE_BYTES) * PAGE_BYTES
        whole = min(whole, max(self.capacity, self._capacity_for(tokens)) * row)
        return 2 * len(self._places) * self._shape.kv_heads * whole

    def _capacity_for(self, tokens: int) -> int:
        capacity = max(CAPACITY_TOKENS, self.capacity)
        while capacity < tokens:
            capacity *= 2
        return min(capacity, self._context_tokens)

    def free(self) -> None:
        """Give the memory back now."""
        if self.bound is not None:
            self.bound.release()
        self._arrays, self._values, self.bound = [], [], None
        self.capacity = self._written = 0
        self.generation += 1

    def _move(self, capacity: int) -> None:
        """Map buffers for that many tokens, with what has been cached."""
        count, held = 2 * len(self._places), self._arrays
        shape = (1, self._shape.kv_heads, capacity, self._shape.head_dim)
        self._arrays = list(_mapped((count, *shape))) if count else []
        for old, new in zip(held, self._arrays, strict=False):
            new[:, :, : self.length] = old[:, :, : self.length]
        self._values = [ort.OrtValue.ortvalue_from_numpy(array) for array in self._arrays]
        self.capacity, self._written = capacity, self.length
        self.generation += 1


def _mapped(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Zeros in pages of their own that become memory when they are written, one by one: the
    system's huge pages would fill all of it at the first touch."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    pages = mmap.mmap(-1, 4 * prod(shape), flags=flags)
    with contextlib.suppress(OSError):  # a kernel without huge pages knows no such advice
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(pages, np.float32).reshape(shape)
