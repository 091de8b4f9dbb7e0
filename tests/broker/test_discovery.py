"""mDNS on the loopback interface: devices of one swarm find each other, others stay out."""

import asyncio
import contextlib
import socket
import struct

import pytest

from coeld.ids import NodeId
from coeld.net.discovery import discover
from tests.fakes.bus import eventually


def loopback_multicast() -> bool:
    group, loopback = socket.inet_aton("224.0.0.251"), socket.inet_aton("127.0.0.1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.setsockopt(
                socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, struct.pack("4s4s", group, loopback)
            )
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, loopback)
            sock.bind(("", 0))
            sock.settimeout(1)
            sock.sendto(b"hello", ("224.0.0.251", sock.getsockname()[1]))
            return sock.recv(10) == b"hello"
        except OSError:
            return False


@pytest.mark.skipif(not loopback_multicast(), reason="no multicast on the loopback interface")
def test_devices_of_one_swarm_find_each_other() -> None:
    async def scenario() -> list[tuple[str, str, str, int]]:
        found: list[tuple[str, str, str, int]] = []
        swarms = {"a": "home", "b": "home", "c": "away"}
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(
                    discover(
                        NodeId(letter * 16),
                        swarm,
                        ("127.0.0.1", 1000 + ord(letter)),
                        lambda *what, letter=letter: found.append((letter, *what)),
                    )
                )
                for letter, swarm in swarms.items()
            ]
            await eventually(lambda: len(set(found)) >= 2)
            for task in tasks:
                task.cancel()
        return sorted(set(found))

    assert asyncio.run(scenario()) == [
        ("a", "b" * 16, "127.0.0.1", 1098),
        ("b", "a" * 16, "127.0.0.1", 1097),
    ]


def test_without_multicast_there_is_a_warning_and_no_end(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(10):
                nowhere = ("203.0.113.1", 1884)  # not an address of this machine
                await discover(NodeId("a" * 16), "home", nowhere, lambda *_: None)

    asyncio.run(scenario())
    assert "name them in swarm.neighbours" in caplog.text
