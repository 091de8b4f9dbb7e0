"""Which experts this device's own requests use, counted where gate weights leave the graph.

That is at cuts. Inside fused layers nobody sees them, nor needs to: such layers are here whole.
"""

import numpy as np
from numpy.typing import NDArray

from coeld.datapath.ports import Gates


class Uses:
    """Rows per layer and expert. The decoder's thread."""

    def __init__(self, layers: int, experts: int) -> None:
        self._rows: NDArray[np.int64] = np.zeros((layers, experts), np.int64)

    def count(self, layer: int, gates: Gates) -> None:
        """`gates` (n, experts) float32, 0 where an expert was not chosen."""
        used = gates[0] != 0 if len(gates) == 1 else np.count_nonzero(gates, axis=0)
        self._rows[layer] += used

    def take(self) -> dict[int, list[int]]:
        """Rows since the last time, of the layers that were seen."""
        seen = np.flatnonzero(self._rows.any(axis=1))
        found: dict[int, list[int]] = {int(layer): self._rows[layer].tolist() for layer in seen}
        self._rows[:] = 0
        return found
