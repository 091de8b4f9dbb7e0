"""Calls of experts on loopback: slow peers, late answers, rows that may err."""

import socket
import threading
import time

import numpy as np
import pytest

from coeld.compression.transfer import LinkSpeed
from coeld.compression.wire import relative_error
from coeld.datapath import frames
from coeld.datapath.frames import HEADER, Kind
from coeld.errors import FrameError, PeerError, PeerGone, PeerRefused, PeerSlow
from coeld.ids import NodeId
from coeld.net import peers
from coeld.net.exchange import link_of
from coeld.net.peers import PeerPool, PeerServer
from tests.harness.peer_ends import CALLER, HIDDEN, SERVER, X, ask, introduction, run


class Sluggish:
    """A server that holds every answer back until it is told to go on."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.runs = 0
        self.server = PeerServer("127.0.0.1", 0)
        self.server.serve(introduction(SERVER), HIDDEN, self.run)

    def run(self, layer, experts, x, gates):
        self.go.wait(5)
        self.runs += 1
        return x * (layer + 1) * len(experts)

    def call(self, pool: PeerPool, layer: int = 1):
        return pool.call(SERVER, (self.server.host, self.server.port), layer, [1, 2], X, None)


@pytest.fixture
def sluggish():
    made = Sluggish()
    yield made
    made.go.set()
    made.server.close()


def opened(pool: PeerPool, sluggish: Sluggish) -> None:
    """The connection stands and its first call is over."""
    sluggish.go.set()
    pool.result(sluggish.call(pool))
    sluggish.go.clear()


def test_a_late_answer_is_taken_off_and_the_next_call_gets_its_own(pool, sluggish) -> None:
    opened(pool, sluggish)
    late = sluggish.call(pool, layer=1)
    assert pool.ready([late], time.monotonic() + 0.05) == []
    pool.give_up(late)
    assert pool.paces.owing(SERVER)
    following = sluggish.call(pool, layer=4)
    sluggish.go.set()
    assert np.array_equal(pool.result(following), X * 10)
    end = time.monotonic() + 3
    while pool.paces.owing(SERVER) and time.monotonic() < end:  # every call looks at what is owed
        assert np.array_equal(pool.result(sluggish.call(pool)), X * 4)
    assert late.outcome is not None
    pace = pool.paces.of(SERVER, len(X))
    assert pace is not None
    assert pace.deviation_s > 0.005  # the late one told how slow the peer can be
    assert (pool.stats()[SERVER].late, pool.stats()[SERVER].failures) == (1, 0)


def test_threads_that_share_a_pool_never_share_a_connection(pool) -> None:
    """Whoever sweeps gives free what another takes at once: forced, between the two looks."""
    answer = threading.Event()

    def run_late(layer, experts, x, gates):
        if layer != 1:
            answer.wait(5)
        return run(layer, experts, x, gates)

    server = PeerServer("127.0.0.1", 0)
    server.serve(introduction(SERVER), HIDDEN, run_late)
    address, calls, theirs = (server.host, server.port), pool._experts, []
    pool.result(pool.call(SERVER, address, 1, [1, 2], X, None))
    late = pool.call(SERVER, address, 7, [1, 2], X, None)
    pool.give_up(late)
    answer.set()
    assert late.exchange.wait(3)
    answer.clear()
    account = calls._account

    def taken_at_once(call) -> None:
        account(call)
        if call is late:
            other = threading.Thread(
                target=lambda: theirs.append(pool.call(SERVER, address, 4, [1, 2], X, None))
            )
            other.start()
            other.join()

    calls._account = taken_at_once
    mine = pool.call(SERVER, address, 1, [1, 2], X, None)
    assert theirs[0].exchange is late.exchange
    assert calls._owing == []
    assert np.array_equal(pool.result(mine), X * 4)
    answer.set()
    assert np.array_equal(pool.result(theirs[0]), X * 10)
    server.close()


def test_a_given_up_call_that_is_never_answered_closes_the_connection_and_is_told(sluggish) -> None:
    lost: list[tuple[NodeId, PeerError]] = []
    pool = PeerPool(introduction(CALLER), 0.2, lambda node, exc: lost.append((node, exc)))
    opened(pool, sluggish)
    pool.give_up(sluggish.call(pool))
    other = PeerServer("127.0.0.1", 0)
    other.serve(introduction(CALLER), HIDDEN, run)
    end = time.monotonic() + 5
    while not lost and time.monotonic() < end:  # calls to others go on meanwhile
        pool.result(pool.call(CALLER, (other.host, other.port), 0, [1], X, None))
    assert [(node, type(exc)) for node, exc in lost] == [(SERVER, PeerSlow)]
    assert pool.paces.expected_s(SERVER, len(X), time.monotonic()) > 0.01
    sluggish.go.set()
    assert np.array_equal(pool.result(sluggish.call(pool)), X * 4)
    other.close()
    pool.close()


def test_one_stuck_call_says_nothing_against_a_peer_that_answers_others() -> None:
    lost: list[tuple[NodeId, PeerError]] = []
    pool = PeerPool(introduction(CALLER), 0.2, lambda node, exc: lost.append((node, exc)))
    go = threading.Event()

    def stuck(layer, experts, x, gates):
        if layer == 7:
            go.wait(5)
        return run(layer, experts, x, gates)

    server = PeerServer("127.0.0.1", 0)
    server.serve(introduction(SERVER), HIDDEN, stuck)
    ask(pool, server)
    pool.give_up(pool.call(SERVER, (server.host, server.port), 7, [1, 2], X, None))
    end = time.monotonic() + 5
    while not pool.stats()[SERVER].failures and time.monotonic() < end:
        assert np.array_equal(ask(pool, server), X * 4)
    assert pool.stats()[SERVER].failures == 1
    assert lost == []
    go.set()
    server.close()
    pool.close()


def test_where_packets_get_lost_a_peer_may_owe_more(pool, sluggish) -> None:
    opened(pool, sluggish)
    pool.paces.losses.note(SERVER, 1, time.monotonic())
    for _ in range(6):
        call = sluggish.call(pool)
        pool.send([call], time.monotonic() + 1)
        pool.give_up(call)


def test_a_peer_that_owes_too_many_answers_is_not_called_until_it_has_given_one(
    pool, sluggish
) -> None:
    opened(pool, sluggish)
    for _ in range(4):
        call = sluggish.call(pool)
        pool.send([call], time.monotonic() + 1)
        assert pool.ready([call], time.monotonic() + 0.02) == []
        pool.give_up(call)
    with pytest.raises(PeerSlow, match="4 answers"):
        sluggish.call(pool)
    sluggish.go.set()
    end = time.monotonic() + 3
    while True:
        try:
            call = sluggish.call(pool)
            break
        except PeerSlow:
            assert time.monotonic() < end
            threading.Event().wait(0.01)
    assert np.array_equal(pool.result(call), X * 4)


def test_calls_from_many_threads_each_get_their_own_answer(server, pool) -> None:
    wrong: list[int] = []

    def ask_often(layer: int) -> None:
        answers = [ask(pool, server, layer) for _ in range(50)]
        wrong.extend(layer for y in answers if not np.array_equal(y, X * 2 * (layer + 1)))

    threads = [threading.Thread(target=ask_often, args=(layer,)) for layer in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert pool.stats()[SERVER].calls == 400


def test_a_frozen_peer_blocks_neither_opening_nor_sending(pool) -> None:
    """Its kernel accepts connections and some bytes; nobody reads them."""
    with socket.create_server(("127.0.0.1", 0)) as frozen:
        rows = np.zeros((512, 32768), np.float32)  # 64 MiB: more than any socket buffer
        started = time.monotonic()
        call = pool.call(SERVER, frozen.getsockname(), 0, [1], rows, None)
        assert time.monotonic() - started < 0.5
        assert pool.ready([call], time.monotonic() + 0.05) == []
        pool.give_up(call)  # the rows are not ours to keep: the connection goes
        assert isinstance(call.outcome, PeerSlow)
        assert not pool.paces.owing(SERVER)


def test_a_quick_peer_is_heard_while_another_is_silent(server, pool, sluggish) -> None:
    silent = sluggish.call(pool)
    quick = pool.call(CALLER, (server.host, server.port), 0, [1], X, None)
    with pytest.raises(PeerGone, match="another device"):  # it is not CALLER who answers
        pool.result(quick)
    assert silent.outcome is None
    sluggish.go.set()
    assert np.array_equal(pool.result(silent), X * 4)


def answering(pieces) -> socket.socket:
    """A listener whose first caller gets HELLO and then what `pieces(call_id)` yields."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        sock, _ = listener.accept()
        with sock:
            for first in (True, False):
                head = frames.parse_header(sock.recv(HEADER.size, socket.MSG_WAITALL))
                sock.recv(head.payload_bytes, socket.MSG_WAITALL)
                if first:
                    hello = {"swarm": "s", "model": "m", "node": SERVER}
                    sock.sendall(b"".join(frames.pack_text(Kind.HELLO, 0, hello)))
            try:
                for piece in pieces(head.call_id):
                    sock.sendall(piece)
                sock.recv(1)
            except OSError:
                pass  # cut off

    threading.Thread(target=answer, daemon=True).start()
    return listener


