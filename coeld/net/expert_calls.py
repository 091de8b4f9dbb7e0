"""Calls of experts at peers: any number at once, from any thread, none of which ever blocks alone.

A call takes a free connection to its peer or opens one, and gives it back with the answer. One that
is given up, because another peer was quicker, stays owed: its connection is put aside and looked at
now and then; a late answer is taken off, tells how slow the peer is, and is dropped, so it is never
mistaken for another. A peer that owes too much is not called; one whose answer does not come before
the deadline, or that has not even taken the rows, loses the connection; the next one may go through
another device (`reach.py`).
"""

import itertools
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from coeld.compression.transfer import LinkSpeed, encode_for, leaves_past, received
from coeld.datapath import frames
from coeld.datapath.links import LinkMeter
from coeld.datapath.pace import TELLING, Paces
from coeld.datapath.quality import EXACT, Errors, Traffic
from coeld.errors import PeerError, PeerOwes, PeerSlow
from coeld.ids import NodeId
from coeld.net.exchange import Exchange, ExpertCall, Rows, link_of
from coeld.net.reach import Reach

FREE_CONNECTIONS_MAX: Final = 8
"""Kept to a peer while nobody calls it."""
OWED_MAX: Final = 4
"""Answers that a peer may owe before it is not called any more."""
OWED_LOSSY_MAX: Final = 12
"""The same where packets get lost: most of these answers are on their way."""
RTT_SAMPLES: Final = 256
LINK_BYTES: Final = 1 << 14
"""Calls that send less say nothing about a link's speed."""
FRESH_S: Final = 0.05
"""A connection that was used so recently is taken without a look at whether it still stands."""
RESENT_S: Final = 0.002
"""Kernels wait two ticks or more before they send a packet again: a quicker call has lost none."""
LOOK_S: Final = 0.05
"""An answer found later than this after the last look counts as having come by then."""


@dataclass(slots=True)
class PeerStats:
    """What calls to one peer have looked like."""

    calls: int = 0
    failures: int = 0
    late: int = 0
    """Calls given up because another peer was quicker."""
    rtt_us: deque[int] = field(default_factory=lambda: deque(maxlen=RTT_SAMPLES))
    """From the call to its last byte received, the peer's compute included."""


