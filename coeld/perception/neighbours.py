"""Whom to listen to and to watch: everyone in a small swarm, a bounded set in a large one. Pure.

All devices lie on several rings, each in the order of another hash of their ids; the neighbours of
a device are the next and the previous one on each. So being neighbours is mutual as soon as both
know the same devices, every device has the same bounded load, a join or a failure changes the
choice of two devices per ring, and nobody has to agree on anything. The union of a few random
rings is an expander (Law, Siu: "Distributed construction of random expander networks", 2003): news
needs O(log N) hops, and it stays connected when many devices fail.
"""

import hashlib
from bisect import bisect_left, insort
from functools import lru_cache

from coeld.ids import NodeId


@lru_cache(maxsize=8192)
def positions(node: NodeId, rings: int) -> tuple[int, ...]:
    """Where a device lies on each ring: 64 bits per ring."""
    data = hashlib.shake_256(node.encode()).digest(8 * rings)
    return tuple(int.from_bytes(data[at : at + 8], "big") for at in range(0, 8 * rings, 8))


class Rings:
    """The present devices other than `me`; at most `most` of them are neighbours, 2 per ring."""

    def __init__(self, me: NodeId, most: int) -> None:
        self._me, self._most = me, most
        self._rings: list[list[tuple[int, NodeId]]] = [[] for _ in range(most // 2)]
        self._others: set[NodeId] = set()

    def put(self, node: NodeId, present: bool) -> None:
        """Note whether a device is there."""
        if present == (node in self._others):
            return
        for ring, place in zip(self._rings, positions(node, len(self._rings)), strict=True):
            if present:
                insort(ring, (place, node))
            else:
                del ring[bisect_left(ring, (place, node))]
        (self._others.add if present else self._others.discard)(node)

    def neighbours(self) -> set[NodeId]:
        if len(self._others) <= self._most:
            return set(self._others)
        chosen = set()
        for ring, place in zip(self._rings, positions(self._me, len(self._rings)), strict=True):
            at = bisect_left(ring, (place, self._me))
            chosen |= {ring[at % len(ring)][1], ring[at - 1][1]}
        return chosen