def test_an_answer_that_comes_byte_by_byte_ends_at_the_deadline() -> None:
    def drip(call_id: int):
        for byte in b"".join(frames.pack_result(call_id, 0, X)):
            yield bytes([byte])
            threading.Event().wait(0.05)

    pool = PeerPool(introduction(CALLER), 0.3)
    with answering(drip) as listener:
        started = time.monotonic()
        with pytest.raises(PeerSlow):
            pool.result(pool.call(SERVER, listener.getsockname(), 0, [1], X, None))
        assert time.monotonic() - started < 1.0
    pool.close()


def test_an_answer_in_odd_pieces_is_put_together(pool) -> None:
    def pieces(call_id: int):
        data = b"".join(frames.pack_result(call_id, 0, X))
        for at in range(0, len(data), 7):
            yield data[at : at + 7]
            threading.Event().wait(0.001)

    with answering(pieces) as listener:
        call = pool.call(SERVER, listener.getsockname(), 0, [1], X, None)
        assert np.array_equal(pool.result(call), X)


def test_more_than_was_asked_for_is_refused_before_it_is_read(pool) -> None:
    def flood(call_id: int):
        yield b"".join(frames.pack_result(call_id, 0, np.zeros((512, 4096), np.float32)))

    with answering(flood) as listener:
        call = pool.call(SERVER, listener.getsockname(), 0, [1], X, None)
        with pytest.raises(FrameError, match="asked for"):
            pool.result(call)
        assert len(call.exchange._in) < 1 << 16


