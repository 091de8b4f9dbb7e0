"""Direct TCP between engines: a server that runs experts and spans for peers, a pool that calls
theirs.

Blocking sockets in threads, because the latency of a cut is what counts and this is the shortest
path there is: the decoder's own thread writes the rows and reads the answer, the peer's thread
that was blocked in `recv` runs what is asked for and writes back: one wake-up on each side a call.

A connection starts with HELLO both ways (swarm, model, node); then the caller sends EXPERTS or SPAN
and gets RESULT or ERROR, in order; FREE is not answered, PING by itself. Experts are called without
blocking on any single peer (`expert_calls.py`), over any free connection; a span's caller waits for
the one peer on its way, over a connection kept for its spans (`span_calls.py`). The caches that
these left behind belong to it: they go when it closes, and keepalive closes it when the caller's
machine is gone.

A HELLO that names another device as the one it is meant for is handed on to it (`tunnels.py`),
once: the caller cannot reach that one by itself (`reach.py`).
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from coeld.compression.prediction import Past
from coeld.compression.transfer import encode_for, received
from coeld.datapath import frames
from coeld.datapath.frames import Header, Kind, SpanCall
from coeld.errors import FrameError, PeerError, PeerRefused, PeerSlow
from coeld.ids import NodeId
from coeld.net.connection import Connection
from coeld.net.exchange import Rows, link_of
from coeld.net.expert_calls import ExpertCalls, PeerStats
from coeld.net.reach import Reach
from coeld.net.span_calls import SpanCalls, introduce
from coeld.net.tunnels import carry, connect, hand_on

CONNECTIONS_MAX: Final = 128
"""Threads a server starts: a few for each of more decoders than a swarm of this kind has."""
ACCEPT_AGAIN_S: Final = 0.05
FRAME_TIMEOUT_S: Final = 5.0
"""A frame that has begun must be complete by then; between frames a peer may be silent."""
PINGS: Final = 4
"""Frames of a probe."""
RunExperts = Callable[[int, Sequence[int], Rows, Rows | None], Rows]
"""(layer, experts, x, gates) -> y"""
Addresses = Callable[[], Mapping[NodeId, tuple[str, int]]]
"""Of all devices of the swarm with this model, as far as known now."""


class SpanHost(Protocol):
    """What runs spans for one connection, in its thread. See coeld.datapath.legs.Guest."""

    def span(self, asked: SpanCall, x: Rows) -> Rows: ...
    def free(self, number: int) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Introduction:
    """Who is calling: both ends must agree on swarm and model."""

    swarm: str
    model: str
    node: NodeId

    def to_json(self) -> dict[str, Any]:
        return {"swarm": self.swarm, "model": self.model, "node": self.node}


class PeerServer:
    """Serves experts and spans on one listening socket. `close` ends every thread."""

    def __init__(self, host: str, port: int) -> None:
        """Raises OSError when the address is taken."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=32)
        self.host, self.port = self._listener.getsockname()[:2]
        self.refused = 0
        """Connections and frames turned away."""
        self.busy = False
        """Lots are loaded: how long an answer takes says nothing of the link."""
        self._introduction: Introduction | None = None
        self._run: RunExperts | None = None
        self._welcome: Callable[[], SpanHost] | None = None
        self._addresses: Addresses = dict
        self._hidden = 0
        self._connections: set[Connection] = set()
        self._lock = threading.Lock()
        self._left = threading.Condition(self._lock)
        """A connection has ended."""
        self._acceptor = threading.Thread(target=self._accept, name="peers.accept", daemon=True)
        self._acceptor.start()

    def serve(
        self,
        introduction: Introduction,
        hidden: int,
        run: RunExperts,
        welcome: Callable[[], SpanHost] | None = None,
        addresses: Addresses = dict,
    ) -> None:
        """From now on answer calls with rows of `hidden` values through `run`, and through what
        `welcome` makes for each connection that asks for spans; hand on those that are meant for
        one of `addresses`. Present connections, which may be about another model, are closed."""
        self._introduction, self._hidden = introduction, hidden
        self._run, self._welcome, self._addresses = run, welcome, addresses
        with self._lock:
            for connection in self._connections:
                connection.close()

    def rest(self) -> None:
        """From now on answer nobody, until `serve`. Returns when no caller's thread holds anything
        of the model any more, or after FRAME_TIMEOUT_S."""
        self._introduction = self._run = self._welcome = None
        until_s = time.monotonic() + FRAME_TIMEOUT_S
        with self._lock:
            for connection in self._connections:
                connection.close()
            while self._connections and (left_s := until_s - time.monotonic()) > 0:
                self._left.wait(left_s)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for connection in self._connections:
                connection.close()
        self._acceptor.join(1)

    def _accept(self) -> None:
        while True:
            try:
                sock, _address = self._listener.accept()
            except OSError:
                if self._listener.fileno() < 0:
                    return
                time.sleep(ACCEPT_AGAIN_S)  # no file descriptor is free, or it is closed just now
                continue
            with self._lock:
                full = len(self._connections) >= CONNECTIONS_MAX
                if full:
                    self.refused += 1
                    sock.close()
                    continue
                connection = Connection(sock, hidden_max=0)  # no rows before it is known who calls
                self._connections.add(connection)
            thread = threading.Thread(
                target=self._converse, args=(connection,), name="peers.serve", daemon=True
            )
            try:
                thread.start()
            except RuntimeError:  # the system lets no further thread begin
                self._let_go(connection)

    def _converse(self, connection: Connection) -> None:
        """One caller, until it leaves or breaks the protocol."""
        host: SpanHost | None = None
        try:
            if (onward := self._greet(connection)) is not None:
                with onward:
                    carry(connection.sock, onward)
                return
            while True:
                header, payload = connection.receive(None, FRAME_TIMEOUT_S)
                if header.kind in (Kind.SPAN, Kind.FREE) and host is None and self._welcome:
                    host = self._welcome()
                answer = self._answer(connection, header, payload, host)
                if answer:
                    connection.send(answer, FRAME_TIMEOUT_S)
        except FrameError as exc:
            self.refused += 1
            with contextlib.suppress(PeerError):
                text = frames.pack_text(Kind.ERROR, 0, {"message": str(exc)})
                connection.send(text, FRAME_TIMEOUT_S)
        except PeerSlow as exc:
            self.refused += 1
            with contextlib.suppress(PeerError):
                why = f"a frame did not go through in {FRAME_TIMEOUT_S:g} s: {exc}"
                connection.send(frames.pack_text(Kind.ERROR, 0, {"message": why}), 0)
        except PeerError:
            pass  # it left
        finally:
            if host is not None:
                host.close()
                host = None
            self._let_go(connection)

    def _let_go(self, connection: Connection) -> None:
        connection.close()
        with self._lock:
            self._connections.discard(connection)
            self._left.notify_all()

    def _greet(self, connection: Connection) -> socket.socket | None:
        """Check who calls. The connection to the device that is meant, if it is not this one."""
        header, payload = connection.receive(FRAME_TIMEOUT_S, FRAME_TIMEOUT_S)
        if header.kind is not Kind.HELLO:
            raise FrameError("the first frame must be HELLO")
        theirs, ours = frames.unpack_text(payload), self._introduction
        if ours is None:
            raise FrameError("no model is open here yet")
        for key, value in (("swarm", ours.swarm), ("model", ours.model)):
            if theirs.get(key) != value:
                raise FrameError(f"this device has another {key}")
        to = theirs.pop("to", ours.node)
        if to != ours.node:
            address = self._addresses().get(NodeId(str(to)))
            if address is None:
                raise FrameError("this device does not know the one that is meant")
            return self._hand_on(connection, address, frames.pack_text(Kind.HELLO, 0, theirs))
        hello = frames.pack_text(Kind.HELLO, header.call_id, ours.to_json())
        connection.send(hello, FRAME_TIMEOUT_S)
        connection.hidden_max = self._hidden
        return None

    def _hand_on(
        self, connection: Connection, address: tuple[str, int], hello: list[bytes | memoryview]
    ) -> socket.socket:
        """Introduce the caller to the device it means. Raises PeerError after telling it."""
        try:
            return hand_on(address, b"".join(hello) + connection.unread)
        except PeerError as exc:
            connection.send(frames.pack_refusal(0, exc), FRAME_TIMEOUT_S)
            raise

    def _answer(
        self, connection: Connection, header: Header, payload: memoryview, host: SpanHost | None
    ) -> list[bytes | memoryview]:
        """What to send back; nothing after a FREE. Raises FrameError."""
        started_s = time.monotonic()
        if header.kind is Kind.FREE:
            if host is not None:
                host.free(header.call_id)
            return []
        if header.kind is Kind.PING:
            if self.busy:
                return frames.pack_refusal(header.call_id, PeerRefused("lots are loaded"))
            return frames.pack_ping(header.call_id)
        try:
            if header.hidden != self._hidden:
                raise FrameError(f"rows of {header.hidden}, not of {self._hidden}")
            if header.kind is Kind.EXPERTS and self._run is not None:
                past, connection.past = connection.past, None
                experts, x, gates = frames.unpack_experts(header, payload, past)
                y = self._run(header.layer, experts, x, gates)
            elif header.kind is Kind.SPAN and host is not None:
                asked, x = frames.unpack_span(header, payload)
                y = host.span(asked, x)
            else:
                raise FrameError(f"unexpected {header.kind.name}")
        except PeerRefused as exc:
            return frames.pack_refusal(header.call_id, exc)
        computed_us = int((time.monotonic() - started_s) * 1e6)
        link = link_of(connection.sock) if header.error > 0 else None
        coded = encode_for(link, y, header.error)
        if header.kept:
            connection.past = Past(x, received(y, coded))
        return frames.pack_result(header.call_id, header.layer, y, computed_us, coded)


