"""Direct TCP between engines: a server that runs experts for peers, a pool that calls theirs.

Blocking sockets in threads, because the latency of a cut is what counts and this is the shortest
path there is: the decoder's own thread writes the rows and reads the answer, the owner's thread
that was blocked in `recv` runs the experts and writes back. One wake-up on each side per cut.

A connection starts with HELLO both ways (swarm, model, node); then the caller sends EXPERTS and
gets RESULT or ERROR, in order. After a time-out the caller closes the connection, so that a late
answer cannot be taken for another.
"""

import contextlib
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coeld.datapath import frames
from coeld.datapath.frames import HEADER, Header, Kind
from coeld.errors import FrameError, PeerError, PeerGone, PeerRefused, PeerSlow
from coeld.ids import NodeId

CONNECTIONS_MAX: Final = 64
"""Threads a server starts: more devices than a swarm of this kind has decoders."""
CONNECT_TIMEOUT_S: Final = 0.5
FRAME_TIMEOUT_S: Final = 5.0
"""A frame that has begun must be complete by then; between frames a peer may be silent."""
RTT_SAMPLES: Final = 256

Rows = NDArray[np.float32]
RunExperts = Callable[[int, Sequence[int], Rows, Rows | None], Rows]
"""(layer, experts, x, gates) -> y"""


@dataclass(frozen=True, slots=True)
class Introduction:
    """Who is calling: both ends must agree on swarm and model."""

    swarm: str
    model: str
    node: NodeId

    def to_json(self) -> dict[str, Any]:
        return {"swarm": self.swarm, "model": self.model, "node": self.node}


class Connection:
    """A socket that carries whole frames. Not thread-safe."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self._header = bytearray(HEADER.size)
        self._payload = bytearray(1 << 14)

    def send(self, pieces: list[bytes | memoryview]) -> None:
        """Write all pieces with as few system calls as possible. Raises PeerGone, PeerSlow."""
        with peer_errors():
            sent = self.sock.sendmsg(pieces)
            for piece in pieces:
                if sent < len(piece):
                    self.sock.sendall(memoryview(piece)[sent:])
                    sent = 0
                else:
                    sent -= len(piece)

    def receive(self, idle_s: float | None, frame_s: float) -> tuple[Header, memoryview]:
        """The next frame: wait `idle_s` for its first byte (None: for ever), then `frame_s`.

        The payload is a view that the next call overwrites. Raises PeerGone, PeerSlow, FrameError.
        """
        with peer_errors():
            self.sock.settimeout(idle_s)
            header = memoryview(self._header)
            got = self.sock.recv_into(header)
            deadline = time.monotonic() + frame_s
            self._fill(header[got:] if got else header, deadline, first=got == 0)
            parsed = frames.parse_header(self._header)
            if parsed.payload_bytes > len(self._payload):
                self._payload = bytearray(parsed.payload_bytes)
            payload = memoryview(self._payload)[: parsed.payload_bytes]
            self._fill(payload, deadline)
            return parsed, payload

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()

    def _fill(self, view: memoryview, deadline: float, first: bool = False) -> None:
        if first:
            raise EOFError
        while view:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise TimeoutError
            self.sock.settimeout(left_s)
            got = self.sock.recv_into(view)
            if not got:
                raise EOFError
            view = view[got:]


class PeerServer:
    """Serves experts on one listening socket. `close` ends every thread."""

    def __init__(self, host: str, port: int) -> None:
        """Raises OSError when the address is taken."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=32)
        self.host, self.port = self._listener.getsockname()[:2]
        self.refused = 0
        """Connections and frames turned away."""
        self._introduction: Introduction | None = None
        self._run: RunExperts | None = None
        self._hidden = 0
        self._connections: set[Connection] = set()
        self._lock = threading.Lock()
        self._acceptor = threading.Thread(target=self._accept, name="peers.accept", daemon=True)
        self._acceptor.start()

    def serve(self, introduction: Introduction, hidden: int, run: RunExperts) -> None:
        """From now on answer calls with rows of `hidden` values through `run`."""
        self._introduction, self._hidden, self._run = introduction, hidden, run

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
                return
            with self._lock:
                full = len(self._connections) >= CONNECTIONS_MAX
                if full:
                    self.refused += 1
                    sock.close()
                    continue
                connection = Connection(sock)
                self._connections.add(connection)
            threading.Thread(
                target=self._converse, args=(connection,), name="peers.serve", daemon=True
            ).start()

    def _converse(self, connection: Connection) -> None:
        """One caller, until it leaves or breaks the protocol."""
        try:
            self._greet(connection)
            while True:
                header, payload = connection.receive(None, FRAME_TIMEOUT_S)
                answer = self._answer(header, payload)
                connection.sock.settimeout(FRAME_TIMEOUT_S)
                connection.send(answer)
        except FrameError as exc:
            self.refused += 1
            with contextlib.suppress(PeerError):
                connection.send(frames.pack_text(Kind.ERROR, 0, {"message": str(exc)}))
        except PeerError:
            pass  # it left: nothing to clean up but the connection
        finally:
            with self._lock:
                self._connections.discard(connection)
            connection.close()

    def _greet(self, connection: Connection) -> None:
        header, payload = connection.receive(FRAME_TIMEOUT_S, FRAME_TIMEOUT_S)
        if header.kind is not Kind.HELLO:
            raise FrameError("the first frame must be HELLO")
        theirs, ours = frames.unpack_text(payload), self._introduction
        if ours is None:
            raise FrameError("no model is open here yet")
        for key, value in (("swarm", ours.swarm), ("model", ours.model)):
            if theirs.get(key) != value:
                raise FrameError(f"this device has another {key}")
        connection.sock.settimeout(FRAME_TIMEOUT_S)
        connection.send(frames.pack_text(Kind.HELLO, header.call_id, ours.to_json()))

    def _answer(self, header: Header, payload: memoryview) -> list[bytes | memoryview]:
        if header.kind is not Kind.EXPERTS or header.hidden != self._hidden or self._run is None:
            raise FrameError(f"unexpected {header.kind.name} with rows of {header.hidden}")
        experts, x, gates = frames.unpack_experts(header, payload)
        try:
            y = self._run(header.layer, experts, x, gates)
        except PeerRefused as exc:
            return frames.pack_text(Kind.ERROR, header.call_id, {"message": str(exc)})
        return frames.pack_result(header.call_id, header.layer, y)


