"""The decoder: along which way a request's tokens go, and when they take another.

A request goes over to the way of newer tables between two tokens, when another journey has caught
up (coeld.datapath.catch_up). Until then it keeps its own, unless that cannot be followed: a device
does not answer, was restarted, serves that span no longer, or its answer is late. Then the journey
ends in LegLost and the scheduler begins another that mends it: only what was lost is run again, on
the rows that are kept of it (coeld.datapath.journey). The device is left out for LOST_S, in which
another that serves the same span runs its legs, or else this one, cut by cut. One that refused is
left out no longer than until there is a new table, REFUSED_S later at the earliest: it is alive,
and only the routes were out of date.

A token's call to a leg that takes much longer than usual is not waited for until its deadline:
meanwhile a journey around that device catches up, if others serve its layers, and if it is there
first it is taken.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Final

from coeld.datapath.catch_up import CatchUp
from coeld.datapath.dispatch import Dispatcher
from coeld.datapath.journey import Journey, Kept, Stage, beside, mended
from coeld.datapath.pace import Pace
from coeld.datapath.pipeline import wave, worthwhile
from coeld.datapath.ports import Cache, Lane, Reply, Rows
from coeld.datapath.request import LegLost, Request
from coeld.datapath.uses import Uses
from coeld.datapath.walker import Walker
from coeld.datapath.ways import Way, way_of
from coeld.ids import Lot, NodeId
from coeld.routes import Leg, RouteTable

LOST_S: Final = 3.0
"""As long as the swarm takes to name a dead device's successors."""
REFUSED_S: Final = 0.3
"""As long as news of what a device serves takes."""
SWITCH_S_MAX: Final = 1.0
"""The longest wait for what is missing on a way while there is another."""
SETTLED_S: Final = 0.3
"""After new routes, before a request that is well goes over to their way."""
LATE_S_MIN: Final = 0.25
"""A leg's answer that comes sooner is not late, whatever is usual: schedulers make such pauses."""
LATE_AGAIN_S: Final = 5.0
"""After another way was looked for in vain, before the next time."""
LOOK_S: Final = 0.02
"""Between two looks at which is ready first."""
LEGS_KNOWN_MAX: Final = 64
NUMBER_MAX: Final = (1 << 32) - 1
"""Of the protocol's field."""


