"""The decoder: tokens in, logits out, leg by leg along a request's way.

A leg here is run at once; one elsewhere is a call to its device, which keeps the keys and values of
its layers, and rows go there and come back: the residual stream. A request goes over to the way of
newer tables between two tokens. Until then it keeps its own, unless that cannot be followed: a
device does not answer, was restarted, serves that span no longer, or its answer is late. Then the
journey ends in LegLost and the scheduler begins another that mends it: only what was lost is run
again, on the rows that are kept of it (coeld.datapath.journey). The device is left out for LOST_S,
in which its legs run here, cut by cut. One that refused is left out no longer than until there is a
new table, REFUSED_S later at the earliest: it is alive, and only the routes were out of date.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Final

import numpy as np

from coeld.datapath.costs import layers_work, reach_work
from coeld.datapath.dispatch import Dispatcher
from coeld.datapath.frames import POSITION_MAX, SpanCall
from coeld.datapath.journey import Journey, Kept, Stage, beside, mended
from coeld.datapath.legs import run_leg
from coeld.datapath.ports import Cache, Lane, Rows
from coeld.datapath.quality import Quality
from coeld.datapath.request import LegLost, Request
from coeld.datapath.uses import Uses
from coeld.datapath.ways import Way, way_of
from coeld.errors import CacheLost, PeerError, PeerRefused
from coeld.ids import NodeId
from coeld.routes import Leg, RouteTable

LOST_S: Final = 3.0
"""As long as the swarm takes to name a dead device's successors."""
REFUSED_S: Final = 0.3
"""As long as news of what a device serves takes."""
NEWS_S: Final = 0.05
"""That the agent gets to name another way before the next attempt: a failed one takes a second."""
SWITCH_S_MAX: Final = 1.0
"""The longest wait for what is missing on a way while there is another."""
SETTLED_S: Final = 0.3
"""After new routes, before a request that is well goes over to their way."""
NOTHING: Final[Rows] = np.zeros((0, 0), np.float32)


