"""One connection to a peer that runs experts, as its caller drives it: one call at a time.

Nothing here waits. Opening, HELLO and the call are queued and pumped through a non-blocking socket,
so a peer that is off, frozen or does not read costs its caller a deadline and never a blocked
thread, and several peers can be waited for at once (`expert_calls.py`). What an answer may make us
allocate is bounded by what was asked, before it is read.
"""

import contextlib
import select
import socket
import struct
import time
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coeld.compression.prediction import Past
from coeld.compression.transfer import LinkSpeed
from coeld.datapath import frames
from coeld.datapath.frames import HEADER, Header, Kind
from coeld.datapath.quality import Traffic
from coeld.errors import FrameError, PeerError, PeerGone, PeerSlow
from coeld.ids import NodeId
from coeld.net.sockets import DIAL_S, dial

PIECES_MAX: Final = 64
"""Handed to one sendmsg: below the kernel's limit."""
TCP_INFO_BYTES: Final = 192
UNWATCHED_S: Final = 0.0001
"""Between two looks at a connection; longer, and its caller has done something else meanwhile."""
NEVER: Final = float("inf")
NOTHING: Final = Traffic()
Rows = NDArray[np.float32]


@dataclass(slots=True, eq=False)
class ExpertCall:
    """A call under way; `outcome` is set when it has ended."""

    exchange: "Exchange"
    call_id: int
    asked: tuple[int, tuple[int, ...]]
    """Layer, and the shape of the rows."""
    started_s: float
    deadline_s: float
    first: bool
    """Opened the connection: its time says nothing about the calls that follow."""
    outcome: Rows | PeerError | None = None
    computed_us: int = 0
    """Of its time, what the peer computed."""
    out: Traffic = NOTHING
    """Its rows on their way out."""
    traffic: Traffic = NOTHING
    """They and the answer, once it has come."""
    beyond_s: float | None = None
    """Of its time, what the peer did not compute, if somebody saw the answer come."""
    sent_s: float = 0.0
    """When it had been packed and handed to the kernel."""
    sent: Rows | None = None
    """Its rows as the peer has them, if the next call may refer to them."""

    @property
    def node(self) -> NodeId:
        return self.exchange.node

    @property
    def rows(self) -> int:
        return self.asked[1][0]