class Decoder:
    """Runs requests. One thread."""

    def __init__(
        self,
        new_lane: Callable[[], Lane],
        dispatcher: Dispatcher,
        layers: int,
        new_cache: Callable[[Iterable[int]], Cache],
    ) -> None:
        self.uses = Uses(layers, dispatcher.experts)
        """Of the experts, by all requests."""
        self.costs = dispatcher.costs
        self._dispatcher = dispatcher
        self._layers = layers
        self._new_lane, self._new_cache = new_lane, new_cache
        self._no_cache = new_cache(())
        self._walker = self._new_walker(self.uses)
        self._numbers = 0
        self._lost_at: dict[NodeId, tuple[float, RouteTable | None]] = {}
        """When devices failed; those that refused with the table that had named them."""
        self._paces: dict[Leg, Pace] = {}
        """What a token's call to a leg usually takes."""

    def _new_walker(self, uses: Uses | None) -> Walker:
        return Walker(
            self._new_lane(),
            self._dispatcher,
            self._layers,
            self._no_cache,
            self.leave_out,
            uses,
        )

    def depart(self, before: Journey | None = None, ahead: Journey | None = None) -> Journey:
        """Begin a journey along the present way, with what is left of the one that was lost and of
        one that was catching up beside it."""
        way, me = self.way(), self._dispatcher.me
        if before is not None:
            return mended(before, way, self._pieces(way, before), me, self._stage, ahead)
        mine = [leg for leg in way if leg.node == me]
        here = self._new_cache(layer for leg in mine for layer in range(leg.first, leg.stop))
        stages = [self._stage(leg, Kept(), here) for leg in way]
        return Journey(way, stages, self._dispatcher.peers)

    def aside(self, request: Request) -> CatchUp | None:
        """Let a journey along the way of the present routes catch up. None: there is no other way,
        or none yet that can be relied on."""
        board, journey = self._dispatcher.board, request.journey
        assert journey is not None
        if board.table is journey.routes or time.monotonic() - board.pinned_s < SETTLED_S:
            return None
        way = self._planned()
        if way is None or self._lost_at:
            return None
        journey.routes = board.table
        return None if way == journey.way else self._catch_up(request, journey, way, None)

    def around(self, request: Request, late: Leg) -> CatchUp | None:
        """Let a journey around a leg's device catch up. None: nobody else serves its layers."""
        table, journey = self._dispatcher.board.table, request.journey
        assert journey is not None
        if table is None:
            return None
        layers, experts = range(late.first, late.stop), range(self._dispatcher.experts)
        owners = (table.owners.get(Lot(n, expert), ()) for n in layers for expert in experts)
        if any(set(nodes) <= {late.node} for nodes in owners):
            return None
        way = self._planned(late.node)
        return None if way is None else self._catch_up(request, journey, way, late.node)

    def _catch_up(
        self, request: Request, journey: Journey, way: Way, around: NodeId | None
    ) -> CatchUp:
        legs, me = self._pieces(way, journey), self._dispatcher.me
        stage = partial(self._stage, line=self._number())
        ahead = beside(journey, way, legs, me, stage)
        return CatchUp(self._new_walker(None), request, ahead, around)

    def _number(self) -> int:
        """None is given twice while it is in use. Never 0."""
        self._numbers = self._numbers % NUMBER_MAX + 1
        return self._numbers

    def _stage(self, leg: Leg, kept: Kept, here: Cache | None = None, line: int = 0) -> Stage:
        if leg.node == self._dispatcher.me:
            here = self._new_cache(range(leg.first, leg.stop)) if here is None else here
        else:
            here = None
        return Stage(leg, self._number(), here, kept, line=line)

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
                self._walker.lane.can_run(piece.first, piece.stop, piece.stop == self._layers)
                for piece in pieces
            )
            found += pieces if fits else [leg]
        return found

    def forward(
        self, journey: Journey, tokens: Sequence[int], rows: Sequence[int], request: Request
    ) -> Rows:
        """Append `tokens` to the caches; logits (len(rows), V) of the given rows, valid until the
        next pass. None of use where no rows are named, nor where the last stage is skipped: they
        were known before.

        Raises NotCovered when a cut layer's experts stay without an owner and Cancelled when the
        request was cancelled while waiting; LegLost when the journey is over.
        """
        return self._walker.forward(journey, tokens, rows, _Errand(self, journey, request))

    def prefill(self, journey: Journey, request: Request) -> Rows | None:
        """The next step of a prompt that goes through several devices at once; its logits (1, V)
        after the last. None: it is to go its way chunk by chunk. Raises what `forward` does."""
        if not worthwhile(journey, request):
            return None
        return wave(self._walker, journey, request, _Errand(self, journey, request))

    def leave_out(self, node: NodeId, refused: bool) -> None:
        """It has failed, or has only refused. Any thread."""
        table = self._dispatcher.board.table if refused else None
        self._lost_at[node] = time.monotonic(), table

    def late_s(self, leg: Leg) -> float | None:
        """From when on a token's call there is late; None: never measured."""
        pace = self._paces.get(leg)
        return None if pace is None else max(LATE_S_MIN, pace.late_s)

    def took(self, leg: Leg, took_s: float) -> None:
        """A token's call there was answered."""
        now_s, pace = time.monotonic(), self._paces.get(leg)
        if pace is not None:
            pace.add(took_s, now_s)
            return
        if len(self._paces) >= LEGS_KNOWN_MAX:
            self._paces.clear()
        self._paces[leg] = Pace(took_s, took_s / 2, now_s)

    def way(self) -> Way:
        """The table's way, or all layers here while there are no graphs for it."""
        return self._planned() or (Leg(self._dispatcher.me, 0, self._layers),)

    def _planned(self, *late: NodeId) -> Way | None:
        """The table's way, around devices that failed or are late; None while this device's graphs
        do not fit its legs (they are being built)."""
        now = time.monotonic()
        me, layers = self._dispatcher.me, self._layers
        table = self._dispatcher.board.table
        for node, (at, refused_by) in list(self._lost_at.items()):
            stale = refused_by is not None and refused_by is not table
            if now - at >= (REFUSED_S if stale else LOST_S):
                del self._lost_at[node]
        way = way_of(table, me, layers, {*self._lost_at, *late})
        parts = [(leg.first, leg.stop, leg.stop == layers) for leg in way if leg.node == me]
        if way[-1].node != me:
            parts.append((layers, layers, True))
        fits = all(self._walker.lane.can_run(*part) for part in parts)
        return way if fits else None


class _Errand:
    """One pass of a request, while it waits for experts or for a leg elsewhere."""

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

    def rows_of(self, reply: Reply, leg: Leg, rows: int) -> Rows:
        """Of a late answer and a way around who owes it what is ready first."""
        request, decoder = self._request, self._decoder
        if rows > 1 or self._journey is not request.journey or request.astray:
            return reply.result()
        began_s, late_s = time.monotonic(), decoder.late_s(leg)
        late = late_s is not None and not reply.ready(late_s)
        if late and self._overtaken(reply, leg):
            reply.give_up()
            self._journey.lose(leg.node)
            decoder.leave_out(leg.node, False)
            raise LegLost(f"{leg.node} is late, and others are ready to run its layers")
        found = reply.result()  # if there is none, what has caught up serves to mend the way
        decoder.took(leg, time.monotonic() - began_s)
        if (catching := request.catching) is not None and catching.around is not None:
            catching.abandon()
            request.catching = None
            request.patient_until_s = time.monotonic() + LATE_AGAIN_S
        return found

    def _overtaken(self, reply: Reply, late: Leg) -> bool:
        """Wait for the answer, or until there is another way that has caught up."""
        request = self._request
        if request.catching is None and time.monotonic() >= request.patient_until_s:
            request.catching = self._decoder.around(request, late)
        catching = request.catching
        if catching is None or catching.needs(late.node):
            return False
        while not reply.ready(0.0):
            if catching.wait(LOOK_S):
                return catching.ready
        return False
