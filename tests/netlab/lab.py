"""The lab as a Python object: devices with programs in them, links that can be changed.

Owns the switch's process and the control groups; leaving its `with` block kills every program and
deletes every group, whatever happened.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, Self

from tests.netlab import cgroups, namespaces
from tests.netlab.links import Profile

ROOT: Final = Path(__file__).resolve().parents[2]
DEVICES_MAX: Final = 64
SUBNET: Final = "10.77.0."
"""Every lab uses it: namespaces of different labs cannot meet."""
ENTER: Final = (
    "/bin/sh",
    "-c",
    'while [ "$1" != -- ]; do echo 0 > "$1/cgroup.procs" || exit 126; shift; done; shift; '
    'exec nsenter --net="$0" -- "$@"',
)
"""Joins the groups, then the namespace, then becomes the program: no code between fork and exec
here, where other threads may hold locks."""


def missing() -> str | None:
    """Why no lab can be made here; None when one can."""
    if os.geteuid():
        return "the network lab needs root"
    if not Path("/dev/net/tun").exists():
        return "the network lab needs /dev/net/tun"
    if not (shutil.which("nsenter") and shutil.which("unshare")):
        return "the network lab needs nsenter and unshare (util-linux)"
    if subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode:
        return "the network lab may not make network namespaces here"
    try:
        cgroups.places()
    except cgroups.NoCgroups as exc:
        return str(exc)
    return None


class Lab:
    """Devices by name, addresses 10.77.0.1 upwards in that order."""

    def __init__(self, names: Sequence[str], profile: Profile, seed: int = 0) -> None:
        """`seed` decides which packets are lost. Raises OSError, cgroups.NoCgroups."""
        if not 1 <= len(set(names)) == len(names) <= DEVICES_MAX:
            raise ValueError(f"a lab has 1 to {DEVICES_MAX} devices with names of their own")
        self.addresses = {name: f"{SUBNET}{n}" for n, name in enumerate(names, 1)}
        self.name = cgroups.lab_name()
        self._processes: list[subprocess.Popen[Any]] = []
        self._groups: dict[str, cgroups.Group] = {}
        self._switch: subprocess.Popen[str] | None = None
        where = cgroups.places()
        cgroups.sweep(where)
        try:
            for name in names:
                self._groups[name] = cgroups.Group(f"{self.name}.{name}", where)
            self._namespaces = self._start_switch(profile, seed)
        except BaseException:
            self.close()
            raise

    def _start_switch(self, profile: Profile, seed: int) -> dict[str, Path]:
        specification = {
            "name": self.name,
            "addresses": self.addresses,
            "profile": asdict(profile),
            "seed": seed,
            "groups": [str(path) for group in self._groups.values() for path in group.paths],
        }
        self._switch = subprocess.Popen(
            [sys.executable, "-m", "tests.netlab.switch", json.dumps(specification)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._switch.stdout is not None
        line = self._switch.stdout.readline()
        if not line:
            raise OSError(f"the switch ended with status {self._switch.wait()}")
        fds = Path(f"/proc/{self._switch.pid}/fd")
        return {name: fds / str(fd) for name, fd in json.loads(line).items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End every program and the network. May be called twice."""
        for group in self._groups.values():
            group.remove()
        for process in self._processes:
            process.wait()
        if self._switch is not None:
            assert self._switch.stdin is not None
            assert self._switch.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                self._switch.stdin.close()
            self._switch.wait()
            self._switch.stdout.close()
            self._switch = None

    def limit(self, name: str, cpu: float = 0.0, memory_bytes: int = 0) -> None:
        """Cores (0.3 = 30 % of one) and bytes that a device may use; 0 = no limit."""
        self._groups[name].limit(cpu, memory_bytes)

    def start(self, name: str, argv: Sequence[str | Path], **popen: Any) -> subprocess.Popen[Any]:
        """Run a program on a device. It is killed with everything it started when the lab ends."""
        paths = self._groups[name].paths
        script = [*ENTER, self._namespaces[name], *paths, "--", *argv]
        popen = {"stdin": subprocess.DEVNULL, "start_new_session": True} | popen
        process = subprocess.Popen([str(word) for word in script], **popen)
        self._processes.append(process)
        return process

    def pids(self, name: str) -> list[int]:
        """Every process of a device, grandchildren included."""
        return self._groups[name].pids()

    @contextlib.contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """Sockets that this thread makes now are a device's."""
        with self._namespaces[name].open("rb") as namespace, namespaces.inside(namespace.fileno()):
            yield

    def socket(self, name: str, kind: int) -> socket.socket:
        """An IPv4 socket of a device, for use in this process."""
        with self.inside(name):
            return socket.socket(socket.AF_INET, kind)

    def link(self, a: str, b: str, **values: float) -> None:
        """Change delay_s, jitter_s, loss, rate_bps or reorder of what a sends to b."""
        tell(self.name, {"do": "link", "from": a, "to": b, **values})

    def cut(self, a: str, b: str) -> None:
        """Nothing that a sends reaches b; what b sends still reaches a."""
        tell(self.name, {"do": "cut", "from": a, "to": b})

    def partition(self, *sets: Sequence[str]) -> None:
        """Only devices of one set reach each other."""
        tell(self.name, {"do": "partition", "sets": [list(names) for names in sets]})

    def heal(self) -> None:
        """Undo cuts and partitions."""
        tell(self.name, {"do": "heal"})

    def reset(self) -> None:
        """Every link as the profile says."""
        tell(self.name, {"do": "reset"})

    def show(self) -> dict[str, dict[str, Any]]:
        """Settings and counts of every direction, as "a > b"."""
        return tell(self.name, {"do": "show"})


def tell(lab: str, command: Mapping[str, Any]) -> dict[str, Any]:
    """Send one command to the switch of a lab. Raises ValueError when it is wrong, OSError."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect("\0" + lab)
        sock.sendall(json.dumps(command).encode() + b"\n")
        reply = json.loads(sock.makefile("rb").readline())
    if "error" in reply:
        raise ValueError(reply["error"])
    return reply["ok"]


def running() -> list[str]:
    """The names of the labs of this machine."""
    sockets = Path("/proc/net/unix").read_text().splitlines()[1:]
    names = {line.split()[-1].removeprefix("@") for line in sockets if "@" in line}
    return sorted(name for name in names if name.startswith(cgroups.PREFIX + "."))
