"""A peer that cannot be reached straight is reached through another: real sockets on loopback.

The caller is told a port of the peer's where nobody listens, the device in between knows better:
that is what a link that is cut between two of three devices looks like.
"""

import socket
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from coeld.compression.transfer import LinkSpeed
from coeld.datapath import frames
from coeld.datapath.frames import Kind, SpanCall
from coeld.errors import PeerError, PeerGone
from coeld.ids import NodeId
from coeld.net import expert_calls, reach
from coeld.net.connection import Connection
from coeld.net.expert_calls import LINK_BYTES
from coeld.net.peers import PeerPool, PeerServer
from tests.harness.peer_ends import CALLER, HIDDEN, SERVER, X, introduction, run

BETWEEN = NodeId("b" * 16)
WAIT_S = 30.0


class Host:
    """Serves spans: adds up the positions it was asked for."""

    def span(self, asked: SpanCall, x):
        return x[-asked.keep :] + asked.position

    def free(self, number: int) -> None: ...
    def close(self) -> None: ...


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


class Three:
    """Caller, device in between, peer; the caller knows a dead address of the peer."""

    def __init__(self) -> None:
        self.peer, self.between = PeerServer("127.0.0.1", 0), PeerServer("127.0.0.1", 0)
        self.dead = ("127.0.0.1", closed_port())
        self.known = {SERVER: (self.peer.host, self.peer.port)}
        self.peer.serve(introduction(SERVER), HIDDEN, run, Host)
        self.between.serve(introduction(BETWEEN), HIDDEN, run, None, lambda: self.known)
        between = self.between.host, self.between.port
        known = {CALLER: ("127.0.0.1", closed_port()), SERVER: self.dead, BETWEEN: between}
        self.pool = PeerPool(introduction(CALLER), 1.0, addresses=lambda: known)

    def ask(self, layer: int = 1):
        return self.pool.result(self.pool.call(SERVER, self.dead, layer, [1, 2], X, None))

    def span(self, number: int, position: int = 0):
        asked = SpanCall(number, position, 0, 2, len(X))
        return self.pool.span(SERVER, self.dead, asked, X).result()

    def lose(self) -> None:
        """The first call finds out that the straight way is none."""
        with pytest.raises(PeerError):
            self.ask()

    def close(self) -> None:
        self.pool.close()
        self.between.close()
        self.peer.close()


@pytest.fixture
def three() -> Iterator[Three]:
    made = Three()
    yield made
    made.close()


def test_calls_go_through_another_device_when_the_straight_way_has_failed(three: Three) -> None:
    three.lose()
    assert three.pool.another_way(SERVER)
    for layer in range(5):
        assert np.array_equal(three.ask(layer), X * (layer + 1) * 2)
    assert three.pool.stats()[SERVER].calls == 5


def test_a_way_through_another_device_tells_how_fast_it_is_but_not_of_the_link(
    three: Three, monkeypatch: pytest.MonkeyPatch
) -> None:
    way = LinkSpeed(0.02, 2e6)
    monkeypatch.setattr(expert_calls, "link_of", lambda _sock: way)
    three.lose()
    rows = np.ones((LINK_BYTES // (4 * HIDDEN), HIDDEN), np.float32)
    for x in (X, rows, X):
        three.pool.result(three.pool.call(SERVER, three.dead, 1, [1, 2], x, None))
    assert three.pool.links == {SERVER: way}
    assert three.pool.meter.look([SERVER]) == ()
    assert not three.pool.meter._peers


def test_spans_and_their_caches_work_through_another_device(three: Three) -> None:
    with pytest.raises(PeerError):
        three.span(1)
    assert np.array_equal(three.span(1), X)
    assert np.array_equal(three.span(1, position=3), X + 3)


def test_the_straight_way_is_found_again_beside_calls_and_spans(
    three: Three, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reach, "STRAIGHT_S", 0.01)
    three.lose()
    three.ask()
    three.span(1)
    heard = []
    mended = PeerServer(*three.dead)
    mended.serve(introduction(SERVER), HIDDEN, lambda *asked: heard.append(1) or run(*asked), Host)
    try:
        end = time.monotonic() + WAIT_S
        while not heard and time.monotonic() < end:
            assert np.array_equal(three.ask(), X * 4)
        assert heard
        three.pool.free(SERVER, 1)
        assert np.array_equal(three.span(2), X)
        three.peer.close()  # only the straight way is left
        three.between.close()
        assert np.array_equal(three.span(2, position=3), X + 3)
        assert np.array_equal(three.ask(), X * 4)
    finally:
        mended.close()


def test_a_device_in_between_that_cannot_reach_the_peer_says_so_at_once(three: Three) -> None:
    three.lose()
    three.known[SERVER] = three.dead
    began_s = time.monotonic()
    with pytest.raises(PeerGone, match="connection lost"):
        three.ask()
    assert time.monotonic() - began_s < 1.0  # the call's deadline
    three.known.clear()
    assert not three.pool.another_way(SERVER)


def hello(three: Three, **more: object) -> tuple[Kind, str]:
    connection = Connection(socket.create_connection((three.between.host, three.between.port)))
    text = introduction(CALLER).to_json() | more
    connection.send(frames.pack_text(Kind.HELLO, 0, text), 1.0)
    header, payload = connection.receive(5.0, 5.0)
    said = frames.unpack_text(payload)
    connection.close()
    return header.kind, str(said.get("message", said.get("node")))


def test_only_devices_of_the_swarm_are_handed_on_to(three: Three) -> None:
    assert hello(three, to=SERVER) == (Kind.HELLO, SERVER)
    assert hello(three, to=BETWEEN) == (Kind.HELLO, BETWEEN)
    for unknown in ("f" * 16, 7, None, ["x"], {"a": 1}, "127.0.0.1:22"):
        kind, why = hello(three, to=unknown)
        assert (kind, "does not know" in why) == (Kind.ERROR, True), unknown
    assert hello(three, to=SERVER, swarm="another")[0] is Kind.ERROR


def test_a_connection_is_handed_on_once_and_never_in_a_circle(three: Three) -> None:
    three.known[SERVER] = (three.between.host, three.between.port)
    assert hello(three, to=SERVER) == (Kind.HELLO, BETWEEN)  # the caller sees that it is another


def test_a_tunnel_ends_with_either_of_its_ends(three: Three) -> None:
    three.lose()
    three.ask()
    three.peer.close()
    with pytest.raises(PeerGone):
        three.ask()
    three.pool.close()
    end = time.monotonic() + WAIT_S
    while three.between._connections and time.monotonic() < end:
        threading.Event().wait(0.01)
    assert not three.between._connections