@dataclass(slots=True)
class PeerStats:
    """What calls to one peer have looked like."""

    calls: int = 0
    failures: int = 0
    rtt_us: deque[int] = field(default_factory=lambda: deque(maxlen=RTT_SAMPLES))
    """From the last byte sent to the last byte received, the peer's compute included."""


@dataclass(slots=True)
class PeerCall:
    """A call under way. `result` must be called, or the connection is closed."""

    pool: "PeerPool"
    node: NodeId
    connection: Connection
    call_id: int
    asked: tuple[int, tuple[int, ...]]
    """Layer, and the shape of the rows."""
    started_s: float
    deadline_s: float

    def result(self) -> Rows:
        """Partial sums (n, H), valid until the next call to this peer. Raises PeerError."""
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
            rows = frames.unpack_result(header, payload)
        except PeerRefused:
            self.pool.stats_of(self.node).failures += 1
            raise
        except PeerError:
            self.pool.forget(self.node)
            raise
        stats = self.pool.stats_of(self.node)
        stats.calls += 1
        stats.rtt_us.append(int((time.monotonic() - self.started_s) * 1e6))
        return rows


class PeerPool:
    """One connection per peer, opened when first needed. Used by the decoder's thread only."""

    def __init__(self, introduction: Introduction, call_deadline_s: float) -> None:
        self._introduction = introduction
        self._call_deadline_s = call_deadline_s
        self._connections: dict[NodeId, tuple[tuple[str, int], Connection]] = {}
        self._stats: dict[NodeId, PeerStats] = {}
        self._next_id = 0

    def call(
        self,
        node: NodeId,
        address: tuple[str, int],
        layer: int,
        experts: Sequence[int],
        x: Rows,
        gates: Rows | None,
    ) -> PeerCall:
        """Send rows (n, H) to a peer. Raises PeerError."""
        try:
            connection = self._connection(node, address)
            self._next_id = (self._next_id + 1) % (1 << 32)
            connection.sock.settimeout(self._call_deadline_s)
            connection.send(frames.pack_experts(self._next_id, layer, experts, x, gates))
        except PeerError:
            self.forget(node)
            raise
        now = time.monotonic()
        deadline_s = now + self._call_deadline_s
        asked = layer, x.shape
        return PeerCall(self, node, connection, self._next_id, asked, now, deadline_s)

    def stats_of(self, node: NodeId) -> PeerStats:
        return self._stats.setdefault(node, PeerStats())

    def stats(self) -> dict[NodeId, PeerStats]:
        return dict(self._stats)

    def forget(self, node: NodeId) -> None:
        """Close the connection after a failure; the next call opens another."""
        self.stats_of(node).failures += 1
        _address, connection = self._connections.pop(node, (None, None))
        if connection is not None:
            connection.close()

    def close(self) -> None:
        for _address, connection in self._connections.values():
            connection.close()
        self._connections.clear()

    def _connection(self, node: NodeId, address: tuple[str, int]) -> Connection:
        known = self._connections.get(node)
        if known is not None and known[0] == address:
            return known[1]
        if known is not None:
            known[1].close()
        with peer_errors():
            sock = socket.create_connection(address, timeout=CONNECT_TIMEOUT_S)
        connection = Connection(sock)
        self._connections[node] = address, connection
        connection.send(frames.pack_text(Kind.HELLO, 0, self._introduction.to_json()))
        header, payload = connection.receive(self._call_deadline_s, self._call_deadline_s)
        if header.kind is Kind.ERROR:
            raise PeerGone(str(frames.refusal(payload)))
        if header.kind is not Kind.HELLO or frames.unpack_text(payload).get("node") != node:
            raise PeerGone(f"another device answers at {address[0]}:{address[1]}")
        return connection


@contextlib.contextmanager
def peer_errors() -> Any:
    """Turn what sockets raise into PeerSlow and PeerGone."""
    try:
        yield
    except TimeoutError as exc:  # before OSError: it is a subclass of it
        raise PeerSlow("no answer before the deadline") from exc
    except (OSError, EOFError) as exc:
        raise PeerGone(f"connection lost: {exc!r}") from exc
