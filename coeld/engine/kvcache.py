"""The KV cache of one request: keys and values of every layer, bound in place to the graphs.

GroupQueryAttention reads and writes the same buffer, so a token costs no copy. Capacity grows by
doubling, up to the context limit, because most answers are far shorter than the context:
SmolLM2-135M needs 46 KB a token.
"""

from typing import Final, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from coeld.model.manifest import Shape

CAPACITY_MIN_TOKENS: Final = 256


class Bound(Protocol):
    """Bindings of a cache's buffers to graphs; they keep the buffers alive."""

    def release(self) -> None: ...


class KVCache:
    """Buffers float32 (1, kv_heads, capacity, head_dim), two per layer, and how many are used."""

    def __init__(self, shape: Shape, context_tokens: int) -> None:
        self._shape = shape
        self._context_tokens = context_tokens
        self.length = 0
        """Tokens cached."""
        self.capacity = 0
        self.generation = 0
        """Raised whenever the buffers move: bindings made before are stale."""
        self._arrays: list[NDArray[np.float32]] = []
        self.values: list[ort.OrtValue] = []
        """k of layer 0, v of layer 0, k of layer 1, …"""
        self.bound: Bound | None = None
        """The pass that used it last; for the trunk alone."""

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` in all. At most the context limit (an assertion)."""
        assert tokens <= self._context_tokens
        if tokens <= self.capacity:
            return
        capacity = max(CAPACITY_MIN_TOKENS, self.capacity)
        while capacity < tokens:
            capacity *= 2
        self._move(min(capacity, self._context_tokens))

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for array in self._arrays)

    def free(self) -> None:
        """Give the memory back now."""
        if self.bound is not None:
            self.bound.release()
        self._arrays, self.values, self.bound = [], [], None
        self.capacity = 0
        self.generation += 1

    def _move(self, capacity: int) -> None:
        shape = (1, self._shape.kv_heads, capacity, self._shape.head_dim)
        for index in range(2 * self._shape.layers):
            array = np.zeros(shape, np.float32)
            if self.capacity:
                array[:, :, : self.length] = self._arrays[index][:, :, : self.length]
                self._arrays[index] = array
                self.values[index] = ort.OrtValue.ortvalue_from_numpy(array)
            else:
                self._arrays.append(array)
                self.values.append(ort.OrtValue.ortvalue_from_numpy(array))
        self.capacity = capacity
        self.generation += 1
