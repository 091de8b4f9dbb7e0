"""Spans over sockets, with a host that remembers what it was asked: good callers and bad ones."""

import contextlib
import socket
import threading
from random import Random

import numpy as np
import pytest

from coeld.compression.transfer import LinkSpeed
from coeld.compression.wire import relative_error
from coeld.datapath import frames, pace
from coeld.datapath.frames import HEADER, Kind, SpanCall
from coeld.errors import CacheLost, PeerGone, PeerRefused, PeerSlow
from coeld.ids import NodeId
from coeld.net.peers import Introduction, PeerPool, PeerServer

HIDDEN, WAIT_S = 8, 30
SERVER, CALLER = NodeId("5" * 16), NodeId("c" * 16)
X = np.arange(3 * HIDDEN, dtype=np.float32).reshape(3, HIDDEN)


class Host:
    """Doubles rows. Refuses layer 9, knows nothing of request 7, dawdles at layer 5."""

    def __init__(self) -> None:
        self.asked: list[SpanCall] = []
        self.freed: list[int] = []
        self.closed = threading.Event()
        self.heard = threading.Event()
        self.go_on = threading.Event()

    def span(self, asked: SpanCall, x):
        self.asked.append(asked)
        if asked.first == 9:
            raise PeerRefused("layer 9 is no span here")
        if asked.number == 7:
            raise CacheLost("request 7 is not known")
        if asked.first == 5:
            assert self.go_on.wait(WAIT_S)
        return 2 * x[-asked.keep :]

    def free(self, number: int) -> None:
        self.freed.append(number)
        self.heard.set()

    def close(self) -> None:
        self.closed.set()


@pytest.fixture
def hosts():
    return []


@pytest.fixture
def server(hosts):
    def welcome() -> Host:
        hosts.append(Host())
        return hosts[-1]

    made = PeerServer("127.0.0.1", 0)
    made.serve(Introduction("s", "m", SERVER), HIDDEN, lambda *_asked: X, welcome)
    yield made
    for host in hosts:
        host.go_on.set()
    made.close()


@pytest.fixture
def pool():
    made = PeerPool(Introduction("s", "m", CALLER), 1.0)
    yield made
    made.close()


def ask(pool, server, number: int = 1, first: int = 0, keep: int = 3, x=X):
    asked = SpanCall(number, 0, first, first + 2, keep)
    return pool.span(SERVER, (server.host, server.port), asked, x).result()


def test_spans_of_all_requests_go_over_one_connection(server, pool, hosts) -> None:
    for number in range(20):
        assert np.array_equal(
            ask(pool, server, number + 10, keep=1 + number % 3), 2 * X[-1 - number % 3 :]
        )
    assert [asked.number for asked in hosts[0].asked] == list(range(10, 30))
    assert len(hosts) == 1
    assert pool.stats()[SERVER].calls == 20


def test_spans_whose_rows_may_err_cross_a_slow_link_small(pool, hosts, monkeypatch) -> None:
    for module in ("peers", "span_calls"):
        monkeypatch.setattr(f"coeld.net.{module}.link_of", lambda _sock: LinkSpeed(0.02, 1e6))
    x = np.random.default_rng(4).standard_normal((64, 96)).astype(np.float32)
    made = PeerServer("127.0.0.1", 0)
    made.serve(Introduction("s", "m", SERVER), 96, lambda *_asked: X, Host)
    address, asked = (made.host, made.port), SpanCall(1, 0, 0, 2, 64)
    reply = pool.span(SERVER, address, asked, x, (0.03, 0.05))
    assert relative_error(2 * x, reply.result()) <= np.hypot(0.03, 0.05)
    traffic = reply.traffic
    assert max(traffic.sent_bytes, traffic.received_bytes) < 0.25 * x.nbytes
    assert (0 < traffic.errors[0] <= 0.03, 0 < traffic.errors[1] <= 0.05) == (True, True)
    exact = pool.span(SERVER, address, asked, x)
    assert np.array_equal(exact.result(), 2 * x)
    assert (exact.traffic.sent_bytes, exact.traffic.received_bytes) == (x.nbytes, x.nbytes)
    assert exact.traffic.errors == (0.0, 0.0)
    made.close()


def test_a_refusal_says_which_kind_it_is_and_keeps_the_caches(server, pool, hosts) -> None:
    ask(pool, server)
    with pytest.raises(CacheLost, match="request 7"):
        ask(pool, server, number=7)
    with pytest.raises(PeerRefused, match="layer 9") as refused:
        ask(pool, server, first=9)
    assert not isinstance(refused.value, CacheLost)
    assert np.array_equal(ask(pool, server), 2 * X)
    assert (len(hosts), hosts[0].closed.is_set()) == (1, False)


