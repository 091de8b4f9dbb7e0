"""Whose broker to listen to: everyone in a small swarm, a bounded set in a large one. Pure.

Half of the bounded set are the next devices on a ring ordered by a hash of their ids: following
those alone reaches everybody, so the graph is connected. The other half is random, which makes
its diameter small. A choice is kept while the device lives.
"""

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from random import Random

from coeld.ids import NodeId


@lru_cache(maxsize=4096)
def ring_position(node: NodeId) -> bytes:
    return hashlib.sha256(node.encode()).digest()


def choose(
    me: NodeId, alive: Iterable[NodeId], chosen: set[NodeId], most: int, rng: Random
) -> set[NodeId]:
    """The devices to listen to; `chosen` is the choice before."""
    others = sorted(alive, key=ring_position)
    if len(others) <= most:
        return set(others)
    mine = ring_position(me)
    after = [node for node in others if ring_position(node) > mine]
    ring = (after + others)[: most // 2]
    kept = [node for node in others if node in chosen and node not in ring]
    rest = [node for node in others if node not in chosen and node not in ring]
    random = (kept + rng.sample(rest, len(rest)))[: most - len(ring)]
    return {*ring, *random}
