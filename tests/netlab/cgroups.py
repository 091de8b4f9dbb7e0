"""Control groups of the lab: what a device may use, and the handle by which all of it is ended.

Version 1 or 2, per controller whichever the machine has. Groups are named after the process that
made them and the moment it started, so that a later lab knows which are left over.
"""

import itertools
import os
import signal
import time
from pathlib import Path
from typing import Final

PREFIX: Final = "coeld-netlab"
CONTROLLERS: Final = ("cpu", "memory")
PERIOD_US: Final = 1000
"""Of CPU quotas: a device stalls no longer than this, where the default of 100 ms adds jitter."""
QUOTA_US_MIN: Final = 1000
"""The kernel's limit; shares below a fifth of a core get a longer period."""
END_S: Final = 10.0
"""Killed processes leave their group at once unless the kernel is stuck."""


class NoCgroups(Exception):
    """This machine offers no control groups for CPU and memory that we could write to."""


def mounts(mountinfo: str, own: str) -> tuple[dict[str, Path], Path | None]:
    """Where new groups belong: per controller of version 1, and for version 2.

    `mountinfo` and `own` are the texts of /proc/self/mountinfo and /proc/self/cgroup. In version 1
    that is below our own group, so that limits on us keep counting; in version 2, where a group
    with processes must have no children with controllers, beside it.
    """
    paths = {
        names: path for _n, names, path in (line.split(":", 2) for line in own.split("\n") if line)
    }
    first: dict[str, Path] = {}
    second: Path | None = None
    for line in mountinfo.splitlines():
        left, _dash, right = line.partition(" - ")
        root, point = left.split()[3:5]
        kind, _source, options = right.split(maxsplit=2)
        if kind == "cgroup2":
            second = Path(point) / Path(_below(paths.get("", "/"), root)).parent
        elif kind == "cgroup":
            for name in CONTROLLERS:
                if name in options.split(","):
                    path = next((p for names, p in paths.items() if name in names.split(",")), "/")
                    first[name] = Path(point) / _below(path, root)
    return first, second


def _below(path: str, root: str) -> str:
    """A group's path below its mount, which may show only a part of the hierarchy."""
    return path.removeprefix(root if root != "/" else "").lstrip("/")


def places() -> dict[str, Path]:
    """Per controller the directory in which groups are made. Raises NoCgroups."""
    first, second = mounts(
        Path("/proc/self/mountinfo").read_text(), Path("/proc/self/cgroup").read_text()
    )
    if second is not None and set(CONTROLLERS) - set(first):
        offered = (second / "cgroup.controllers").read_text().split()
        wanted = [name for name in CONTROLLERS if name not in first and name in offered]
        try:
            (second / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in wanted))
        except OSError as exc:
            raise NoCgroups(f"control groups below {second} cannot be enabled: {exc}") from exc
        first |= dict.fromkeys(wanted, second)
    lacking = [name for name in CONTROLLERS if name not in first]
    if lacking or not all(os.access(path, os.W_OK) for path in first.values()):
        raise NoCgroups(f"no writable control groups here for {lacking or list(first)}")
    return first


def started(pid: int) -> int | None:
    """When that process started, in clock ticks; None when there is none."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError):
        return None


_numbers = itertools.count(1)


def process_prefix(pid: int) -> str:
    """How the names of all labs of that process begin."""
    return f"{PREFIX}.{pid}.{started(pid)}."


def lab_name() -> str:
    """A name for one more lab of this process."""
    return f"{process_prefix(os.getpid())}{next(_numbers)}"


class Group:
    """The processes of one device."""

    def __init__(self, name: str, where: dict[str, Path]) -> None:
        self._of = {controller: path / name for controller, path in where.items()}
        self.paths = sorted(set(self._of.values()))
        for path in self.paths:
            path.mkdir()

    def limit(self, cpu: float, memory_bytes: int) -> None:
        """CPU in cores (0 = no limit), memory with its page cache in bytes (0 = no limit)."""
        quota_us, period_us = -1, PERIOD_US
        if cpu:
            period_us = max(PERIOD_US, round(QUOTA_US_MIN / cpu))
            quota_us = max(QUOTA_US_MIN, round(cpu * period_us))
        at = self._of["cpu"]
        if (at / "cpu.cfs_quota_us").exists():
            (at / "cpu.cfs_period_us").write_text(str(period_us))
            (at / "cpu.cfs_quota_us").write_text(str(quota_us))
        else:
            (at / "cpu.max").write_text(f"{quota_us if cpu else 'max'} {period_us}")
        at = self._of["memory"]
        if (at / "memory.limit_in_bytes").exists():
            (at / "memory.limit_in_bytes").write_text(str(memory_bytes or -1))
        else:
            (at / "memory.max").write_text(str(memory_bytes or "max"))

    def pids(self) -> list[int]:
        return _pids(self.paths)

    def remove(self) -> None:
        """Kill every process in it and delete it."""
        remove(self.paths)


def _pids(paths: list[Path]) -> list[int]:
    found: set[int] = set()
    for path in paths:
        try:
            found |= {int(line) for line in (path / "cgroup.procs").read_text().split()}
        except (FileNotFoundError, OSError):
            continue
    return sorted(found)


def remove(paths: list[Path]) -> None:
    """Kill everything in these groups and delete them; those that are gone are fine."""
    end_s = time.monotonic() + END_S
    left = [path for path in paths if path.exists()]
    while left:
        for pid in _pids(left):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for path in list(left):
            try:
                path.rmdir()
            except FileNotFoundError:
                left.remove(path)
            except OSError:  # busy: somebody in it is still dying
                continue
            else:
                left.remove(path)
        if left and time.monotonic() > end_s:
            raise TimeoutError(f"still not empty: {left}")
        if left:
            time.sleep(0.002)


def sweep(where: dict[str, Path]) -> list[str]:
    """Remove the groups of labs whose process is gone; their names."""
    stale = []
    for path in find(where, f"{PREFIX}."):
        _prefix, pid, start = path.name.split(".")[:3]
        if started(int(pid)) != int(start):
            stale.append(path)
    remove(stale)
    return sorted({path.name for path in stale})


def find(where: dict[str, Path], prefix: str) -> list[Path]:
    """Every group anywhere on the machine whose name begins so. Groups may vanish meanwhile."""
    return [
        Path(top, name)
        for mount in {_mount_point(path) for path in where.values()}
        for top, names, _files in os.walk(mount)
        for name in names
        if name.startswith(prefix)
    ]


def _mount_point(path: Path) -> Path:
    while not path.is_mount():
        path = path.parent
    return path
