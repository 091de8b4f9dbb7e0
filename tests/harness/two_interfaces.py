"""Two devices on two interfaces of a network namespace of its own, one over IPv4, one over IPv6.

Run as root in a fresh namespace (`unshare -n python -m tests.harness.two_interfaces`); prints who
found whom by mDNS as JSON. The interfaces are TUN devices whose packets nobody carries away: the
kernel itself loops multicast back to those who listen on this machine.
"""

import asyncio
import fcntl
import json
import os
import struct
import subprocess
import threading

from coeld.ids import NodeId
from coeld.net.discovery import discover

TUNSETIFF = 0x400454CA
IFF_TUN_NO_PI = 0x1001
WAIT_S = 20.0
HOSTS = {"a": "10.9.0.1", "b": "fd00::1"}


def interface(name: str, address: str) -> None:
    tun = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TUN_NO_PI))
    threading.Thread(target=swallow, args=(tun,), daemon=True).start()
    for command in (f"link set {name} up multicast on", f"addr add {address} dev {name}"):
        subprocess.run(["ip", *command.split()], check=True)


def swallow(tun: int) -> None:
    while os.read(tun, 65536):
        pass


async def meet() -> list[tuple[str, str, str, int]]:
    found: set[tuple[str, str, str, int]] = set()
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(
                discover(
                    NodeId(letter * 16),
                    "home",
                    (host, ord(letter)),
                    lambda *what, letter=letter: found.add((letter, *what)),
                )
            )
            for letter, host in HOSTS.items()
        ]
        for _ in range(int(WAIT_S / 0.1)):
            if len(found) == len(HOSTS):
                break
            await asyncio.sleep(0.1)
        for task in tasks:
            task.cancel()
    return sorted(found)


if __name__ == "__main__":
    interface("d0", "10.9.0.1/24")
    interface("d1", "fd00::1/64 nodad")
    print(json.dumps(asyncio.run(meet())))
