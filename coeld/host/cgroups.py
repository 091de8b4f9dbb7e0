"""The control groups around this process, of either version, and what their limits allow.

A container, or a systemd MemoryMax= or CPUQuota=, limits a daemon below what the machine has. Both
versions are read from the file system; a missing or odd file means "no limit". Source: kernel.org,
Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst and scheduler/sched-bwc.rst.
"""

from pathlib import Path
from typing import Literal

from coeld.host.small_files import ROOT, number, text


def rings(controller: Literal["cpu", "memory"], root: Path = ROOT) -> list[tuple[Path, int]]:
    """The groups in which the controller limits this process, innermost first: each one's
    directory, and its version."""
    top = root / "sys/fs/cgroup"
    found = []
    for line in text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, version = top, 2
        elif controller in controllers.split(","):
            base, version = top / controller, 1
        else:
            continue
        inner = base / path.lstrip("/")
        around = [inner, *inner.parents]
        found += [(ring, version) for ring in around if ring == base or base in ring.parents]
    return found


def cpu_cores(root: Path = ROOT) -> float:
    """Cores that this process may use on average; 0: no limit of its own."""
    limits = []
    for ring, version in rings("cpu", root):
        if version == 2:
            quota, _, period = text(ring / "cpu.max").strip().partition(" ")
        else:
            quota, period = (
                text(ring / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")
            )
        if quota.isdigit() and period.isdigit() and int(quota) and int(period):
            limits.append(int(quota) / int(period))
    return min(limits, default=0.0)


def memory_limit(root: Path = ROOT) -> tuple[int, int]:
    """(limit, used) bytes of the tightest group around this process; (0, 0) without a limit.

    Page cache counts as used in version 1 and 2 alike, although the kernel would give it back;
    the inactive part of it is therefore subtracted.
    """
    tightest = (0, 0)
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        2: ("memory.max", "memory.current"),
    }
    for ring, version in rings("memory", root):
        limit_file, used_file = names[version]
        limit = number(ring / limit_file)
        if limit <= 0 or limit >= 1 << 60:  # version 1 says "no limit" with a huge number
            continue
        used = number(ring / used_file) - _inactive_file(ring / "memory.stat")
        room = limit - max(used, 0)
        if tightest[0] == 0 or room < tightest[0] - tightest[1]:
            tightest = (limit, max(used, 0))
    return tightest


def _inactive_file(path: Path) -> int:
    values = dict(line.split(" ", 1) for line in text(path).splitlines() if " " in line)
    words = values.get("total_inactive_file", values.get("inactive_file", "0"))
    return int(words) if words.isdigit() else 0
