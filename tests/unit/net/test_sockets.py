"""Connections whose first packet gets lost: a listener whose queue is full drops it, as bad links
do. The kernel alone would try again after a second."""

import select
import socket
import time

import pytest

from coeld.datapath.frames import MAGIC
from coeld.net import sockets
from coeld.net.exchange import Exchange
from tests.harness.peer_ends import CALLER, SERVER, introduction

KERNEL_S = 1.0


class Crowd:
    """A listener that takes no more connections until it is freed."""

    def __init__(self) -> None:
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(0)
        self.address = self.listener.getsockname()[:2]
        self.waiting: list[socket.socket] = []
        while True:
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex(self.address)
            if not select.select([], [sock], [], 0.1)[1]:
                sock.close()  # its packet was dropped
                return
            self.waiting.append(sock)

    def free(self) -> None:
        for sock in self.waiting:
            self.listener.accept()[0].close()
            sock.close()


@pytest.fixture
def crowd():
    made = Crowd()
    yield made
    made.listener.close()


def test_a_call_does_not_wait_for_the_kernel_to_connect_again(crowd) -> None:
    began_s = time.monotonic()
    exchange = Exchange.open(SERVER, crowd.address, introduction(CALLER).to_json())
    crowd.free()
    arrived: list[socket.socket] = []
    while not arrived and time.monotonic() < began_s + 2 * KERNEL_S:
        left_s = min(max(0.0, exchange.redial_at_s - time.monotonic()), KERNEL_S)
        arrived = select.select([crowd.listener], [], [], left_s)[0]
        exchange.pump()
    with crowd.listener.accept()[0] as accepted:
        assert time.monotonic() - began_s < KERNEL_S
        exchange.pump()
        assert accepted.recv(len(MAGIC)) == MAGIC
        assert exchange.redial_at_s == float("inf")
    exchange.close()


def test_nor_does_who_waits_for_a_connection(crowd, monkeypatch) -> None:
    connect = socket.create_connection

    def lost_at_first(*arguments, **named):
        try:
            return connect(*arguments, **named)
        except TimeoutError:
            crowd.free()
            raise

    monkeypatch.setattr(socket, "create_connection", lost_at_first)
    began_s = time.monotonic()
    with sockets.connect(crowd.address, 2 * KERNEL_S) as sock:
        assert time.monotonic() - began_s < KERNEL_S
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_kernel_that_cannot_be_told_to_send_again_sooner_will_do() -> None:
    unknown = {(socket.IPPROTO_TCP, option) for option, _value in sockets.LOSSES}
    told: set[tuple[int, int]] = set()

    class OldKernel:
        def setsockopt(self, level: int, option: int, _value: int) -> None:
            if (level, option) in unknown:
                raise OSError(92, "Protocol not available")
            told.add((level, option))

    sockets.prepare(OldKernel())
    assert told == {(level, option) for level, option, _value in sockets.OPTIONS}


@pytest.mark.parametrize("host", ["a..b", "x" * 64, "localhost", "", "1.2.3", "fe80::1::2"])
def test_what_is_no_address_is_not_asked_of_a_name_service(host: str) -> None:
    for way in (sockets.dial, lambda address: sockets.connect(address, 1.0)):
        with pytest.raises(OSError, match="illegal IP address"):
            way((host, 9))
