"""Passes of a request's tokens along a journey, stage by stage. One thread each.

A leg here is run at once; one elsewhere is a call to its device, which keeps the keys and values of
its layers, and rows go there and come back: the residual stream. A pass that cannot be finished (a
device does not answer, was restarted, serves that span no longer) ends in LegLost; what its stages
have cached by then stays, and the rows that entered them are kept (coeld.datapath.journey).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np

from coeld.datapath.costs import layers_work, reach_work
from coeld.datapath.dispatch import Dispatcher
from coeld.datapath.frames import POSITION_MAX, SpanCall
from coeld.datapath.journey import Journey, Stage
from coeld.datapath.legs import run_leg
from coeld.datapath.ports import Cache, Lane, Reply, Rows, Waiter
from coeld.datapath.quality import Quality
from coeld.datapath.request import LegLost
from coeld.datapath.split import Split
from coeld.datapath.uses import Uses
from coeld.errors import CacheLost, PeerError, PeerRefused
from coeld.ids import NodeId
from coeld.routes import Leg

NEWS_S: Final = 0.05
"""That the agent gets to name another way before the next attempt: a failed one takes a second."""
NOTHING: Final[Rows] = np.zeros((0, 0), np.float32)


class Errand(Waiter, Protocol):
    """Whose tokens these are, and for how long they wait."""

    def rows_of(self, reply: Reply, leg: Leg, rows: int) -> Rows:
        """What a peer answers to `rows` rows. Raises PeerError, and LegLost when there is something
        better to do than to wait."""
        ...


@dataclass(slots=True)
class Apart:
    """An errand that runs beside others of its request, and is counted apart."""

    check: Callable[[], None]
    quality: Quality
    split: Split = field(default_factory=Split)
    stalls_s: list[float] = field(default_factory=list)

    def rows_of(self, reply: Reply, _leg: Leg, _rows: int) -> Rows:
        return reply.result()


class Walker:
    """See the module."""

    def __init__(
        self,
        lane: Lane,
        dispatcher: Dispatcher,
        layers: int,
        no_cache: Cache,
        leave_out: Callable[[NodeId, bool], None],
        uses: Uses | None,
    ) -> None:
        """`no_cache` is one without layers, for the head. `leave_out` is told of devices that
        failed, and whether they only refused; `uses` counts the experts that are chosen."""
        self.lane = lane
        self._dispatcher, self._layers = dispatcher, layers
        self._no_cache, self._leave_out, self._uses = no_cache, leave_out, uses

    def forward(
        self, journey: Journey, tokens: Sequence[int], rows: Sequence[int], errand: Errand
    ) -> Rows:
        """Append `tokens` to the caches; logits (len(rows), V) of the given rows, valid until the
        next pass. None of use where no rows are named, nor where the last stage is skipped: they
        were known before.

        Raises NotCovered when a cut layer's experts stay without an owner, LegLost when the journey
        cannot go on, and what the errand raises while it waits.
        """
        at, count = journey.length, len(tokens)
        self.begin(journey, count, errand.quality)
        x: Rows | None = None
        for index, stage in enumerate(journey.stages):
            if stage.length > at:
                assert stage.length >= at + count, "see Journey.stop"
                x = None
                continue
            if index == 0:
                x = self.lane.embed(tokens)
            elif x is None:
                x = stage.kept.get(at, count)
            else:
                stage.kept.add(at, x)
            x = self._run(journey, stage, at, x, rows, errand)
            stage.length = at + count
        journey.advance()
        return NOTHING if x is None else x

    def begin(self, journey: Journey, count: int, quality: Quality) -> None:
        """Tell how many tokens a pass has, and how often rows may leave this device: at cuts, and
        for legs elsewhere. None of an exact one are counted."""
        cuts = hops = 0
        if quality.kl_budget > 0:
            mine = [leg for leg in journey.way if leg.node == self._dispatcher.me]
            cuts = sum(self._dispatcher.shared(range(leg.first, leg.stop)) for leg in mine)
            hops = len(journey.way) - len(mine)
        quality.begin(count, self._layers, cuts, hops)

    def _run(
        self, journey: Journey, stage: Stage, at: int, x: Rows, rows: Sequence[int], errand: Errand
    ) -> Rows:
        """One stage, and the head after the last."""
        if stage.cache is not None:
            return self.here(stage, at, x, rows, errand)
        last = stage.leg.stop == self._layers
        keep = self.keep(stage, len(x), rows)
        out = self.elsewhere(journey, stage, at, x, keep, errand)
        return self.head(out, len(x), rows, errand) if last and rows else out

    def keep(self, stage: Stage, count: int, rows: Sequence[int]) -> int:
        """How many of the last of `count` rows have to come out of a stage."""
        return count - min(rows, default=count - 1) if stage.leg.stop == self._layers else count

    def here(self, stage: Stage, at: int, x: Rows, rows: Sequence[int], errand: Errand) -> Rows:
        """A stage of this device, on rows x (n, H) that follow `at` tokens: the residual stream,
        or logits after the last layer."""
        leg, cache = stage.leg, stage.cache
        assert cache is not None
        wanted = rows or (len(x) - 1,)  # the last graph has the head in it
        cache.length = at
        out = self._leg(cache, x, leg, wanted if leg.stop == self._layers else (), errand)
        cache.length += len(x)
        return out

    def head(self, out: Rows, count: int, rows: Sequence[int], errand: Errand) -> Rows:
        """The logits (len(rows), V) of a pass of `count` rows whose last ones, `out` (n, H), have
        come out of the last layer elsewhere."""
        there = [row - count + len(out) for row in rows]
        end = Leg(self._dispatcher.me, self._layers, self._layers)
        return self._leg(self._no_cache, out, end, there, errand)

    def _leg(self, cache: Cache, x: Rows, leg: Leg, rows: Sequence[int], errand: Errand) -> Rows:
        lane, dispatcher = self.lane, self._dispatcher
        try:
            return run_leg(
                lane, dispatcher, cache, x, leg.first, leg.stop, rows, errand, self._uses
            )
        except PeerRefused as exc:
            raise LegLost(str(exc)) from exc

    def elsewhere(
        self, journey: Journey, stage: Stage, at: int, x: Rows, keep: int, errand: Errand
    ) -> Rows:
        """A stage of another device, on rows x (n, H) that follow `at` tokens: the residual stream
        (keep, H). Raises LegLost. Any thread, but each line only one at a time."""
        leg, table = stage.leg, self._dispatcher.board.table
        address = table.addresses.get(leg.node) if table is not None else None
        if address is None:
            journey.lose(leg.node)
            raise LegLost(f"{leg.node} is not in the route table any more")
        asked = SpanCall(stage.number, at, leg.first, leg.stop, keep)
        assert asked.position + len(x) <= POSITION_MAX
        stage.asked = True
        started_s = time.monotonic()
        try:
            errors, peers = errand.quality.hop_errors(), self._dispatcher.peers
            reply = peers.span(leg.node, address, asked, x, errors, stage.line)
            rows = errand.rows_of(reply, leg, len(x))
        except PeerError as exc:
            self._failed(journey, stage, exc)
            raise LegLost(str(exc)) from exc
        split, traffic = errand.split, reply.traffic
        took_s, computed_s = time.monotonic() - started_s, reply.computed_us / 1e6
        split.away(took_s, computed_s)
        costs = self._dispatcher.costs
        if len(x) == 1 and costs.listening:
            costs.note(layers_work(leg.stop - leg.first, leg.node), computed_s)
            costs.note(reach_work(leg.node), took_s - computed_s)
        split.sent_bytes += traffic.sent_bytes
        split.received_bytes += traffic.received_bytes
        errand.quality.count_hop(traffic, len(x), x.size + rows.size)
        return rows

    def _failed(self, journey: Journey, stage: Stage, error: PeerError) -> None:
        node, refused, dispatcher = stage.leg.node, isinstance(error, PeerRefused), self._dispatcher
        if not isinstance(error, CacheLost) and (refused or not dispatcher.peers.another_way(node)):
            self._leave_out(node, refused)
        stage.lost = True
        if not refused:  # who refuses is alive
            journey.lose(node)
            version = dispatcher.board.version
            dispatcher.on_failure(node, error)
            dispatcher.board.wait(version, NEWS_S)
