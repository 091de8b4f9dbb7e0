"""Which experts this device's own tokens use, and when that is worth telling. Pure.

Counts come from the engine, of layers whose gate weights it sees. They halve in half an hour, so
that what people talk about now counts. Nothing is told before experts of a layer are placed one by
one (else no decision depends on it), and from then on only what would be described wrongly
otherwise: an expert is described well enough until it is used twice or half as often, and a layer
is described anew when a tenth of its uses moved among experts that are not, at most every five
minutes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Final

from coeld.asked import EVEN, EVIDENCE, Popularity, levels_of

HALF_LIFE_S: Final = 1800.0
MOVED_PERCENT: Final = 10
TELL_S: Final = 300.0


class Habit:
    """The counts of one device and one model."""

    def __init__(self, prior: Popularity = ()) -> None:
        """`prior`: what others take for granted of layers that nobody tells of."""
        self._prior = prior
        self._counts: dict[int, list[float]] = {}
        self._at = self._told_at = float("-inf")
        self._told: Popularity = ()
        self._wanted = False
        self._fresh = False

    def count(self, uses: Mapping[int, Sequence[int]], now: float) -> None:
        """Uses of each expert, by layer, since the last time."""
        if not uses:
            return
        left = 0.5 ** ((now - self._at) / HALF_LIFE_S) if self._counts else 0.0
        self._at, self._fresh = now, True
        for counts in self._counts.values():
            counts[:] = [count * left for count in counts]
        for layer, row in uses.items():
            before = self._counts.get(layer, [0.0] * len(row))
            self._counts[layer] = [a + b for a, b in zip(before, row, strict=True)]

    def told(self, in_parts: bool, now: float) -> Popularity:
        """What to say of popularity now. Once wanted it stays so: were it taken back when layers
        become whole, they might be placed in parts again for lack of it."""
        self._wanted |= in_parts
        if self._wanted and self._fresh and now >= self._told_at + TELL_S:
            self._fresh = False
            levels = self._levels()
            if levels != self._told and any(levels):
                self._told, self._told_at = levels, now
        return self._told

    def _levels(self) -> Popularity:
        """What was told, and the layers of which another tenth of uses is to be told."""
        layers = max([len(self._told), *(layer + 1 for layer in self._counts)])
        return tuple(self._row(layer) for layer in range(layers))

    def _row(self, layer: int) -> bytes:
        told = self._told[layer] if layer < len(self._told) else b""
        counts = self._counts.get(layer, ())
        if not counts or sum(counts) < EVIDENCE * len(counts):
            return told
        exact, nearest = _exact(counts), levels_of(counts)
        granted = self._prior[layer] if layer < len(self._prior) else b""
        before = told or granted or bytes([EVEN] * len(counts))
        moved = bytes(
            level if abs(found - now) > 1 else now
            for found, level, now in zip(exact, nearest, before, strict=True)
        )
        return nearest if 100 * total_variation(before, moved) >= MOVED_PERCENT else told


def _exact(counts: Sequence[float]) -> list[float]:
    mean = sum(counts) / len(counts)
    lowest = mean / 2**EVEN
    return [EVEN + math.log2(max(count, lowest) / mean) for count in counts]


def total_variation(a: bytes, b: bytes) -> float:
    """Half the sum of differences of two rows of levels, as probabilities: 0 to 1."""
    sums = [sum(1 << level for level in row) for row in (a, b)]
    apart = [abs((1 << x) / sums[0] - (1 << y) / sums[1]) for x, y in zip(a, b, strict=True)]
    return sum(apart) / 2