class ExpertCalls:
    """See the module."""

    def __init__(
        self,
        hello: dict[str, Any],
        call_deadline_s: float,
        on_lost: Callable[[NodeId, PeerError], None],
        reach: Reach,
    ) -> None:
        """`on_lost` is told of given-up calls that were never answered either."""
        self._hello = hello
        self._call_deadline_s = call_deadline_s
        self._on_lost = on_lost
        self._reach = reach
        self._free: dict[NodeId, list[Exchange]] = {}
        self._owing: list[Exchange] = []
        self._heard_s: dict[NodeId, float] = {}
        """When peers last answered."""
        self._lock = threading.Lock()
        """Guards these, and what is counted."""
        self._ids = itertools.count(1)
        self.paces = Paces()
        self.links: dict[NodeId, LinkSpeed] = {}
        """As far as known."""
        self.stats: dict[NodeId, PeerStats] = {}
        self.meter = LinkMeter()

    def call(
        self,
        node: NodeId,
        address: tuple[str, int],
        layer: int,
        experts: Sequence[int],
        x: Rows,
        gates: Rows | None,
        errors: Errors = EXACT,
    ) -> ExpertCall:
        """Begin to send rows (n, H) that may err so much. Never waits. Raises PeerError; PeerOwes
        if nothing is wrong but that earlier calls have not been answered yet."""
        call_id, now_s = next(self._ids) & 0xFFFFFFFF, time.monotonic()
        if self._owing:
            self._sweep()
            self._check_owed(node, now_s)
        exchange = self._taken(node, address, now_s) or self._opened(node, address)
        if exchange.via is not None and (straight := self._reach.look(node, address)) is not None:
            exchange.close()
            self.hang_up(node)
            exchange = straight
        deadline_s = now_s + self._call_deadline_s + self.paces.allowed_s(node, len(x))
        call = ExpertCall(
            exchange, call_id, (layer, x.shape), now_s, deadline_s, not exchange.greeted
        )
        coded, keep, past = None, False, exchange.past
        if errors[0] > 0:
            link = self.links.get(node)
            coded = encode_for(link, x, errors[0], past)
            keep = leaves_past(link, coded)
        call.out = Traffic.out(x, coded)
        pieces = frames.pack_experts(call_id, layer, experts, x, gates, coded, errors[1], keep)
        try:
            exchange.begin(call, pieces)
        except PeerError as exc:
            self._break(exchange, exc)
            raise
        call.sent_s = time.monotonic()
        if keep:
            call.sent = received(x, coded, past)
        return call

    def ready(self, calls: Sequence[ExpertCall], until_s: float) -> list[ExpertCall]:
        """Those of `calls` that have ended, as soon as there is one; none at `until_s`."""
        while True:
            ended = [call for call in calls if call.outcome is not None]
            if ended or time.monotonic() >= until_s:
                return ended
            self._wait([call.exchange for call in calls], until_s)

    def send(self, calls: Sequence[ExpertCall], until_s: float) -> None:
        """Wait until the rows of `calls` are on their way, so that peers work while we do."""
        while time.monotonic() < until_s:
            exchanges = [c.exchange for c in calls if c.outcome is None and c.exchange.sending]
            if not exchanges:
                return
            self._wait(exchanges, until_s)

    def result(self, call: ExpertCall) -> Rows:
        """Partial sums (n, H); waits for them. Raises PeerError."""
        self.ready([call], call.deadline_s + 1)
        if isinstance(call.outcome, PeerError):
            raise call.outcome
        assert call.outcome is not None
        return call.outcome

    def give_up(self, call: ExpertCall) -> None:
        """Do not wait for it any longer. Does nothing if it has ended."""
        if call.outcome is not None:
            return
        with self._lock:
            self.stats_of(call.node).late += 1
        if call.exchange.sending:
            # The rest of the rows is the caller's memory, about to change.
            self._break(call.exchange, PeerSlow("the rows were not taken"))
            return
        with self._lock:
            call.exchange.watched_s = float("inf")
            self.paces.owes(call.node, call.started_s)
            self._owing.append(call.exchange)

    def stats_of(self, node: NodeId) -> PeerStats:
        return self.stats.setdefault(node, PeerStats())

    def hang_up(self, node: NodeId) -> None:
        """Close the connections to a peer that nobody uses: it has failed."""
        with self._lock:
            closing = self._free.pop(node, [])
        for exchange in closing:
            exchange.close()

    def close(self) -> None:
        for node in list(self._free):
            self.hang_up(node)
        with self._lock:
            owing, self._owing = self._owing, []
        for exchange in owing:
            exchange.close()

    def _taken(self, node: NodeId, address: tuple[str, int], now_s: float) -> Exchange | None:
        """A free connection to the peer at that address which it has not closed meanwhile."""
        while True:
            with self._lock:
                free = self._free.get(node)
                if not free:
                    return None
                exchange = free.pop()
            if exchange.address == address and now_s - exchange.silent_s < FRESH_S:
                return exchange
            try:
                exchange.pump()
            except PeerError:
                exchange.close()
                continue
            if exchange.address == address:
                return exchange
            exchange.close()

    def _check_owed(self, node: NodeId, now_s: float) -> None:
        """Raises PeerOwes."""
        owed_max = OWED_LOSSY_MAX if self.paces.losses.lossy((node,), now_s) else OWED_MAX
        if sum(exchange.node == node for exchange in self._owing) >= owed_max:
            raise PeerOwes(f"{owed_max} answers are owed")

    def _opened(self, node: NodeId, address: tuple[str, int]) -> Exchange:
        through = self._reach.through(node)
        try:
            return Exchange.open(node, address, self._hello, through)
        except PeerError:
            self._reach.failed(node, through[0] if through else None)
            with self._lock:
                self.stats_of(node).failures += 1
            raise

    def _wait(self, exchanges: Sequence[Exchange], until_s: float) -> None:
        """Wait for any of these, one call each; end what is overdue."""
        now_s = time.monotonic()
        for exchange in exchanges:
            exchange.watch(now_s)
            assert exchange.call is not None
            until_s = min(until_s, exchange.call.deadline_s, exchange.redial_at_s)
        if len(exchanges) == 1 and not exchanges[0].sending:
            if exchanges[0].wait(until_s - now_s):
                self._pump(exchanges[0])
        else:
            self._pump_ready(exchanges, until_s - now_s)
        now_s = time.monotonic()
        for exchange in exchanges:
            if exchange.call is not None:
                if exchange.redial_at_s <= now_s:
                    self._pump(exchange)
                self._end_if_overdue(exchange, now_s)

    def _pump_ready(self, exchanges: Sequence[Exchange], within_s: float) -> None:
        """Wait for any of several, to read from or to write to."""
        poller, by_fd = select.poll(), {}
        for exchange in exchanges:
            poller.register(exchange.sock, 5 if exchange.sending else 1)  # POLLIN 1, POLLOUT 4
            by_fd[exchange.sock.fileno()] = exchange
        for fd, _events in poller.poll(max(0.0, within_s) * 1000):
            self._pump(by_fd[fd])

    def _sweep(self) -> None:
        """Look at what is owed."""
        lost: list[tuple[NodeId, PeerError]] = []
        with self._lock:
            owing, self._owing = self._owing, []
        owed = [(exchange, exchange.call) for exchange in owing if exchange.call is not None]
        for exchange, call in owed:
            self._pump(exchange)
            if call.outcome is None:  # else another thread may have its next call on the way
                self._end_if_overdue(exchange, time.monotonic())
            if isinstance(call.outcome, PeerError) and not self._stuck(call, call.outcome):
                lost.append((call.node, call.outcome))
        with self._lock:
            self._owing += [exchange for exchange, call in owed if call.outcome is None]
            for node in {call.node for _exchange, call in owed}:
                if not any(exchange.node == node for exchange in self._owing):
                    self.paces.settled(node)
        for node, error in lost:
            self._on_lost(node, error)

    def _pump(self, exchange: Exchange) -> None:
        call = exchange.call
        assert call is not None
        try:
            exchange.pump()
        except PeerError as exc:
            self._break(exchange, exc)
            return
        if call.outcome is not None:
            self._account(call)

    def _account(self, call: ExpertCall) -> None:
        """Count an answer. What nobody looked for meanwhile may have lain there long."""
        now_s = time.monotonic()
        took_s = min(now_s, call.exchange.silent_s + LOOK_S) - call.started_s
        self._measure(call, now_s)
        if call.first and call.exchange.via is None:
            self._reach.works(call.node)
        beyond_s = now_s - call.started_s - call.computed_us * 1e-6
        packets = call.exchange.resent() if beyond_s > RESENT_S else 0
        with self._lock:
            if packets:
                self.paces.losses.note(call.node, packets, now_s)
            self._heard_s[call.node] = now_s
            stats = self.stats_of(call.node)
            if isinstance(call.outcome, PeerError):
                stats.failures += 1
            else:
                stats.calls += 1
                stats.rtt_us.append(int(took_s * 1e6))
                if not call.first:
                    self.paces.took(call.node, call.rows, took_s, now_s)
                if call.rows >= TELLING:
                    self.paces.needed(call.node, took_s, call.rows)
            free = self._free.setdefault(call.node, [])
            if len(free) < FREE_CONNECTIONS_MAX:
                free.append(call.exchange)
                return
        call.exchange.close()

    def _measure(self, call: ExpertCall, now_s: float) -> None:
        """What an answer tells of the way to a peer, and of the link if no other device stands
        between. How long it took is known if somebody waited for it before it can have come."""
        straight = call.exchange.via is None
        computed_s, took_s = call.computed_us * 1e-6, now_s - call.started_s
        watched = call.exchange.watched_s - call.started_s <= computed_s
        if watched and not call.first and not isinstance(call.outcome, PeerError):
            call.beyond_s = took_s - computed_s
        if call.traffic.sent_bytes >= LINK_BYTES:
            if link := link_of(call.exchange.sock):
                self.links[call.node] = link
                if straight:
                    self.meter.delivered(call.node, link.bytes_per_s)
            return
        if straight and call.beyond_s is not None:
            payload_bytes = call.traffic.sent_bytes + call.traffic.received_bytes
            link_s = call.beyond_s - (call.sent_s - call.started_s)
            self.meter.answered(call.node, link_s, payload_bytes, now_s)

    def _end_if_overdue(self, exchange: Exchange, now_s: float) -> None:
        call = exchange.call
        if call is None:
            return
        if now_s >= call.deadline_s:
            self._break(exchange, PeerSlow("no answer before the deadline"))
        exchange.silent_s = now_s

    def _stuck(self, call: ExpertCall, error: PeerError) -> bool:
        """Only its connection is: the peer has answered others since."""
        heard_s = self._heard_s.get(call.node, float("-inf"))
        return isinstance(error, PeerSlow) and heard_s > call.started_s

    def _break(self, exchange: Exchange, error: PeerError) -> None:
        """Close a connection: its call has failed, and so may the others that are free."""
        exchange.close()
        call, exchange.call = exchange.call, None
        if call is None or not self._stuck(call, error):
            self.hang_up(exchange.node)
            self._reach.failed(exchange.node, exchange.via)
        now_s = time.monotonic()
        with self._lock:
            self.stats_of(exchange.node).failures += 1
            if call is None or call.outcome is not None:
                return
            call.outcome = error
            if isinstance(error, PeerSlow):
                self.paces.overran(call.node, call.rows)
            pace, took_s = self.paces.of(call.node, call.rows), now_s - call.started_s
            if isinstance(error, PeerSlow) and (pace is None or took_s > pace.mean_s):
                self.paces.took(call.node, call.rows, took_s, now_s)  # that long at least
