"""The switch: one process that makes the namespaces and forwards every packet between them.

Started by the lab with a JSON specification as its argument; says the descriptors of the namespaces
on standard output; forwards until standard input ends; then kills what is left in the lab's control
groups. Commands come as lines of JSON over an abstract unix socket with the lab's name, which
leaves no file behind:

    {"do": "link", "from": "a", "to": "b", "loss": 0.3}    {"do": "cut", "from": "a", "to": "b"}
    {"do": "partition", "sets": [["a"], ["b", "c"]]}       {"do": "heal"}  {"do": "reset"}
    {"do": "show"}

Multicast and broadcast go to everybody, so mDNS works.
"""

import heapq
import json
import os
import select
import signal
import socket
import sys
import time
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any, Final

from tests.netlab import cgroups, namespaces
from tests.netlab.links import Fabric, Link, Profile

BURST: Final = 32
"""Packets read from one device before due ones are delivered."""
COMMAND_BYTES_MAX: Final = 65536
NICENESS: Final = -15
"""The network does not slow down because the devices compute."""


class Switch:
    """Ports, links and the packets under way."""

    def __init__(self, fabric: Fabric, addresses: dict[str, str]) -> None:
        self.fabric = fabric
        self.namespaces: dict[str, int] = {}
        self._tuns: dict[int, str] = {}
        self._fds: dict[str, int] = {}
        for name, address in addresses.items():
            self.namespaces[name], tun = namespaces.make(address, fabric.profile.mtu)
            self._tuns[tun], self._fds[name] = name, tun
        self._names = {socket.inet_aton(address): name for name, address in addresses.items()}
        self._under_way: list[tuple[float, int, str, str, bytes, bool]] = []
        self._number = 0

    @property
    def tuns(self) -> list[int]:
        return list(self._tuns)

    def wait_s(self, now_s: float) -> float | None:
        """Until the next packet is due."""
        return max(0.0, self._under_way[0][0] - now_s) if self._under_way else None

    def take(self, tun: int) -> None:
        """Read what a device has sent and put it under way."""
        sender = self._tuns[tun]
        for _ in range(BURST):
            try:
                packet = os.read(tun, 65536)
            except BlockingIOError:
                return
            if packet[0] >> 4 != 4:
                continue
            to = packet[16:20]
            if to in self._names:
                receivers = [self._names[to]]
            elif 224 <= to[0] < 240 or to[3] == 255:
                receivers = [name for name in self._fds if name != sender]
            else:
                continue
            now_s = time.monotonic()
            for receiver in receivers:
                if receiver != sender:
                    due_s = self.fabric.arrival_s(sender, receiver, len(packet), now_s)
                    if due_s is not None:
                        self._push(due_s, sender, receiver, packet, False)

    def deliver(self, now_s: float) -> None:
        """Write every packet that is due."""
        under_way = self._under_way
        while under_way and under_way[0][0] <= now_s:
            due_s, _n, sender, receiver, packet, admitted = heapq.heappop(under_way)
            if not admitted:
                through_s = self.fabric.admission_s(sender, receiver, len(packet), due_s)
                if through_s is not None:  # behind those the port has let in before
                    self._push(through_s, sender, receiver, packet, True)
                continue
            try:
                os.write(self._fds[receiver], packet)
            except OSError:  # a program has taken the interface down: as if the cable were out
                continue

    def _push(self, due_s: float, sender: str, receiver: str, packet: bytes, in_: bool) -> None:
        self._number += 1
        heapq.heappush(self._under_way, (due_s, self._number, sender, receiver, packet, in_))

    def obey(self, command: dict[str, Any]) -> dict[str, Any]:
        """Carry out one command. Raises KeyError, TypeError, ValueError on a wrong one."""
        fabric, values = self.fabric, dict(command)
        match values.pop("do"):
            case "link":
                fabric.change(values.pop("from"), values.pop("to"), **values)
            case "cut":
                fabric.cut(values["from"], values["to"])
            case "partition":
                fabric.partition(*values["sets"])
            case "heal":
                fabric.heal()
            case "reset":
                fabric.reset()
            case "show":
                return {
                    f"{a} > {b}": {"up": way.up, **asdict(way.link), **asdict(way.counts)}
                    for (a, b), way in fabric.directions.items()
                }
            case other:
                raise ValueError(f"unknown command {other!r}")
        return {}


def answer(switch: Switch, connection: socket.socket) -> None:
    """One command, one reply; a caller that is slow or wrong is told or dropped."""
    with connection:
        connection.settimeout(0.2)
        try:
            line = connection.makefile("rb").readline(COMMAND_BYTES_MAX)
            reply = {"ok": switch.obey(json.loads(line))}
        except (KeyError, TypeError, ValueError) as exc:
            reply = {"error": f"{type(exc).__name__}: {exc}"}
        except OSError:
            return
        try:
            connection.sendall(json.dumps(reply).encode() + b"\n")
        except OSError:
            return


def forward(switch: Switch, commands: socket.socket) -> None:
    """Until standard input ends."""
    watched = [sys.stdin.fileno(), commands.fileno(), *switch.tuns]
    while True:
        # select, because its time-out has microseconds; poll and epoll round up to milliseconds.
        ready, _, _ = select.select(watched, [], [], switch.wait_s(time.monotonic()))
        switch.deliver(time.monotonic())
        for fd in ready:
            if fd == sys.stdin.fileno():
                return
            if fd == commands.fileno():
                answer(switch, commands.accept()[0])
            else:
                switch.take(fd)
                switch.deliver(time.monotonic())


def main(specification: dict[str, Any]) -> None:
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)  # it ends when the lab does, not before
    namespaces.timer_slack(1000)
    try:
        os.setpriority(os.PRIO_PROCESS, 0, NICENESS)
    except PermissionError:
        print("no permission for a higher priority: delays will vary", file=sys.stderr)
    profile = Profile(
        **specification["profile"] | {"link": Link(**specification["profile"]["link"])}
    )
    addresses = specification["addresses"]
    fabric = Fabric(list(addresses), profile, Random(specification["seed"]))
    with socket.socket(socket.AF_UNIX) as commands:
        commands.bind("\0" + specification["name"])
        commands.listen(16)
        switch = Switch(fabric, addresses)
        print(json.dumps(switch.namespaces), flush=True)
        try:
            forward(switch, commands)
        finally:
            cgroups.remove([Path(path) for path in specification["groups"]])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