def test_an_answer_nobody_asked_for_costs_the_connection(pool) -> None:
    def twice(call_id: int):
        yield 2 * b"".join(frames.pack_result(call_id, 0, X))

    with answering(twice) as listener:
        call = pool.call(SERVER, listener.getsockname(), 0, [1], X, None)
        assert np.array_equal(pool.result(call), X)
        assert pool.stats()[SERVER].failures == 1


def test_a_name_instead_of_an_address_is_not_looked_up(pool) -> None:
    with pytest.raises(PeerGone):
        pool.call(SERVER, ("localhost", 1), 0, [1], X, None)


SLOW_LINK = LinkSpeed(0.001, 1e5)
MANY = np.random.default_rng(5).standard_normal((64, 96)).astype(np.float32)


@pytest.fixture
def wide_server(monkeypatch):
    """Over a link that it knows to be slow."""
    monkeypatch.setattr(peers, "link_of", lambda _sock: SLOW_LINK)
    made = PeerServer("127.0.0.1", 0)
    made.serve(introduction(SERVER), MANY.shape[1], run)
    yield made
    made.close()


def ask_many(pool: PeerPool, server: PeerServer, errors):
    call = pool.call(SERVER, (server.host, server.port), 1, [1, 2], MANY, None, errors)
    return pool.result(call), call.traffic


