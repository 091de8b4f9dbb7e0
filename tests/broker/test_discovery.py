"""mDNS on the loopback interface: devices of one swarm find each other, others stay out."""

import asyncio
import contextlib
import json
import os
import socket
import struct
import subprocess
import sys

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


@pytest.mark.skipif(not loopback_multicast(), reason="no multicast on the loopback interface")
def test_two_devices_with_one_identity_are_both_found_under_names_of_their_own() -> None:
    async def scenario() -> set[tuple[str, str, int]]:
        found: set[tuple[str, str, int]] = set()
        async with asyncio.TaskGroup() as group:

            def announce(letter: str, port: int, see: bool) -> asyncio.Task[None]:
                notice = (lambda *what: found.add(what)) if see else (lambda *what: None)
                address = ("127.0.0.1", port)
                return group.create_task(discover(NodeId(letter * 16), "home", address, notice))

            tasks = [announce("a", 1001, False)]
            tasks += [announce("b", 1003, True)]
            await eventually(lambda: len(found) == 1)
            tasks += [announce("a", 1002, False)]
            await eventually(lambda: len(found) == 2)
            for task in tasks:
                task.cancel()
        return found

    assert asyncio.run(scenario()) == {
        ("a" * 16, "127.0.0.1", 1001),
        ("a" * 16, "127.0.0.1", 1002),
    }


@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
def test_devices_on_two_interfaces_meet_one_over_ipv4_and_one_over_ipv6() -> None:
    command = ["unshare", "-n", sys.executable, "-m", "tests.harness.two_interfaces"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if "Operation not permitted" in done.stderr or "/dev/net/tun" in done.stderr:
        pytest.skip("no network namespaces or no TUN devices here")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [
        ["a", "b" * 16, "fd00::1", ord("b")],
        ["b", "a" * 16, "10.9.0.1", ord("a")],
    ]


def test_without_multicast_there_is_a_warning_and_no_end(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(10):
                nowhere = ("203.0.113.1", 1884)  # not an address of this machine
                await discover(NodeId("a" * 16), "home", nowhere, lambda *_: None)

    asyncio.run(scenario())
    assert "name them in swarm.neighbours" in caplog.text
