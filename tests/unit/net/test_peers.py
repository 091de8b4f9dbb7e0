"""The sockets of the data path, on loopback, with good peers and bad ones."""

import socket
import struct
import threading
import time
from random import Random

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
from coeld.net.peers import Introduction, PeerPool, PeerServer

HIDDEN = 8
SERVER, CALLER = NodeId("5" * 16), NodeId("c" * 16)
X = np.arange(2 * HIDDEN, dtype=np.float32).reshape(2, HIDDEN)


def run(layer: int, experts, x, gates):
    if layer == 9:
        raise PeerRefused("layer 9 is not here")
    return x * (layer + 1) * len(experts)


def introduction(node: NodeId, model: str = "m", swarm: str = "s") -> Introduction:
    return Introduction(swarm, model, node)


@pytest.fixture
def server():
    made = PeerServer("127.0.0.1", 0)
    made.serve(introduction(SERVER), HIDDEN, run)
    yield made
    made.close()


@pytest.fixture
def pool():
    made = PeerPool(introduction(CALLER), 1.0)
    yield made
    made.close()


def ask(pool: PeerPool, server: PeerServer, layer: int = 1, node: NodeId = SERVER):
    return pool.result(pool.call(node, (server.host, server.port), layer, [1, 2], X, None))


def raw(server: PeerServer) -> socket.socket:
    return socket.create_connection((server.host, server.port), timeout=5)


def greeted(server: PeerServer) -> socket.socket:
    sock = raw(server)
    sock.sendall(b"".join(frames.pack_text(Kind.HELLO, 0, introduction(CALLER).to_json())))
    head = sock.recv(HEADER.size, socket.MSG_WAITALL)
    sock.recv(frames.parse_header(head).payload_bytes, socket.MSG_WAITALL)
    return sock


def test_calls_come_back_summed_and_are_counted(server, pool) -> None:
    for _ in range(50):
        assert np.array_equal(ask(pool, server), X * 4)
    assert pool.stats()[SERVER].calls == 50
    assert len(pool.stats()[SERVER].rtt_us) == 50


def test_a_refusal_keeps_the_connection(server, pool) -> None:
    with pytest.raises(PeerRefused, match="layer 9"):
        ask(pool, server, layer=9)
    assert np.array_equal(ask(pool, server), X * 4)


@pytest.mark.parametrize("wrong", [{"model": "other"}, {"swarm": "other"}])
def test_a_device_with_another_model_or_swarm_is_turned_away(server, wrong) -> None:
    pool = PeerPool(introduction(CALLER, **wrong), 1.0)
    with pytest.raises(PeerGone, match="another"):
        ask(pool, server)
    pool.close()


def test_another_device_at_the_address_is_noticed(server, pool) -> None:
    with pytest.raises(PeerGone, match="another device"):
        ask(pool, server, node=NodeId("d" * 16))


