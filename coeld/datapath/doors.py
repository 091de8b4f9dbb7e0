"""Which layers stay open for single calls although the routes say that they need not.

Whoever asks goes by the routes of the moment in which its request set out: it may call a layer
expert by expert long after all devices have been told that the layer is served as a span. So what
has been called lately is not compiled into a graph with others yet, and what was is taken out again
when a call for it had to be refused, all layers of the span at once: the next ones follow.
"""

import time
from collections.abc import Collection
from typing import Final

OPEN_S: Final = 3.0
"""After the last call; a request that goes on calls many times a second."""


class Doors:
    """Any thread."""

    def __init__(self) -> None:
        self._until_s: dict[int, float] = {}

    def called(self, layers: Collection[int]) -> None:
        """Somebody wants the experts of these layers."""
        until_s = time.monotonic() + OPEN_S
        self._until_s.update(dict.fromkeys(layers, until_s))

    def open(self) -> frozenset[int]:
        now_s = time.monotonic()
        return frozenset(layer for layer, until_s in self._known() if until_s > now_s)

    def shuts_in_s(self) -> float | None:
        """Until the next of the open ones may be closed; None: none is open."""
        now_s = time.monotonic()
        open_until_s = [until_s for _layer, until_s in self._known() if until_s > now_s]
        return min(open_until_s) - now_s if open_until_s else None

    def _known(self) -> list[tuple[int, float]]:
        return list(self._until_s.items())  # a copy in one go: others write