def test_a_request_that_ends_is_told_and_a_peer_that_is_gone_is_not_missed(
    server, pool, hosts
) -> None:
    pool.free(SERVER, 3)  # never called: nothing to free
    ask(pool, server)
    pool.free(SERVER, 3)
    assert hosts[0].heard.wait(WAIT_S)
    assert hosts[0].freed == [3]
    server.close()
    for _ in range(3):
        pool.free(SERVER, 3)


def test_caches_go_with_the_connection(server, pool, hosts) -> None:
    ask(pool, server)
    pool.close()
    assert hosts[0].closed.wait(WAIT_S)


def test_a_late_answer_costs_the_connection_and_is_not_taken_for_another(
    server, pool, hosts, monkeypatch
) -> None:
    monkeypatch.setattr(pace, "ROW_LAYER_S", 0.0)
    slow = PeerPool(Introduction("s", "m", CALLER), 0.2)
    with pytest.raises(PeerSlow):
        ask(slow, server, first=5)
    hosts[0].go_on.set()
    assert hosts[0].closed.wait(WAIT_S)
    assert np.array_equal(ask(slow, server), 2 * X)
    slow.close()


def test_more_rows_and_layers_get_more_time(server, hosts, monkeypatch) -> None:
    monkeypatch.setattr(pace, "ROW_LAYER_S", WAIT_S / 6)  # three rows, two layers
    patient = PeerPool(Introduction("s", "m", CALLER), 0.2)
    answers: list[object] = []
    caller = threading.Thread(target=lambda: answers.append(ask(patient, server, first=5)))
    caller.start()
    caller.join(0.5)
    assert caller.is_alive()
    hosts[0].go_on.set()
    caller.join(WAIT_S)
    assert np.array_equal(answers[0], 2 * X)
    patient.close()


def test_another_model_closes_connections_and_their_caches(server, pool, hosts) -> None:
    ask(pool, server)
    server.serve(Introduction("s", "other", SERVER), HIDDEN, lambda *_asked: X, Host)
    assert hosts[0].closed.wait(WAIT_S)
    with pytest.raises(PeerGone):
        ask(pool, server)
    with pytest.raises(PeerGone, match="another model"):
        ask(pool, server)


def greeted(server: PeerServer) -> socket.socket:
    sock = socket.create_connection((server.host, server.port), timeout=WAIT_S)
    hello = {"swarm": "s", "model": "m", "node": CALLER}
    sock.sendall(b"".join(frames.pack_text(Kind.HELLO, 0, hello)))
    head = sock.recv(HEADER.size, socket.MSG_WAITALL)
    sock.recv(frames.parse_header(head).payload_bytes, socket.MSG_WAITALL)
    return sock


def span_bytes(x=X, **fields) -> bytes:
    asked = SpanCall(**{"number": 1, "position": 0, "first": 0, "stop": 2, "keep": 1, **fields})
    return b"".join(bytes(piece) for piece in frames.pack_span(1, asked, x))


@pytest.mark.parametrize(
    "bad",
    [
        span_bytes(X[:, :-1]),
        span_bytes(np.full_like(X, np.nan)),
        span_bytes(keep=9),
        span_bytes(position=frames.POSITION_MAX),
        b"".join(frames.pack_result(1, 0, X)[:1]) + X.tobytes(),
    ],
    ids=["narrow rows", "NaN", "keeps too many", "far position", "a result"],
)
def test_bad_spans_end_with_a_reason_and_nobody_else_notices(server, pool, hosts, bad) -> None:
    ask(pool, server)
    with greeted(server) as sock:
        sock.sendall(span_bytes())
        head = frames.parse_header(sock.recv(HEADER.size, socket.MSG_WAITALL))
        sock.recv(head.payload_bytes, socket.MSG_WAITALL)
        sock.sendall(bad)
        head = frames.parse_header(sock.recv(HEADER.size, socket.MSG_WAITALL))
        assert head.kind is Kind.ERROR
        assert hosts[1].closed.wait(WAIT_S)
    assert len(hosts[1].asked) == 1
    assert np.array_equal(ask(pool, server), 2 * X)
    assert not hosts[0].closed.is_set()


def test_damaged_spans_close_their_own_connection_only(server, pool, hosts, monkeypatch) -> None:
    monkeypatch.setattr(Host, "span", lambda _self, asked, x: 2 * x[-asked.keep :])
    ask(pool, server)
    rng, good = Random(5), span_bytes()
    for _ in range(100):
        data = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        with greeted(server) as sock, contextlib.suppress(OSError):  # it may be closed already
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(4096):
                pass
    assert np.array_equal(ask(pool, server), 2 * X)
    assert all(host.closed.wait(WAIT_S) for host in hosts[1:])