def test_nobody_listening_is_gone_at_once(pool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as placeholder:
        address = placeholder.getsockname()
    with pytest.raises(PeerGone):
        pool.result(pool.call(SERVER, address, 0, [1], X, None))


def test_a_peer_that_never_answers_is_slow_and_its_late_answer_is_not_mistaken(server) -> None:
    release = threading.Event()

    def sluggish(layer, experts, x, gates):
        release.wait(5)
        return x * 0

    server.serve(introduction(SERVER), HIDDEN, sluggish)
    pool = PeerPool(introduction(CALLER), 0.1)
    with pytest.raises(PeerSlow):
        ask(pool, server)
    release.set()
    server.serve(introduction(SERVER), HIDDEN, run)
    assert np.array_equal(ask(pool, server), X * 4)
    pool.close()


def test_a_restarted_peer_is_called_over_a_new_connection(pool) -> None:
    first = PeerServer("127.0.0.1", 0)
    first.serve(introduction(SERVER), HIDDEN, run)
    ask(pool, first)
    first.close()
    with pytest.raises(PeerError):
        ask(pool, first)
    second = PeerServer("127.0.0.1", 0)
    second.serve(introduction(SERVER), HIDDEN, run)
    assert np.array_equal(ask(pool, second), X * 4)
    second.close()


def test_random_bytes_are_refused_and_valid_peers_do_not_notice(server, pool) -> None:
    ask(pool, server)
    rng = Random(3)
    for _ in range(300):
        with raw(server) as sock:
            try:
                sock.sendall(rng.randbytes(rng.randint(1, 400)))
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(4096):
                    pass
            except OSError:
                pass
    assert np.array_equal(ask(pool, server), X * 4)
    assert server.refused >= 200


def test_an_oversized_frame_is_refused_before_it_is_read(server) -> None:
    with greeted(server) as sock:
        size = frames.PAYLOAD_BYTES_MAX + 4
        rows = (size - 4) // 4
        sock.sendall(
            HEADER.pack(b"CoEL", frames.VERSION, Kind.EXPERTS, 1, 0, 1, 0, 1, rows, 1, size, 0.0)
        )
        kind = frames.parse_header(sock.recv(HEADER.size, socket.MSG_WAITALL)).kind
        assert kind is Kind.ERROR


def test_rows_of_another_width_are_refused(server) -> None:
    with greeted(server) as sock:
        narrow = np.zeros((1, HIDDEN - 1), np.float32)
        sock.sendall(b"".join(frames.pack_experts(1, 0, [0], narrow)))
        kind = frames.parse_header(sock.recv(HEADER.size, socket.MSG_WAITALL)).kind
        assert kind is Kind.ERROR


def message_from(sock: socket.socket) -> str:
    """What the ERROR says that the server sends next."""
    header = frames.parse_header(sock.recv(HEADER.size, socket.MSG_WAITALL))
    assert header.kind is Kind.ERROR
    return str(frames.refusal(memoryview(sock.recv(header.payload_bytes, socket.MSG_WAITALL))))


def test_a_peer_that_sends_half_a_frame_is_told_and_cut_off(server, monkeypatch) -> None:
    monkeypatch.setattr(peers, "FRAME_TIMEOUT_S", 0.1)
    with greeted(server) as sock:
        sock.sendall(b"CoEL")
        assert "did not go through" in message_from(sock)
        assert sock.recv(1) == b""


def test_a_peer_that_sends_byte_by_byte_is_cut_off_and_others_are_answered(
    server, pool, monkeypatch
) -> None:
    monkeypatch.setattr(peers, "FRAME_TIMEOUT_S", 0.5)
    with greeted(server) as sock:
        sock.settimeout(0.02)
        frame = b"".join(frames.pack_experts(1, 1, [1, 2], X))
        sent = 0
        for byte in frame:
            try:
                sock.sendall(bytes([byte]))
                sent += 1
                sock.recv(1)
                break  # it has been told
            except TimeoutError:
                assert np.array_equal(ask(pool, server), X * 4)
        assert sent < len(frame)
    assert server.refused == 1


def test_a_peer_that_never_reads_is_cut_off_and_others_are_answered(
    server, pool, monkeypatch
) -> None:
    monkeypatch.setattr(peers, "FRAME_TIMEOUT_S", 0.3)
    rows = np.ones((512, HIDDEN), np.float32)
    call = b"".join(frames.pack_experts(1, 1, [1, 2], rows))
    with greeted(server) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(0.05)
        end = time.monotonic() + 10
        while server.refused == 0 and time.monotonic() < end:
            try:
                sock.sendall(call)
            except TimeoutError:
                pass  # nobody reads us either: its answers are stuck
            except OSError:
                break
            assert np.array_equal(ask(pool, server), X * 4)
    end = time.monotonic() + 2
    while server.refused == 0 and time.monotonic() < end:
        assert np.array_equal(ask(pool, server), X * 4)
    assert server.refused == 1


def test_calls_repeated_and_interleaved_on_one_connection_are_answered_in_order(server) -> None:
    ids = [7, 7, 3, 9, 7]
    with greeted(server) as sock:
        sock.sendall(b"".join(b"".join(frames.pack_experts(n, 1, [1, 2], X)) for n in ids))
        for call_id in ids:
            header = frames.parse_header(sock.recv(HEADER.size, socket.MSG_WAITALL))
            payload = sock.recv(header.payload_bytes, socket.MSG_WAITALL)
            assert (header.kind, header.call_id) == (Kind.RESULT, call_id)
            assert np.array_equal(frames.unpack_result(header, memoryview(payload))[0], X * 4)


def test_connections_beyond_the_limit_are_closed(server, monkeypatch) -> None:
    monkeypatch.setattr(peers, "CONNECTIONS_MAX", 2)
    kept = [greeted(server) for _ in range(2)]
    with raw(server) as extra:
        assert extra.recv(1) == b""
    for sock in kept:
        sock.close()


@pytest.mark.parametrize(
    "lie",
    [
        lambda call_id: frames.pack_result(call_id + 1, 0, X),
        lambda call_id: frames.pack_result(call_id, 1, X),
        lambda call_id: frames.pack_result(call_id, 0, X[:1]),
        lambda call_id: frames.pack_result(call_id, 0, X[:, :1]),
        lambda call_id: frames.pack_text(Kind.HELLO, call_id, {}),
    ],
    ids=["another call", "another layer", "fewer rows", "narrower rows", "no result"],
)
def test_an_answer_to_something_else_is_not_accepted(pool, lie) -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        sock, _ = listener.accept()
        with sock:
            head = frames.parse_header(sock.recv(HEADER.size, socket.MSG_WAITALL))
            sock.recv(head.payload_bytes, socket.MSG_WAITALL)
            hello = {"swarm": "s", "model": "m", "node": SERVER}
            sock.sendall(b"".join(frames.pack_text(Kind.HELLO, 0, hello)))
            head = frames.parse_header(sock.recv(HEADER.size, socket.MSG_WAITALL))
            sock.recv(head.payload_bytes, socket.MSG_WAITALL)
            sock.sendall(b"".join(lie(head.call_id)))
            sock.recv(1)

    liar = threading.Thread(target=answer)
    liar.start()
    call = pool.call(SERVER, listener.getsockname(), 0, [1], X, None)
    with pytest.raises(FrameError):
        pool.result(call)
    liar.join()
    listener.close()


def test_closing_the_server_ends_its_threads() -> None:
    before = threading.active_count()
    server = PeerServer("127.0.0.1", 0)
    server.serve(introduction(SERVER), HIDDEN, run)
    sockets = [greeted(server) for _ in range(5)]
    server.close()
    deadline = time.monotonic() + 2
    while threading.active_count() > before and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    assert threading.active_count() == before
    for sock in sockets:
        sock.close()


def test_the_header_has_the_documented_size() -> None:
    assert HEADER.size == struct.calcsize("<4sBBBBIHHIIIf") == 32


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
