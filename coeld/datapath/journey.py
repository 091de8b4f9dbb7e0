"""A request's caches along its way, and what entered each leg: enough to mend the way in one place.

A *stage* is one leg of the way, or a piece of a leg here. Caches cannot move, but the rows that
entered a stage are kept by whoever decodes. So when a device is lost, only its layers are run
again, elsewhere, on the rows that entered them then, pass by pass as the first time (Petals keeps
the inputs of its servers' blocks for the same reason: Borzunov et al., 2023). All other stages keep
what they have cached and are skipped, and the bits are those of an undisturbed run.

A stage is also run again if the rows that come out of it are wanted and not known: where a leg of
the new way begins at a layer at which none began before.

Where nothing is lost, the same can be done *beside* the journey under way: what both have in common
they share, the rest catches up in a thread of its own (coeld.datapath.catch_up), and then the
request goes over. So a device that gives layers away can be left before it has. If the journey
under way is lost meanwhile, what has been caught up serves to mend it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from coeld.datapath.ports import Cache, PeerLink, Rows
from coeld.datapath.ways import Way
from coeld.ids import NodeId
from coeld.routes import Leg, RouteTable


class Kept:
    """The rows that entered a stage, by the tokens' positions."""

    def __init__(self) -> None:
        self.length = 0
        self._room: Rows = np.zeros((0, 0), np.float32)

    def put(self, x: Rows) -> None:
        """The rows of the next positions. Another thread may look at the former ones meanwhile."""
        at, length = self.length, self.length + len(x)
        if length > len(self._room):
            room = np.empty((2 * length, x.shape[1]), np.float32)
            if at:
                room[:at] = self._room[:at]
            self._room = room
        self._room[at:length] = x
        self.length = length

    def add(self, at: int, x: Rows) -> None:
        """What is not known yet of rows that follow `at` tokens, if there is no gap before."""
        if at <= self.length < at + len(x):
            self.put(x[self.length - at :])

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
    number: int
    """Names its caches at a peer."""
    cache: Cache | None
    """Keys and values, if the layers run here; may be shared with other stages."""
    kept: Kept
    """What entered it; nothing where tokens enter."""
    length: int = 0
    """Tokens that it has cached."""
    line: int = 0
    """Over which connection to its peer, which the caches there belong to."""
    asked: bool = False
    """Its peer may have caches for it."""
    lost: bool = False
    """Its device does not have them any more."""
    within: "Stage | None" = None
    """A stage of the journey under way that runs these layers too, in the same cache."""


NewStage = Callable[[Leg, Kept], Stage]
"""For a leg, without anything cached."""


class Journey:
    """Where the keys and values of one request are."""

    def __init__(self, way: Way, stages: Sequence[Stage], peers: PeerLink) -> None:
        self.way = way
        self.stages = stages
        self.length = min(stage.length for stage in stages)
        """Tokens that the next pass follows."""
        self.progress = 0
        """Tokens that have been all the way, on this journey or on one that it mends."""
        self.routes: RouteTable | None = None
        """The last that were looked at for another way."""
        self.peers = peers

    def advance(self) -> None:
        """After stages have run."""
        self.length = min(stage.length for stage in self.stages)
        self.progress = max(self.progress, self.length)

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

    def free(self, but: "Journey | None" = None) -> None:
        """Let all caches go but those that another journey goes on with, and those that are the
        journey's beside which this one is."""
        stages = but.stages if but is not None else ()
        numbers, spared = {s.number for s in stages}, {id(s.cache) for s in stages}
        for stage in self.stages:
            if stage.within is not None:
                continue
            if stage.cache is not None and id(stage.cache) not in spared:
                stage.cache.free()
            if stage.asked and stage.number not in numbers:
                self.peers.free(stage.leg.node, stage.number, stage.line)

    def part_from(self, other: "Journey") -> None:
        """The other is over; this one has what it needs of it."""
        for stage in self.stages:
            stage.within = None
        other.free(self)

    def follow(self, other: "Journey") -> bool:
        """Take over how far stages are that the other journey runs. True if all are that far."""
        for stage in self.stages:
            if stage.within is not None:
                stage.length = stage.within.length
        self.length = min(stage.length for stage in self.stages)
        self.progress = other.progress
        return self.length >= other.length


def mended(
    before: Journey,
    way: Way,
    legs: Sequence[Leg],
    me: NodeId,
    new: NewStage,
    ahead: Journey | None = None,
) -> Journey:
    """A journey along another way with whatever of the old one's caches lies on it; `legs` are that
    way with what runs here in pieces. `before` is over, and so is what was `ahead` beside it."""
    own = [] if ahead is None else [s for s in ahead.stages if s.within is None]
    made = _along(before, way, legs, me, new, own, back=True)
    made.part_from(before)
    if ahead is not None:
        ahead.free(made)
    return made


def beside(before: Journey, way: Way, legs: Sequence[Leg], me: NodeId, new: NewStage) -> Journey:
    """The same while `before` goes on: what would have to go back is not shared with it."""
    return _along(before, way, legs, me, new, (), back=False)


def _along(
    before: Journey,
    way: Way,
    legs: Sequence[Leg],
    me: NodeId,
    new: NewStage,
    own: Sequence[Stage],
    back: bool,
) -> Journey:
    """From the last stage to the first: how many tokens each may have cached so that the rows that
    the next one lacks are known, or come out when it runs the rest. `own` are stages of no journey
    that serve too."""
    old_stages = [*own, *before.stages]
    known = {stage.leg.first: stage.kept for stage in old_stages if stage.leg.first}
    stages: list[Stage] = []
    limit = before.progress
    for leg in reversed(legs):
        old, kept = _reusable(old_stages, leg, leg.node == me), known.get(leg.first, Kept())
        if old is not None and min(old.length, limit) >= (1 if back else old.length):
            length, asked = min(old.length, limit), old.asked
            stage = Stage(leg, old.number, old.cache, kept, length, old.line, asked, within=old)
        else:
            stage = new(leg, kept)
        stages.append(stage)
        limit = max(stage.length, kept.length)
    stages.reverse()
    made = Journey(way, stages, before.peers)
    made.progress = before.progress
    return made


def _reusable(stages: Sequence[Stage], leg: Leg, here: bool) -> Stage | None:
    """The stage whose caches serve for this one, if any; of several that with most in them."""

    def serves(stage: Stage) -> bool:
        inside = stage.leg.first <= leg.first and leg.stop <= stage.leg.stop
        there = not stage.lost and stage.leg.node == leg.node
        return there and (stage.leg == leg or (here and inside))

    return max(filter(serves, stages), key=lambda stage: stage.length, default=None)