def test_rows_that_may_err_cross_a_slow_link_small_and_within_what_is_allowed(
    wide_server, pool
) -> None:
    pool.links[SERVER] = SLOW_LINK
    y, traffic = ask_many(pool, wide_server, (0.03, 0.05))
    assert traffic.sent_bytes < 0.25 * MANY.nbytes
    assert traffic.received_bytes < 0.25 * MANY.nbytes
    assert 0 < traffic.errors[0] <= 0.03
    assert 0 < traffic.errors[1] <= 0.05
    assert relative_error(MANY * 4, y) == pytest.approx(np.hypot(*traffic.errors), rel=0.1)


def follow(pool: PeerPool, server: PeerServer, x, errors=(0.03, 0.05)):
    call = pool.call(SERVER, (server.host, server.port), 1, [1, 2], x, None, errors)
    assert relative_error(x * 4, pool.result(call)) <= np.hypot(*errors)
    return call.traffic.sent_bytes


def test_rows_like_those_of_the_call_before_are_told_in_fewer_bytes(wide_server, pool) -> None:
    pool.links[SERVER] = SLOW_LINK
    rng = np.random.default_rng(6)
    x, sizes = MANY.copy(), []
    for _ in range(5):
        sizes.append(follow(pool, wide_server, x))
        x = x + 0.05 * rng.standard_normal(x.shape).astype(np.float32)
    assert max(sizes[1:]) < 0.8 * sizes[0]
    # An exact call leaves nothing on either end; nor does one of other rows break anything.
    ask_many(pool, wide_server, (0.0, 0.0))
    assert follow(pool, wide_server, x) > 0.95 * sizes[0]
    assert follow(pool, wide_server, MANY[::-1] * MANY) > 0.95 * sizes[0]
    follow(pool, wide_server, MANY[:50])
    assert (pool.stats()[SERVER].calls, pool.stats()[SERVER].failures) == (9, 0)


def test_a_refused_call_leaves_nothing_to_refer_to(monkeypatch, pool) -> None:
    monkeypatch.setattr(peers, "link_of", lambda _sock: SLOW_LINK)
    refusing = iter([False, True, False])

    def sometimes(layer, experts, x, gates):
        if next(refusing):
            raise PeerRefused("not now")
        return run(layer, experts, x, gates)

    made = PeerServer("127.0.0.1", 0)
    made.serve(introduction(SERVER), MANY.shape[1], sometimes)
    pool.links[SERVER] = SLOW_LINK
    first = follow(pool, made, MANY)
    with pytest.raises(PeerRefused):
        follow(pool, made, MANY)
    assert follow(pool, made, MANY) == first
    made.close()


def test_exact_rows_travel_whole_however_slow_the_link(wide_server, pool) -> None:
    pool.links[SERVER] = SLOW_LINK
    y, traffic = ask_many(pool, wide_server, (0.0, 0.0))
    assert np.array_equal(y, MANY * 4)
    assert (traffic.sent_bytes, traffic.received_bytes) == (MANY.nbytes, MANY.nbytes)


def test_over_a_link_that_is_not_known_yet_nothing_is_lost_on_the_way_out(
    wide_server, pool
) -> None:
    _y, traffic = ask_many(pool, wide_server, (0.03, 0.05))
    assert (traffic.sent_bytes, traffic.errors[0]) == (MANY.nbytes, 0.0)
    assert traffic.received_bytes < 0.25 * MANY.nbytes


def test_the_kernel_tells_the_speed_of_a_link(server, pool) -> None:
    x = np.zeros((512, HIDDEN), np.float32)
    for _ in range(20):
        pool.result(pool.call(SERVER, (server.host, server.port), 1, [1], x, None))
    link = pool.links.get(SERVER)
    assert link is None or (0 < link.rtt_s < 1 and link.bytes_per_s > 1e5)
    with socket.socket() as unconnected:
        assert link_of(unconnected) is None
