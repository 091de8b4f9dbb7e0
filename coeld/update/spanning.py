"""Which whole layers this device serves as spans, changed so that no call meets a closed door.

A layer in a span may be compiled into one graph with others, and then answers no calls expert by
expert. So it is *announced* first (in this device's record: others may send whole requests, and
this device answers both kinds of calls), and *closed* only when every device has shown a route
table that knows it, CLOSE_S later at the earliest: what is loaded in an emergency is announced at
once, and compiling it would compete with the answers that wait for it. The way back is the reverse:
opened first, and withdrawn OPEN_S later, when the graphs have been taken apart. A layer that leaves
memory is withdrawn at once.
"""

from collections.abc import Collection
from typing import Final

OPEN_S: Final = 3.0
"""Until layers that were one graph answer single calls again: graphs are rebuilt by chunks."""
CLOSE_S: Final = 3.0
"""From the announcement to the first graph: answers that lost their way have found another."""


class Spanning:
    """Layers of this device. `announced` is for the record, `closed` for the own route table."""

    def __init__(self) -> None:
        self.announced: frozenset[int] = frozenset()
        self.closed: frozenset[int] = frozenset()
        self.borders: frozenset[int] = frozenset()
        """Layers before which a span ends."""
        self._opened: dict[int, float] = {}
        """When layers that are to be withdrawn were opened."""
        self._young: dict[int, float] = {}
        """When layers were announced that may not be closed yet."""

    def want(
        self,
        wanted: Collection[int],
        whole: Collection[int],
        now: float,
        borders: Collection[int] = (),
    ) -> tuple[tuple[int, int], ...]:
        """`wanted` should be spans, of those that are in memory `whole`; what to announce."""
        self.borders = frozenset(borders)
        there, goal = frozenset(whole), frozenset(wanted) & frozenset(whole)
        self._opened = {
            layer: self._opened.get(layer, now if layer in self.closed else now - OPEN_S)
            for layer in (self.announced & there) - goal
        }
        self.closed &= goal
        waiting = {layer for layer, at in self._opened.items() if now < at + OPEN_S}
        self._opened = {layer: self._opened[layer] for layer in waiting}
        fresh = dict.fromkeys(goal - self.announced, now)
        self._young = {
            layer: at
            for layer, at in (self._young | fresh).items()
            if layer in goal and now < at + CLOSE_S
        }
        self.announced = goal | waiting
        return ranges(self.announced, self.borders)

    def agreed(self) -> bool:
        """Every device's route table knows what is announced. True if that closes any layer."""
        before = self.closed
        self.closed = self.announced - self._opened.keys() - self._young.keys()
        return self.closed != before

    @property
    def closed_spans(self) -> tuple[tuple[int, int], ...]:
        return ranges(self.closed, self.borders)

    @property
    def due(self) -> float:
        """When the next layer may be withdrawn or closed."""
        withdrawn = (at + OPEN_S for at in self._opened.values())
        closed = (at + CLOSE_S for at in self._young.values())
        return min([*withdrawn, *closed], default=float("inf"))


def ranges(layers: Collection[int], borders: Collection[int] = ()) -> tuple[tuple[int, int], ...]:
    """Layers as (first, stop) of consecutive ones, ascending; none crosses a border."""
    found: list[tuple[int, int]] = []
    for layer in sorted(layers):
        if found and found[-1][1] == layer and layer not in borders:
            found[-1] = (found[-1][0], layer + 1)
        else:
            found.append((layer, layer + 1))
    return tuple(found)
