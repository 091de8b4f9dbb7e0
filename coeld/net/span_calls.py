"""Calls of spans at peers: a caller waits for the one peer on its way.

Calls go over *lines*, each a connection of its own that is used by one thread at a time: the
decoder's line 0, and one for each journey that catches up beside it (coeld.datapath.catch_up). The
caches that a call leaves at the peer belong to its line, and go when that closes.
"""

import contextlib
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from coeld.compression.transfer import encode_for
from coeld.datapath import frames
from coeld.datapath.frames import COMPUTED, Kind, SpanCall
from coeld.datapath.links import LinkMeter
from coeld.datapath.pace import Paces
from coeld.datapath.quality import EXACT, Errors, Traffic
from coeld.errors import FrameError, PeerError, PeerGone, PeerRefused, PeerSlow
from coeld.ids import NodeId
from coeld.net.connection import Connection
from coeld.net.exchange import Rows, link_of
from coeld.net.expert_calls import LINK_BYTES, ExpertCalls, PeerStats
from coeld.net.reach import Reach
from coeld.net.tunnels import connect

OWN_LINE: Final = 0
"""The decoder's."""


@dataclass(slots=True)
class SpanReply:
    """A span under way. `result` must be called, or `give_up`."""

    calls: "SpanCalls"
    node: NodeId
    connection: Connection
    call_id: int
    asked: tuple[int, tuple[int, int]]
    """Layer, and the shape of the answer."""
    started_s: float
    deadline_s: float
    traffic: Traffic
    straight: bool
    """No other device stands between: what it takes tells of the link."""
    row_layers: int
    computed_us: int = 0
    """Of its time, what the peer computed."""

    def ready(self, within_s: float) -> bool:
        """Whether `result` has to wait no longer, by then: it begins to arrive, or the deadline has
        passed."""
        left_s = self.deadline_s - time.monotonic()
        return self.connection.arrives(max(0.0, min(within_s, left_s))) or left_s <= within_s

    def give_up(self) -> None:
        """It is of no use any more: with it go the connection and its caches at the peer."""
        self.calls.forget(self.node, self.connection)

    def result(self) -> Rows:
        """The residual stream (n, H). Raises PeerError."""
        try:
            left_s = max(self.deadline_s - time.monotonic(), 0.001)
            header, payload = self.connection.receive(left_s, left_s)
            if header.call_id != self.call_id:
                raise FrameError("an answer to another call")
            if header.kind is Kind.ERROR:
                raise frames.refusal(payload)
            answered = header.layer, (header.rows, header.hidden)
            if header.kind is not Kind.RESULT or answered != self.asked:
                raise FrameError(f"asked for {self.asked}, got {header.kind.name} {answered}")
            rows, self.computed_us = frames.unpack_result(header, payload)
        except PeerRefused:
            self.calls.stats_of(self.node).failures += 1
            raise
        except PeerError as exc:
            if isinstance(exc, PeerSlow):
                self.calls.paces.overran(self.node, self.row_layers)
            self.calls.forget(self.node, self.connection)
            raise
        now_s, stats = time.monotonic(), self.calls.stats_of(self.node)
        self.calls.paces.needed(self.node, now_s - self.started_s, self.row_layers)
        stats.calls += 1
        stats.rtt_us.append(int((now_s - self.started_s) * 1e6))
        self.traffic = self.traffic.back(header.payload_bytes - COMPUTED.size, header.error)
        if self.straight:
            self._measure(now_s)
        return rows.copy()  # the buffer is the connection's

    def _measure(self, now_s: float) -> None:
        """What the answer tells of the link."""
        link_s, sent = now_s - self.started_s - self.computed_us * 1e-6, self.traffic.sent_bytes
        if sent < LINK_BYTES:
            payload_bytes = sent + self.traffic.received_bytes
            self.calls.meter.answered(self.node, link_s, payload_bytes, now_s)
        elif link := link_of(self.connection.sock):
            self.calls.meter.delivered(self.node, link.bytes_per_s)


@dataclass(slots=True)
class _Line:
    """A connection to a peer that spans use."""

    address: tuple[str, int]
    connection: Connection
    via: NodeId | None
    numbers: set[int] = field(default_factory=set)
    """Requests that may have caches there."""


