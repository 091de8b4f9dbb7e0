"""What this machine has and how busy it is: memory, the cgroup's limit, CPU load.

A container or a systemd MemoryMax= limits a daemon below what the machine has, and what exceeds it
is killed, so the limit counts as the machine's size. Both cgroup versions are read from the file
system; a missing or odd file means "no limit".
"""

from dataclasses import dataclass
from pathlib import Path

import psutil

from coeld.view import Resources

BUDGET_FRACTION = 0.6
"""Of the available memory, when no budget is configured."""
LOAD_SMOOTHING = 0.3
"""Weight of the newest CPU sample in the exponential mean."""
CGROUP_ROOT = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


@dataclass(frozen=True, slots=True)
class MemoryReading:
    """Bytes, with the cgroup's limit applied."""

    total_bytes: int
    available_bytes: int


def read_memory() -> MemoryReading:
    """What there is and what a new process could still take."""
    machine = psutil.virtual_memory()
    limit, used = cgroup_memory()
    total = min(machine.total, limit) if limit else machine.total
    available = machine.available
    if limit:
        available = min(available, max(limit - used, 0))
    return MemoryReading(total, available)


def cgroup_memory(root: Path = CGROUP_ROOT, own: Path = OWN_CGROUPS) -> tuple[int, int]:
    """(limit, used) bytes of the tightest cgroup around this process; (0, 0) without a limit.

    Page cache counts as used in version 1 and 2 alike, although the kernel would give it back;
    the inactive part of it is therefore subtracted.
    """
    tightest = (0, 0)
    for directory, limit_file, used_file in _cgroups(root, own):
        limit = _number(directory / limit_file)
        if limit <= 0 or limit >= 1 << 60:  # version 1 says "no limit" with a huge number
            continue
        used = _number(directory / used_file) - _inactive_file(directory / "memory.stat")
        room = limit - max(used, 0)
        if tightest[0] == 0 or room < tightest[0] - tightest[1]:
            tightest = (limit, max(used, 0))
    return tightest


def _cgroups(root: Path, own: Path) -> list[tuple[Path, str, str]]:
    """This process's memory cgroup and all around it, innermost first."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            base, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        inner = base / path.lstrip("/")
        ring = [inner, *inner.parents]
        found += [(place, *names) for place in ring if place == base or base in place.parents]
    return found


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # absent, or "max"
        return 0


def _inactive_file(path: Path) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    values = dict(line.split(" ", 1) for line in lines if " " in line)
    text = values.get("total_inactive_file", values.get("inactive_file", "0"))
    return int(text) if text.isdigit() else 0


class Sensors:
    """Samples this machine; the budget is fixed at start so that the auction sees no jitter."""

    def __init__(self, budget_mb: int) -> None:
        self.at_start = read_memory()
        measured = int(self.at_start.available_bytes * BUDGET_FRACTION)
        self.budget_bytes = budget_mb * 1_000_000 if budget_mb else measured
        self.budget_is_measured = budget_mb == 0
        self._load_percent = psutil.cpu_percent()

    def sample(self, kernel_mb_per_s: int, row_mb_per_s: int) -> Resources:
        """One measurement; the speeds are what the engine measured of itself."""
        now = psutil.cpu_percent()
        self._load_percent += LOAD_SMOOTHING * (now - self._load_percent)
        return Resources(
            memory_budget_bytes=self.budget_bytes,
            memory_available_bytes=read_memory().available_bytes,
            cpu_load_percent=min(100, max(0, round(self._load_percent))),
            kernel_mb_per_s=kernel_mb_per_s,
            row_mb_per_s=row_mb_per_s,
        )

    def own_rss_bytes(self) -> int:
        """Resident bytes of this process."""
        return int(psutil.Process().memory_info().rss)
