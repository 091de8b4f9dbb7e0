"""A request's caches along its way, and what entered each leg: enough to mend the way in one place.

A *stage* is one leg of the way, or a piece of a leg here. Caches cannot move, but the rows that
entered a stage are kept by whoever decodes. So when a device is lost, only its layers are run
again, elsewhere, on the rows that entered them then, pass by pass as the first time (Petals keeps
the inputs of its servers' blocks for the same reason: Borzunov et al., 2023). All other stages keep
what they have cached and are skipped, and the bits are those of an undisturbed run.

A stage is also run again if the rows that come out of it are wanted and not known: where a leg of
the new way begins at a layer at which none began before.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from coeld.datapath.ports import Cache, PeerLink, Rows
from coeld.datapath.ways import Way
from coeld.ids import NodeId
from coeld.routes import Leg


class Kept:
    """The rows that entered a stage, by the tokens' positions."""

    def __init__(self) -> None:
        self.length = 0
        self._room: Rows = np.zeros((0, 0), np.float32)

    def put(self, x: Rows) -> None:
        """The rows of the next positions."""
        at, self.length = self.length, self.length + len(x)
        if self.length > len(self._room):
            room = np.empty((2 * self.length, x.shape[1]), np.float32)
            if at:
                room[:at] = self._room[:at]
            self._room = room
        self._room[at : self.length] = x

    def get(self, at: int, count: int) -> Rows:
        assert at + count <= self.length
        return self._room[at : at + count]

    @property
    def bytes(self) -> int:
        return self._room.nbytes


@dataclass(slots=True)
class Stage:
    """Layers that one device runs in one go."""

    leg: Leg
    cache: Cache | None
    """Keys and values, if the layers run here; may be shared with other stages."""
    kept: Kept = field(default_factory=Kept)
    """What entered it; nothing where tokens enter."""
    length: int = 0
    """Tokens that it has cached."""
    lost: bool = False
    """Its device does not have them any more."""


class Journey:
    """Where the keys and values of one request are."""

    def __init__(self, way: Way, stages: Sequence[Stage], number: int, peers: PeerLink) -> None:
        self.way = way
        self.stages = stages
        self.number = number
        """Names the request at peers."""
        self.length = min(stage.length for stage in stages)
        """Tokens that the next pass follows."""
        self.progress = 0
        """Tokens that have been all the way, on this journey or on one that it mends."""
        self.asked: set[NodeId] = set()
        """Peers that may hold caches."""
        self.peers = peers

    def stop(self) -> int | None:
        """Where the next pass has to end at the latest, for some stage has cached the tokens up to
        there and is skipped; None: anywhere."""
        ahead = [stage.length for stage in self.stages if stage.length > self.length]
        return min(ahead, default=None)

    @property
    def behind(self) -> float:
        """The share of a whole replay that is left: layers times tokens."""
        todo = sum(
            (s.leg.stop - s.leg.first) * max(0, self.progress - s.length) for s in self.stages
        )
        return todo / max(1, self.progress * self.stages[-1].leg.stop)

    @property
    def bytes(self) -> int:
        caches = {id(stage.cache): stage.cache for stage in self.stages if stage.cache is not None}
        kept = sum(stage.kept.bytes for stage in self.stages)
        return kept + sum(cache.bytes for cache in caches.values())

    def lose(self, node: NodeId) -> None:
        """A device's connection is gone, and its caches with it."""
        for stage in self.stages:
            stage.lost |= stage.leg.node == node

    def free(self, kept: Collection[Stage] = ()) -> None:
        """Let all caches go but those that the stages of another journey go on with."""
        spared = {id(stage.cache) for stage in kept}
        for stage in self.stages:
            if stage.cache is not None and id(stage.cache) not in spared:
                stage.cache.free()
        for node in self.asked - {stage.leg.node for stage in kept}:
            self.peers.free(node, self.number)
            self.asked.discard(node)


def mended(
    before: Journey,
    way: Way,
    legs: Sequence[Leg],
    me: NodeId,
    new_cache: Callable[[range], Cache],
) -> Journey:
    """A journey along another way with whatever of the old one's caches lies on it; `legs` are that
    way with what runs here in pieces. `before` is over.

    From the last stage to the first: how many tokens each may have cached so that the rows that the
    next one lacks are known, or come out when it runs the rest.
    """
    known = {stage.leg.first: stage.kept for stage in before.stages[1:]}
    stages: list[Stage] = []
    limit = before.progress
    for leg in reversed(legs):
        old, kept = _reusable(before, leg, leg.node == me), known.get(leg.first, Kept())
        if old is not None:
            stage = Stage(leg, old.cache, kept, min(old.length, limit))
        else:
            cache = new_cache(range(leg.first, leg.stop)) if leg.node == me else None
            stage = Stage(leg, cache, kept)
        stages.append(stage)
        limit = min(before.progress, max(stage.length, kept.length))
    stages.reverse()
    made = Journey(way, stages, before.number, before.peers)
    made.progress, made.asked = before.progress, before.asked
    before.free(stages)
    return made


def _reusable(before: Journey, leg: Leg, here: bool) -> Stage | None:
    """The stage whose caches serve for this one."""
    for stage in before.stages:
        if not stage.lost and stage.leg.node == leg.node:
            inside = stage.leg.first <= leg.first and leg.stop <= stage.leg.stop
            if stage.leg == leg or (here and inside):
                return stage
    return None
