"""Memory: what there is, what can still be had, and whether programs wait for it.

What exceeds a control group's limit is killed, so the limit counts as the machine's size. Pressure
is the kernel's own figure (pressure stall information): the share of time in which all tasks that
could run waited for memory. Source: kernel.org, Documentation/accounting/psi.rst.
"""

from dataclasses import dataclass
from pathlib import Path

from coeld.host.cgroups import memory_limit, rings
from coeld.host.small_files import ROOT, text


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
    limit, used = memory_limit(root)
    if limit:
        total = min(total, limit)
        available = min(available, max(limit - used, 0))
    return MemoryReading(total, available, _pressure_percent(root))


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
    own = [ring for ring, version in rings("memory", root) if version == 2]
    files += [ring / "memory.pressure" for ring in own[:1]]
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