class Decoder:
    """Runs requests. One thread."""

    def __init__(
        self,
        lane: Lane,
        dispatcher: Dispatcher,
        layers: int,
        new_cache: Callable[[Iterable[int]], Cache],
    ) -> None:
        self.uses = Uses(layers, dispatcher.experts)
        """Of the experts, by all requests."""
        self.costs = dispatcher.costs
        self._lane = lane
        self._dispatcher = dispatcher
        self._layers = layers
        self._new_cache = new_cache
        self._no_cache = new_cache(())
        self._numbers = 0
        self._lost_at: dict[NodeId, tuple[float, RouteTable | None]] = {}
        """When devices failed; those that refused with the table that had named them."""

    def depart(self, before: Journey | None = None) -> Journey:
        """Begin a journey along the present way, with what is left of the one that was lost."""
        way, me = self.way(), self._dispatcher.me
        if before is not None:
            return mended(before, way, self._pieces(way, before), me, self._stage)
        mine = [leg for leg in way if leg.node == me]
        here = self._new_cache(layer for leg in mine for layer in range(leg.first, leg.stop))
        stages = [self._stage(leg, Kept(), here) for leg in way]
        return Journey(way, stages, self._dispatcher.peers)

    def aside(self, journey: Journey) -> Journey | None:
        """A journey along the way of the present routes, to catch up beside one that goes on and
        to go over to. None: there is no other way, or none yet that can be relied on."""
        board = self._dispatcher.board
        if board.table is journey.routes or time.monotonic() - board.pinned_s < SETTLED_S:
            return None
        way = self._planned()
        if way is None or self._lost_at:
            return None
        journey.routes = board.table
        if way == journey.way:
            return None
        legs = self._pieces(way, journey)
        return beside(journey, way, legs, self._dispatcher.me, self._stage)

    def _stage(self, leg: Leg, kept: Kept, here: Cache | None = None) -> Stage:
        self._numbers = (self._numbers + 1) % (1 << 32)
        if leg.node == self._dispatcher.me:
            here = self._new_cache(range(leg.first, leg.stop)) if here is None else here
        else:
            here = None
        return Stage(leg, self._numbers, here, kept)

    def _pieces(self, way: Way, before: Journey) -> list[Leg]:
        """The way's legs, those here cut where stages of the old way begin and end, if graphs do:
        what is between them is kept or run again as a whole."""
        borders = {border for s in before.stages for border in (s.leg.first, s.leg.stop)}
        found: list[Leg] = []
        for leg in way:
            cuts = sorted(border for border in borders if leg.first < border < leg.stop)
            pieces = [Leg(leg.node, *ends) for ends in pairwise((leg.first, *cuts, leg.stop))]
            mine = leg.node == self._dispatcher.me
            fits = mine and all(
                self._lane.can_run(piece.first, piece.stop, piece.stop == self._layers)
                for piece in pieces
            )
            found += pieces if fits else [leg]
        return found

    def forward(
        self, journey: Journey, tokens: Sequence[int], rows: Sequence[int], request: Request
    ) -> Rows:
        """Append `tokens` to the caches; logits (len(rows), V) of the given rows, valid until the
        next pass. None at all where the last stage is skipped: they were known before.

        Raises NotCovered when a cut layer's experts stay without an owner and Cancelled when the
        request was cancelled while waiting; LegLost when the journey is over.
        """
        errand = _Errand(self, journey, request)
        at, count = journey.length, len(tokens)
        request.quality.begin(count, self._layers, *self._places(journey.way, request.quality))
        x: Rows | None = None
        for index, stage in enumerate(journey.stages):
            if stage.length > at:
                assert stage.length >= at + count, "see Journey.stop"
                x = None
                continue
            if index == 0:
                x = self._lane.embed(tokens)
            elif x is None:
                x = stage.kept.get(at, count)
            elif at <= stage.kept.length < at + count:
                stage.kept.put(x[stage.kept.length - at :])
            x = self._run(journey, stage, x, rows, errand)
            stage.length = at + count
        journey.length = at + count
        journey.progress = max(journey.progress, journey.length)
        return NOTHING if x is None else x

    def _run(
        self, journey: Journey, stage: Stage, x: Rows, rows: Sequence[int], errand: "_Errand"
    ) -> Rows:
        """One stage, and the head after the last."""
        leg, count = stage.leg, len(x)
        last = leg.stop == self._layers
        if stage.cache is not None:
            stage.cache.length = journey.length
            out = self._here(stage.cache, x, leg, rows if last else (), errand)
            stage.cache.length += count
            return out
        keep = count - min(rows) if last else count
        out = self._elsewhere(journey, stage, x, keep, errand)
        if not last:
            return out
        there = [row - count + keep for row in rows]
        return self._here(self._no_cache, out, Leg(leg.node, leg.stop, leg.stop), there, errand)

    def _here(
        self, cache: Cache, x: Rows, leg: Leg, rows: Sequence[int], errand: "_Errand"
    ) -> Rows:
        lane, dispatcher = self._lane, self._dispatcher
        try:
            return run_leg(lane, dispatcher, cache, x, leg.first, leg.stop, rows, errand, self.uses)
        except PeerRefused as exc:
            raise LegLost(str(exc)) from exc

    def _places(self, way: Way, quality: Quality) -> tuple[int, int]:
        """Where rows of a pass may leave this device: cuts, and legs elsewhere. None of an exact
        one are counted."""
        if quality.kl_budget <= 0:
            return 0, 0
        mine = [leg for leg in way if leg.node == self._dispatcher.me]
        cuts = sum(self._dispatcher.shared(range(leg.first, leg.stop)) for leg in mine)
        return cuts, len(way) - len(mine)

    def _elsewhere(
        self, journey: Journey, stage: Stage, x: Rows, keep: int, errand: "_Errand"
    ) -> Rows:
        leg, table = stage.leg, self._dispatcher.board.table
        address = table.addresses.get(leg.node) if table is not None else None
        if address is None:
            journey.lose(leg.node)
            raise LegLost(f"{leg.node} is not in the route table any more")
        asked = SpanCall(stage.number, journey.length, leg.first, leg.stop, keep)
        assert asked.position + len(x) <= POSITION_MAX
        stage.asked = True
        started_s = time.monotonic()
        try:
            errors = errand.quality.hop_errors()
            reply = self._dispatcher.peers.span(leg.node, address, asked, x, errors)
            rows = reply.result()
        except PeerError as exc:
            refused, peers = isinstance(exc, PeerRefused), self._dispatcher.peers
            if not isinstance(exc, CacheLost) and (refused or not peers.another_way(leg.node)):
                self._lost_at[leg.node] = time.monotonic(), table if refused else None
            stage.lost = True
            if not refused:  # who refuses is alive
                journey.lose(leg.node)
                version = self._dispatcher.board.version
                self._dispatcher.on_failure(leg.node, exc)
                self._dispatcher.board.wait(version, NEWS_S)
            raise LegLost(str(exc)) from exc
        split, traffic = errand.split, reply.traffic
        took_s, computed_s = time.monotonic() - started_s, reply.computed_us / 1e6
        split.away(took_s, computed_s)
        if len(x) == 1:
            self.costs.note(layers_work(leg.stop - leg.first, leg.node), computed_s)
            self.costs.note(reach_work(leg.node), took_s - computed_s)
        split.sent_bytes += traffic.sent_bytes
        split.received_bytes += traffic.received_bytes
        errand.quality.count_hop(traffic, len(x), x.size + rows.size)
        return rows

    def way(self) -> Way:
        """The table's way, or all layers here while there are no graphs for it."""
        return self._planned() or (Leg(self._dispatcher.me, 0, self._layers),)

    def _planned(self) -> Way | None:
        """The table's way; None while this device's graphs do not fit its legs (they are being
        built)."""
        now = time.monotonic()
        me, layers = self._dispatcher.me, self._layers
        table = self._dispatcher.board.table
        for node, (at, refused_by) in list(self._lost_at.items()):
            stale = refused_by is not None and refused_by is not table
            if now - at >= (REFUSED_S if stale else LOST_S):
                del self._lost_at[node]
        way = way_of(table, me, layers, self._lost_at.keys())
        parts = [(leg.first, leg.stop, leg.stop == layers) for leg in way if leg.node == me]
        if way[-1].node != me:
            parts.append((layers, layers, True))
        fits = all(self._lane.can_run(*part) for part in parts)
        return way if fits else None


class _Errand:
    """One pass of a request, while it waits for experts."""

    def __init__(self, decoder: Decoder, journey: Journey, request: Request) -> None:
        self._decoder, self._journey, self._request = decoder, journey, request
        self.stalls_s, self.split = request.stalls_s, request.split
        self.quality = request.quality
        self._since_s: float | None = None

    def check(self) -> None:
        """There may be a way by now on which nothing is missing: the routes have changed, or this
        request set out before graphs were ready that are ready now. As layers that were closed may
        open in a moment, that is waited for half as long as going another way may take."""
        self._request.check()
        now_s = time.monotonic()
        self._since_s = now_s if self._since_s is None else self._since_s
        patience_s = min(SWITCH_S_MAX, self._request.replay_s / 2)
        if self._journey is not self._request.journey:
            raise LegLost("nothing waits for a way that is not taken yet")
        if now_s - self._since_s >= patience_s and self._decoder.way() != self._journey.way:
            raise LegLost("the way has changed")