class PeerPool:
    """Connections to peers, opened when needed. Any thread, but each line of spans only one at a
    time."""

    def __init__(
        self,
        introduction: Introduction,
        call_deadline_s: float,
        on_lost: Callable[[NodeId, PeerError], None] = lambda _node, _error: None,
        addresses: Addresses = dict,
    ) -> None:
        self._hello, self._call_deadline_s = introduction.to_json(), call_deadline_s
        self._reach = Reach(self._hello, addresses)
        calls = ExpertCalls(self._hello, call_deadline_s, on_lost, self._reach)
        self._experts = calls
        self._spans = SpanCalls(self._hello, call_deadline_s, self._reach, calls)
        self.another_way = self._reach.another
        self.call, self.send, self.ready = calls.call, calls.send, calls.ready
        self.result, self.give_up = calls.result, calls.give_up
        self.span, self.free = self._spans.span, self._spans.free
        self.paces, self.links, self.stats_of = calls.paces, calls.links, calls.stats_of
        self.meter = calls.meter

    def probe(self, node: NodeId, address: tuple[str, int]) -> None:
        """Measure the round trip over a connection of its own. Any thread. Raises PeerError, which
        says no more than that there was nothing to measure."""
        connection = Connection(connect(address))
        try:
            introduce(connection, node, address, self._hello, self._call_deadline_s)
            for number in range(PINGS):
                started_s = time.monotonic()
                connection.send(frames.pack_ping(number), self._call_deadline_s)
                header, payload = connection.receive(self._call_deadline_s, self._call_deadline_s)
                if header.kind is Kind.ERROR:
                    raise frames.refusal(payload)
                if header.kind is not Kind.PING or header.call_id != number:
                    raise FrameError(f"asked for a PING, got {header.kind.name}")
                now_s = time.monotonic()
                self.meter.answered(node, now_s - started_s, 0, now_s)
        finally:
            connection.close()

    def stats(self) -> dict[NodeId, PeerStats]:
        return dict(self._experts.stats)

    def close(self) -> None:
        self._experts.close()
        self._reach.close()
        self._spans.close()
