"""What calls and probes on loopback tell of a link, and what they must not be taken for."""

import threading
import time

import numpy as np
import pytest

from coeld.datapath.dispatch import RouteBoard
from coeld.datapath.frames import SpanCall
from coeld.datapath.links import SURE
from coeld.engine.watch import Watch, Watched
from coeld.errors import PeerError
from coeld.ids import ModelHash, NodeId
from coeld.net.peers import PINGS, PeerPool, PeerServer
from coeld.routes import RouteTable
from tests.harness.peer_ends import CALLER, HIDDEN, SERVER, X, introduction

BUSY_S = 0.05


def samples(pool: PeerPool) -> list[int]:
    """Round trips since the last look, µs."""
    peer = pool.meter._peers.get(SERVER)
    return list(peer.fresh_us) if peer else []


@pytest.fixture
def busy():
    """A server that computes for a while."""

    def run(layer: int, experts, x, gates):
        threading.Event().wait(BUSY_S)
        return x

    made = PeerServer("127.0.0.1", 0)
    made.serve(introduction(SERVER), HIDDEN, run)
    yield made
    made.close()


def call(pool: PeerPool, server: PeerServer):
    return pool.call(SERVER, (server.host, server.port), 1, [1], X, None)


def test_a_call_tells_the_round_trip_without_what_the_peer_computed(busy, pool) -> None:
    pool.result(call(pool, busy))
    assert samples(pool) == [], "the first one opened the connection"
    for _ in range(3):
        pool.result(call(pool, busy))
    assert len(samples(pool)) == 3
    assert min(samples(pool)) < BUSY_S * 1e6 / 2


def test_an_answer_that_lay_there_while_the_caller_computed_tells_nothing(busy, pool) -> None:
    pool.result(call(pool, busy))
    late = call(pool, busy)
    threading.Event().wait(2 * BUSY_S)
    pool.result(late)
    assert samples(pool) == []
    pool.result(call(pool, busy))
    assert len(samples(pool)) == 1
    assert samples(pool)[0] < BUSY_S * 1e6


def test_a_call_that_was_given_up_tells_nothing(busy, pool) -> None:
    pool.result(call(pool, busy))
    slow = call(pool, busy)
    pool.send([slow], time.monotonic() + 1)
    pool.give_up(slow)
    end_s = time.monotonic() + 5
    while slow.outcome is None and time.monotonic() < end_s:
        pool.result(call(pool, busy))  # looks at what is owed
    assert slow.outcome is not None
    assert samples(pool)
    assert max(samples(pool)) < BUSY_S * 1e6


def test_large_calls_are_no_round_trips(server, pool) -> None:
    rows = np.zeros((512, HIDDEN), np.float32)
    for _ in range(3):
        pool.result(pool.call(SERVER, (server.host, server.port), 1, [1], rows, None))
    assert samples(pool) == []


def test_a_span_tells_the_round_trip(pool) -> None:
    class Doubling:
        def span(self, asked: SpanCall, x):
            threading.Event().wait(BUSY_S)
            return 2 * x[-asked.keep :]

        def free(self, number: int) -> None: ...
        def close(self) -> None: ...

    made = PeerServer("127.0.0.1", 0)
    made.serve(introduction(SERVER), HIDDEN, lambda *_: X, Doubling)
    asked = SpanCall(1, 0, 0, 2, 1)
    pool.span(SERVER, (made.host, made.port), asked, X).result()
    assert len(samples(pool)) == 1
    assert samples(pool)[0] < BUSY_S * 1e6
    made.close()


def test_a_probe_measures_without_a_call_and_a_stranger_is_not_measured(server, pool) -> None:
    where = (server.host, server.port)
    pool.probe(SERVER, where)
    assert len(samples(pool)) == PINGS
    assert pool.stats() == {}
    with pytest.raises(PeerError, match="another device"):
        pool.probe(NodeId("d" * 16), where)
    server.close()
    with pytest.raises(PeerError):
        pool.probe(SERVER, where)
    assert pool.stats() == {}, "it is no failed call"


def test_while_lots_are_loaded_at_either_end_nothing_is_measured(server, pool) -> None:
    where = (server.host, server.port)
    server.busy = True
    with pytest.raises(PeerError, match="lots are loaded"):
        pool.probe(SERVER, where)
    server.busy = False
    pool.meter.paused = True
    pool.probe(SERVER, where)
    assert samples(pool) == []
    pool.meter.paused = False
    pool.probe(SERVER, where)
    assert len(samples(pool)) == PINGS


def test_the_watch_probes_silent_peers_and_tells_changes_once(server, pool) -> None:
    said: list[list[list[object]]] = []
    board = RouteBoard()
    watched = Watched(CALLER, board, pool)
    watch = Watch(lambda: watched, lambda event, links: said.append(links))
    watch.look(watched)
    gone = NodeId("9" * 16)
    addresses = {
        SERVER: (server.host, server.port),
        CALLER: ("127.0.0.1", 1),
        gone: ("127.0.0.1", 1),
    }
    board.pin(RouteTable(ModelHash("5e" * 32), 1, {}, addresses))
    assert said == []
    for _ in range(SURE):
        watch.look(watched)
    assert [[link[0] for link in links] for links in said] == [[SERVER]]
    watch.stop()
    watch.run()


def test_a_watch_that_is_stopped_ends() -> None:
    watch = Watch(lambda: None, lambda *_: None)
    thread = threading.Thread(target=watch.run)
    thread.start()
    watch.stop()
    thread.join(5)
    assert not thread.is_alive()