class SpanCalls:
    """See the module."""

    def __init__(
        self, hello: dict[str, Any], call_deadline_s: float, reach: Reach, experts: ExpertCalls
    ) -> None:
        """Shares with the calls of `experts` what is known of peers."""
        self._hello, self._call_deadline_s, self._reach = hello, call_deadline_s, reach
        self._lines: dict[tuple[NodeId, int], _Line] = {}
        self._ids = itertools.count(1)
        self._hang_up = experts.hang_up
        self.stats_of: Callable[[NodeId], PeerStats] = experts.stats_of
        self.paces: Paces = experts.paces
        self.meter: LinkMeter = experts.meter

    def span(
        self,
        node: NodeId,
        address: tuple[str, int],
        asked: SpanCall,
        x: Rows,
        errors: Errors = EXACT,
        line: int = OWN_LINE,
    ) -> SpanReply:
        """Send rows (n, H) of a request, which may err so much, through layers of a peer. Raises
        PeerError."""
        found = self._line(node, line, address)
        found.numbers.add(asked.number)
        connection, call_id = found.connection, next(self._ids) & 0xFFFFFFFF
        link = link_of(connection.sock) if errors[0] > 0 else None
        coded = encode_for(link, x, errors[0])
        sent = Traffic.out(x, coded)
        pieces = frames.pack_span(call_id, asked, x, coded, errors[1])
        began_s, straight = time.monotonic(), found.via is None
        row_layers = len(x) * (asked.stop - asked.first)
        answer = asked.first, (asked.keep, x.shape[1])
        until_s = time.monotonic() + self._send(node, connection, pieces, row_layers)
        return SpanReply(
            self, node, connection, call_id, answer, began_s, until_s, sent, straight, row_layers
        )

    def free(self, node: NodeId, number: int, line: int = OWN_LINE) -> None:
        """Let the peer drop a request's caches; one that cannot be reached has none."""
        found = self._lines.get((node, line))
        if found is None:
            return
        found.numbers.discard(number)
        if line != OWN_LINE and not found.numbers:
            del self._lines[node, line]
            found.connection.close()
            return
        with contextlib.suppress(PeerError):
            self._send(node, found.connection, frames.pack_free(number), 0)

    def forget(self, node: NodeId, connection: Connection) -> None:
        """After a failure: close this connection and those that nobody uses; the next call opens
        another, and may go another way."""
        self.stats_of(node).failures += 1
        self._hang_up(node)
        for key, line in list(self._lines.items()):
            if line.connection is connection:
                self._reach.failed(node, line.via)
                del self._lines[key]
        connection.close()

    def close(self) -> None:
        for line in list(self._lines.values()):
            line.connection.close()
        self._lines.clear()

    def _line(self, node: NodeId, number: int, address: tuple[str, int]) -> _Line:
        """A connection that goes through another device is exchanged for a straight one when no
        request has caches behind it. Raises PeerError."""
        line = self._lines.get((node, number))
        if line is not None:
            back = line.via is not None and not line.numbers and self._straight(node, address)
            if line.address == address and not back:
                return line
            line.connection.close()
            del self._lines[node, number]
        return self._opened(node, number, address)

    def _straight(self, node: NodeId, address: tuple[str, int]) -> bool:
        if (attempt := self._reach.look(node, address)) is not None:
            attempt.close()
        return self._reach.straight(node)

    def _send(
        self,
        node: NodeId,
        connection: Connection,
        pieces: list[bytes | memoryview],
        row_layers: int,
    ) -> float:
        """Seconds until the answer must be there. Raises PeerError."""
        left_s = self._call_deadline_s + self.paces.allowed_s(node, row_layers)
        try:
            connection.send(pieces, left_s)
        except PeerError:
            self.forget(node, connection)
            raise
        return left_s

    def _opened(self, node: NodeId, number: int, address: tuple[str, int]) -> _Line:
        through = self._reach.through(node)
        via, where = through or (None, address)
        hello = self._hello | ({"to": node} if through else {})
        try:
            connection = Connection(connect(where))
        except PeerError:
            self.stats_of(node).failures += 1
            self._reach.failed(node, via)
            raise
        line = self._lines[node, number] = _Line(address, connection, via)
        try:
            introduce(connection, node, where, hello, self._call_deadline_s)
        except PeerError:
            self.forget(node, connection)
            raise
        return line


def introduce(
    connection: Connection,
    node: NodeId,
    where: tuple[str, int],
    hello: dict[str, Any],
    within_s: float,
) -> None:
    """Say who calls, and see that `node` answers. Raises PeerError."""
    connection.send(frames.pack_text(Kind.HELLO, 0, hello), within_s)
    header, payload = connection.receive(within_s, within_s)
    if header.kind is Kind.ERROR:
        raise PeerGone(str(frames.refusal(payload)))
    if header.kind is not Kind.HELLO or frames.unpack_text(payload).get("node") != node:
        raise PeerGone(f"another device answers at {where[0]}:{where[1]}")
