"""The decoder: tokens in, logits out, leg by leg along a request's way.

A leg here is run at once; one elsewhere is a call to its device, which keeps the keys and values of
its layers, and rows go there and come back: the residual stream. A request keeps the way it
set out on, whatever newer tables say, until it cannot be followed: a device does not answer, was
restarted, serves that span no longer, or its answer is late. Then the whole journey ends in LegLost
and the scheduler begins another from the request's tokens; the device is left out for LOST_S, in
which its legs run here, cut by cut.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from coeld.datapath.costs import layers_work, reach_work
from coeld.datapath.dispatch import Dispatcher
from coeld.datapath.frames import POSITION_MAX, SpanCall
from coeld.datapath.journey import Journey
from coeld.datapath.legs import run_leg
from coeld.datapath.ports import Cache, Lane, Rows
from coeld.datapath.quality import Quality
from coeld.datapath.request import LegLost, Request
from coeld.datapath.uses import Uses
from coeld.datapath.ways import Way, way_of
from coeld.errors import CacheLost, PeerError, PeerRefused
from coeld.ids import NodeId
from coeld.routes import Leg

LOST_S: Final = 3.0
"""As long as the swarm takes to name a dead device's successors."""


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
        self._numbers = 0
        self._lost_at: dict[NodeId, float] = {}

    def depart(self) -> Journey:
        """Begin a journey along the present way."""
        way = self.way()
        mine = [leg for leg in way if leg.node == self._dispatcher.me]
        here = self._new_cache(layer for leg in mine for layer in range(leg.first, leg.stop))
        self._numbers = (self._numbers + 1) % (1 << 32)
        return Journey(way, here, self._numbers, self._dispatcher.peers)

    def forward(
        self, journey: Journey, tokens: Sequence[int], rows: Sequence[int], request: Request
    ) -> Rows:
        """Append `tokens` to the caches; logits (len(rows), V) of the given rows, valid until the
        next pass.

        Raises NotCovered when a cut layer's experts stay without an owner and Cancelled when the
        request was cancelled while waiting; LegLost when the journey is over.
        """
        errand = _Errand(self, journey, request)
        here, count = journey.here, len(tokens)
        request.quality.begin(count, self._layers, *self._places(journey.way, request.quality))
        x = self._lane.embed(tokens)
        for leg in journey.way:
            last = leg.stop == self._layers
            if leg.node != self._dispatcher.me:
                keep = count - min(rows) if last else count
                x = self._elsewhere(journey, leg, x, keep, errand)
                if last:
                    there = [row - count + keep for row in rows]
                    x = self._here(here, x, Leg(leg.node, leg.stop, leg.stop), there, errand)
            else:
                x = self._here(here, x, leg, rows if last else (), errand)
        here.length += count
        return x

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

    def _elsewhere(self, journey: Journey, leg: Leg, x: Rows, keep: int, errand: "_Errand") -> Rows:
        table = self._dispatcher.board.table
        address = table.addresses.get(leg.node) if table is not None else None
        if address is None:
            raise LegLost(f"{leg.node} is not in the route table any more")
        asked = SpanCall(journey.number, journey.here.length, leg.first, leg.stop, keep)
        assert asked.position + len(x) <= POSITION_MAX
        journey.asked.add(leg.node)
        started_s = time.monotonic()
        try:
            errors = errand.quality.hop_errors()
            reply = self._dispatcher.peers.span(leg.node, address, asked, x, errors)
            rows = reply.result()
        except PeerError as exc:
            refused, peers = isinstance(exc, PeerRefused), self._dispatcher.peers
            if not isinstance(exc, CacheLost) and (refused or not peers.another_way(leg.node)):
                self._lost_at[leg.node] = time.monotonic()
            if not refused:  # who refuses is alive
                self._dispatcher.on_failure(leg.node, exc)
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
        """The table's way, or all layers here while this device's graphs do not fit the way's legs
        (they are being built)."""
        now = time.monotonic()
        self._lost_at = {n: at for n, at in self._lost_at.items() if now - at < LOST_S}
        me, layers = self._dispatcher.me, self._layers
        table = self._dispatcher.board.table
        way = way_of(table, me, layers, self._lost_at.keys())
        parts = [(leg.first, leg.stop, leg.stop == layers) for leg in way if leg.node == me]
        if way[-1].node != me:
            parts.append((layers, layers, True))
        fits = all(self._lane.can_run(*part) for part in parts)
        return way if fits else (Leg(me, 0, layers),)


class _Errand:
    """One pass of a request, while it waits for experts."""

    def __init__(self, decoder: Decoder, journey: Journey, request: Request) -> None:
        self._decoder, self._journey, self._request = decoder, journey, request
        self.stalls_s, self.split = request.stalls_s, request.split
        self.quality = request.quality

    def check(self) -> None:
        """There may be a way by now on which nothing is missing: the routes have changed, or this
        request set out before graphs were ready that are ready now."""
        self._request.check()
        if self._decoder.way() != self._journey.way:
            raise LegLost("the way has changed")
