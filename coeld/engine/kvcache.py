"""The KV cache of one request: keys and values of layers that run here, bound in place.

GroupQueryAttention reads and writes the same buffer, so a token costs no copy. Capacity grows by
doubling, up to the context limit, because most answers are far shorter than the context:
SmolLM2-135M needs 46 KB a token.
"""

from collections.abc import Iterable
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

    def __init__(self, shape: Shape, context_tokens: int, layers: Iterable[int]) -> None:
        self._shape = shape
        self._places = {layer: 2 * place for place, layer in enumerate(layers)}
        self._context_tokens = context_tokens
        self.length = 0
        """Tokens cached."""
        self.capacity = 0
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

    def values(self, layer: int) -> tuple[ort.OrtValue, ort.OrtValue]:
        """Keys and values of a layer."""
        place = self._places[layer]
        return self._values[place], self._values[place + 1]

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for array in self._arrays)

    def bytes_for(self, tokens: int) -> int:
        """What it takes with room for `tokens` in all."""
        shape, rows = self._shape, max(self._capacity_for(tokens), self.capacity)
        return 2 * len(self._places) * shape.kv_heads * rows * shape.head_dim * 4

    def _capacity_for(self, tokens: int) -> int:
        capacity = max(CAPACITY_MIN_TOKENS, self.capacity)
        while capacity < tokens:
            capacity *= 2
        return min(capacity, self._context_tokens)

    def free(self) -> None:
        """Give the memory back now."""
        if self.bound is not None:
            self.bound.release()
        self._arrays, self._values, self.bound = [], [], None
        self.capacity = 0
        self.generation += 1

    def _move(self, capacity: int) -> None:
        shape = (1, self._shape.kv_heads, capacity, self._shape.head_dim)
        for index in range(2 * len(self._places)):
            array = np.zeros(shape, np.float32)
            if self.capacity:
                array[:, :, : self.length] = self._arrays[index][:, :, : self.length]
                self._arrays[index] = array
                self._values[index] = ort.OrtValue.ortvalue_from_numpy(array)
            else:
                self._arrays.append(array)
                self._values.append(ort.OrtValue.ortvalue_from_numpy(array))
        self.capacity = capacity
        self.generation += 1
