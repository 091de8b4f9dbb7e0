"""Memory: what there is, what can still be had, and whether programs wait for it.

A container or a systemd MemoryMax= limits a daemon below what the machine has, and what exceeds it
is killed, so the limit counts as the machine's size. Both cgroup versions are read from the file
system; a missing or odd file means "no limit". Pressure is the kernel's own figure (pressure stall
information): the share of time in which all tasks that could run waited for memory. Source:
kernel.org, Documentation/accounting/psi.rst and admin-guide/cgroup-v2.rst.
"""

from dataclasses import dataclass
from pathlib import Path

from coeld.host.small_files import ROOT, number, text


@dataclass(frozen=True, slots=True)
class MemoryReading:
    """With the cgroup's limit applied."""

    total_bytes: int
    available_bytes: int
    """What a new process could still take."""
    pressure_percent: int
    """"full" of the last minute, of machine or own cgroup, whichever is worse; 0: unknown."""


def read_memory(root: Path = ROOT) -> MemoryReading:
    total, available = _machine(root)
    limit, used = cgroup_memory(root)
    if limit:
        total = min(total, limit)
        available = min(available, max(limit - used, 0))
    return MemoryReading(total, available, _pressure_percent(root))


def cgroup_memory(root: Path = ROOT) -> tuple[int, int]:
    """(limit, used) bytes of the tightest cgroup around this process; (0, 0) without a limit.

    Page cache counts as used in version 1 and 2 alike, although the kernel would give it back;
    the inactive part of it is therefore subtracted.
    """
    tightest = (0, 0)
    for directory, limit_file, used_file in _cgroups(root):
        limit = number(directory / limit_file)
        if limit <= 0 or limit >= 1 << 60:  # version 1 says "no limit" with a huge number
            continue
        used = number(directory / used_file) - _inactive_file(directory / "memory.stat")
        room = limit - max(used, 0)
        if tightest[0] == 0 or room < tightest[0] - tightest[1]:
            tightest = (limit, max(used, 0))
    return tightest


def anonymous_bytes(pid: int, root: Path = ROOT) -> int:
    """Memory of a process that nothing else could use, file mappings excluded; 0: no process."""
    return _fields(root / f"proc/{pid}/status").get("RssAnon", 0)


def _machine(root: Path) -> tuple[int, int]:
    """Bytes: all of it, and what the kernel estimates to be available without swapping."""
    known = _fields(root / "proc/meminfo")
    return known.get("MemTotal", 0), known.get("MemAvailable", 0)


def _fields(path: Path) -> dict[str, int]:
    """Lines like "MemTotal:  123 kB", in bytes; others are left out."""
    found = {}
    for line in text(path).splitlines():
        name, _, rest = line.partition(":")
        value, _, unit = rest.strip().partition(" ")
        if unit == "kB" and value.isdigit():
            found[name] = int(value) * 1024
    return found


def _pressure_percent(root: Path) -> int:
    files = [root / "proc/pressure/memory"]
    own = [base for base, names, *_ in _cgroups(root) if names == "memory.max"]
    files += [base / "memory.pressure" for base in own[:1]]
    return max(map(_full_percent, files))


def _full_percent(path: Path) -> int:
    """avg60 of the line "full", as whole percent."""
    for line in text(path).splitlines():
        kind, *words = line.split()
        values = dict(word.partition("=")[::2] for word in words)
        if kind == "full":
            try:
                return min(100, max(0, round(float(values["avg60"]))))
            except (KeyError, ValueError, OverflowError):
                return 0
    return 0


def _cgroups(root: Path) -> list[tuple[Path, str, str]]:
    """This process's memory cgroup and all around it, innermost first."""
    top = root / "sys/fs/cgroup"
    found = []
    for line in text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = top, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            base, names = top / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        inner = base / path.lstrip("/")
        ring = [inner, *inner.parents]
        found += [(place, *names) for place in ring if place == base or base in place.parents]
    return found


def _inactive_file(path: Path) -> int:
    values = dict(line.split(" ", 1) for line in text(path).splitlines() if " " in line)
    words = values.get("total_inactive_file", values.get("inactive_file", "0"))
    return int(words) if words.isdigit() else 0