@dataclass(slots=True, eq=False)
class Exchange:
    """See the module. Used by one thread at a time."""

    node: NodeId
    address: tuple[str, int]
    sock: socket.socket
    via: NodeId | None = None
    """The device that passes this connection on; None: it is straight."""
    call: ExpertCall | None = None
    silent_s: float = 0.0
    """When it was last seen without a complete answer."""
    past: Past | None = None
    """What the last call left on both ends."""
    watched_s: float = 0.0
    """Since when its caller has done nothing but wait for it, or for others as well."""
    redial_at_s: float = NEVER
    """If it is not connected by then, another attempt is to be made: `pump` does so."""
    _where: tuple[str, int] = ("", 0)
    """What the socket connects to."""
    _redial_s: float = DIAL_S
    _resent: int = 0
    _greeted: bool = False
    _out: list[bytes | memoryview] = field(default_factory=list)
    _in: bytearray = field(default_factory=lambda: bytearray(1 << 14))
    _have: int = 0
    _poller: select.poll = field(init=False)

    def __post_init__(self) -> None:
        self._poller = _reading(self.sock)

    @staticmethod
    def open(
        node: NodeId,
        address: tuple[str, int],
        hello: dict[str, Any],
        through: tuple[NodeId, tuple[str, int]] | None = None,
    ) -> "Exchange":
        """Begin to connect, straight or through another device, and to introduce ourselves.
        Raises PeerGone."""
        via, where = through or (None, address)
        if via is not None:
            hello = {**hello, "to": node}
        try:
            sock = dial(where)
        except OSError as exc:
            raise peer_error(exc) from exc
        exchange = Exchange(node, address, sock, via, _where=where)
        exchange.redial_at_s = time.monotonic() + DIAL_S
        exchange._out += frames.pack_text(Kind.HELLO, 0, hello)
        return exchange

    @property
    def sending(self) -> bool:
        """Bytes are left that the socket would not take yet."""
        return bool(self._out)

    @property
    def greeted(self) -> bool:
        """The peer has answered our HELLO."""
        return self._greeted

    def begin(self, call: ExpertCall, pieces: list[bytes | memoryview]) -> None:
        """Queue a call. `pieces` must not change before they are sent. Raises PeerError."""
        assert self.call is None
        self.call, self.past = call, None
        self.silent_s = self.watched_s = call.started_s
        self._out += pieces
        try:
            self._send()
        except OSError as exc:
            raise peer_error(exc) from exc

    def pump(self) -> None:
        """Send and receive what can be without waiting. Raises PeerError: then close it."""
        try:
            if self.redial_at_s < NEVER and self.redial_at_s <= (now_s := time.monotonic()):
                self._redial(now_s)
            if self._out:
                self._send()
            self._receive()
        except (OSError, EOFError) as exc:
            raise peer_error(exc) from exc

    def wait(self, within_s: float) -> bool:
        """Whether something has arrived, by then, or the connection is gone."""
        return bool(self._poller.poll(max(0.0, within_s) * 1000))

    def resent(self) -> int:
        """How many packets had to be sent again since the last look."""
        before, self._resent = self._resent, resent_of(self.sock)
        return self._resent - before

    def watch(self, now_s: float) -> None:
        """The caller begins to wait, or goes on."""
        if now_s - self.silent_s > UNWATCHED_S:
            self.watched_s = now_s

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()

    def _redial(self, now_s: float) -> None:
        """Unless it is connected: the first packet, or its answer, may be lost."""
        poller = select.poll()
        poller.register(self.sock, select.POLLOUT)
        if poller.poll(0):
            self.redial_at_s = NEVER
            return
        self.sock.close()
        self.sock = dial(self._where)
        self._poller = _reading(self.sock)
        self._resent = 0
        self._redial_s *= 2
        self.redial_at_s = now_s + self._redial_s

    def _send(self) -> None:
        out = self._out
        while out:
            try:
                sent = self.sock.sendmsg(out if len(out) <= PIECES_MAX else out[:PIECES_MAX])
            except BlockingIOError:
                return
            self.redial_at_s = NEVER
            whole = 0
            for piece in out:
                if sent < len(piece):
                    break
                sent, whole = sent - len(piece), whole + 1
            del out[:whole]
            if sent:
                out[0] = memoryview(out[0])[sent:]

    def _receive(self) -> None:
        full = True
        while full:
            room = memoryview(self._in)[self._have :]
            try:
                got = self.sock.recv_into(room)
            except BlockingIOError:
                return
            if not got:
                raise EOFError
            full = got == len(room)
            room.release()
            self._have += got
            while self._have >= HEADER.size and self._take():
                pass

    def _take(self) -> bool:
        """Deliver the frame that begins here if all of it is there; else make room for the rest."""
        header = frames.parse_header(memoryview(self._in)[: HEADER.size])
        self._check(header)
        size = HEADER.size + header.payload_bytes
        if self._have < size:
            if len(self._in) < size:
                self._in.extend(bytes(size - len(self._in)))
            return False
        self._deliver(header, memoryview(self._in)[HEADER.size : size])
        left = self._have - size
        if left:
            self._in[:left] = self._in[size : self._have]
        self._have = left
        return True

    def _check(self, header: Header) -> None:
        """Is this what must come next? Raises FrameError, PeerGone."""
        if not self._greeted:
            if header.kind not in (Kind.HELLO, Kind.ERROR):
                raise FrameError("the first frame must be HELLO")
            return
        if self.call is None or header.call_id != self.call.call_id:
            raise FrameError("an answer to another call")
        asked, answered = self.call.asked, (header.layer, (header.rows, header.hidden))
        if header.kind is not Kind.ERROR and (header.kind is not Kind.RESULT or answered != asked):
            raise FrameError(f"asked for {asked}, got {header.kind.name} {answered}")

    def _deliver(self, header: Header, payload: memoryview) -> None:
        if not self._greeted:
            if header.kind is Kind.ERROR:
                raise PeerGone(str(frames.refusal(payload)))
            if frames.unpack_text(payload).get("node") != self.node:
                host, port = self.address
                raise PeerGone(f"another device answers at {host}:{port}")
            self._greeted = True
            return
        call = self.call
        assert call is not None
        if header.kind is Kind.ERROR:
            call.outcome = frames.refusal(payload)
        else:
            rows, call.computed_us = frames.unpack_result(header, payload)
            call.outcome = rows.copy()  # the buffer is the connection's
            received_bytes = header.payload_bytes - frames.COMPUTED.size
            call.traffic = call.out.back(received_bytes, header.error)
            if call.sent is not None:
                self.past = Past(call.sent, call.outcome)
        self.call = None


def _reading(sock: socket.socket) -> select.poll:
    """Tells when something has arrived."""
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    return poller


def peer_error(exc: OSError | EOFError) -> PeerError:
    """What a socket raised, as PeerSlow or PeerGone."""
    if isinstance(exc, TimeoutError):  # before OSError: it is a subclass of it
        return PeerSlow("no answer before the deadline")
    return PeerGone(f"connection lost: {exc!r}")


def resent_of(sock: socket.socket) -> int:
    """Packets of a connection that were sent again: tcpi_total_retrans, at 100 in tcp_info."""
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
    except OSError:
        return 0
    return int(struct.unpack_from("=I", info, 100)[0]) if len(info) >= 104 else 0


def link_of(sock: socket.socket) -> LinkSpeed | None:
    """The link of a connection as the kernel has seen it; None: no idea yet.

    From struct tcp_info of Linux: tcpi_rtt at 68, tcpi_delivery_rate at 160. A rate that was
    limited by what we had to send (the flag at 7) is a lower bound and not taken.
    """
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
    except OSError:
        return None
    if len(info) < 168 or info[7] & 1:
        return None
    (rtt_us,) = struct.unpack_from("=I", info, 68)
    (bytes_per_s,) = struct.unpack_from("=Q", info, 160)
    return LinkSpeed(rtt_us * 1e-6, float(bytes_per_s)) if bytes_per_s else None
