"""The sockets of the data path, on loopback, with good peers and bad ones."""

import contextlib
import os
import resource
import socket
import struct
import threading
import time
from random import Random

import numpy as np
import pytest

from coeld.datapath import frames
from coeld.datapath.frames import HEADER, Kind
from coeld.errors import FrameError, PeerError, PeerGone, PeerRefused, PeerSlow
from coeld.ids import NodeId
from coeld.net import peers
from coeld.net.peers import PeerPool, PeerServer
from tests.harness.peer_ends import CALLER, HIDDEN, SERVER, X, ask, introduction, run


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


@pytest.mark.parametrize("known", [True, False])
def test_there_is_no_room_for_rows_that_are_too_wide_or_of_a_stranger(server, known) -> None:
    hidden = HIDDEN + 1 if known else HIDDEN
    with greeted(server) if known else raw(server) as sock:
        pieces = frames.pack_experts(1, 0, [0], np.zeros((1, hidden), np.float32))
        sock.sendall(b"".join(pieces)[: HEADER.size])
        assert f"rows of {hidden}" in message_from(sock)  # before the rows themselves


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


def test_no_file_descriptor_for_a_moment_and_the_server_serves_on(server, pool) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    with socket.socket() as waiting:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
        try:
            with contextlib.suppress(OSError):
                while True:
                    held.append(os.dup(0))
            waiting.connect((server.host, server.port))
            waiting.settimeout(3 * peers.ACCEPT_AGAIN_S)
            with pytest.raises(TimeoutError):
                waiting.recv(1)
        finally:
            for fd in held:
                os.close(fd)
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert np.array_equal(ask(pool, server), X * 4)


def test_no_thread_for_a_caller_and_the_server_serves_on(server, pool, monkeypatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with raw(server) as sock:
            assert sock.recv(1) == b""
    assert np.array_equal(ask(pool, server), X * 4)


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
