"""What this machine has and how it is: one sample of everything, for the swarm and for people.

The budget follows what is really there. Measured, it is a share of the memory that the engine has
or could still have; configured, it is what was asked for as far as there is memory. Speeds are
those that the engine measured of its kernels, lowered in proportion while the processor's clock is
held back. What of this is worth telling others is decided elsewhere (coeld.perception.resources).
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, NamedTuple

import psutil

from coeld.host.battery import read_battery, spares
from coeld.host.clock import HeatSensor
from coeld.host.disk import Disk
from coeld.host.gpu import GpuSensor
from coeld.host.memory import anonymous_bytes, read_memory
from coeld.host.small_files import ROOT
from coeld.view import Resources

BUDGET_FRACTION: Final = 0.6
"""Of the memory that the engine has or could have, when no budget is configured."""
SMOOTHING: Final = 0.3
"""Weight of the newest sample of load and memory in their exponential means."""


class Speeds(NamedTuple):
    """As measured; 0: not known."""

    kernel_mb_per_s: int = 0
    """Weights in decode."""
    row_mb_per_s: int = 0
    """Weight bytes × rows per microsecond."""
    cut_us: int = 0
    clock_mhz: int = 0
    """What the processor was allowed meanwhile."""


UNKNOWN: Final = Speeds()


class Sensors:
    """Samples this machine; smooths what wobbles."""

    def __init__(
        self, budget_mb: int, battery_least_percent: int, disk: Disk, root: Path = ROOT
    ) -> None:
        self._root, self._budget_bytes = root, budget_mb * 1_000_000
        self._battery_least_percent = battery_least_percent
        self.budget_is_measured = budget_mb == 0
        self.disk = disk
        self._heat, self._gpus = HeatSensor(root), GpuSensor(root)
        self._load_percent = psutil.cpu_percent()
        self._room_bytes = float(read_memory(root).available_bytes)
        self._sparing = False
        self._shown: dict[str, Any] = {}

    def sample(self, speeds: Speeds = UNKNOWN, engine_pid: int | None = None) -> Resources:
        """One measurement; `engine_pid`: whose memory counts as ours to use."""
        memory, heat, battery = read_memory(self._root), self._heat.read(), read_battery(self._root)
        held = anonymous_bytes(engine_pid, self._root) if engine_pid else 0
        self._room_bytes += SMOOTHING * (memory.available_bytes + held - self._room_bytes)
        self._load_percent += SMOOTHING * (psutil.cpu_percent() - self._load_percent)
        self._sparing = spares(battery, self._battery_least_percent, self._sparing)
        kernel, row, cut_us, measured_mhz = speeds
        slowed = heat.clock_mhz if 0 < heat.clock_mhz < measured_mhz else measured_mhz
        fresh = Resources(
            memory_budget_bytes=self._budget(),
            memory_available_bytes=memory.available_bytes,
            cpu_load_percent=min(100, max(0, round(self._load_percent))),
            kernel_mb_per_s=_in_proportion(kernel, slowed, measured_mhz),
            row_mb_per_s=_in_proportion(row, slowed, measured_mhz),
            cut_us=_in_proportion(cut_us, measured_mhz, slowed),
            memory_pressure_percent=memory.pressure_percent,
            sparing=self._sparing,
        )
        self._shown = {
            "memory": asdict(memory) | {"budget_bytes": fresh.memory_budget_bytes},
            "heat": asdict(heat),
            "battery": asdict(battery) | {"spared": self._sparing} if battery else None,
        }
        return fresh

    def status(self) -> dict[str, Any]:
        """The last sample, the disk and the graphics processors, as plain JSON."""
        disk = {"free_bytes": self.disk.free_bytes, "read_mb_per_s": self.disk.read_mb_per_s}
        return self._shown | {"disk": disk, "gpus": [asdict(gpu) for gpu in self._gpus.read()]}

    def own_rss_bytes(self) -> int:
        """Resident bytes of this process."""
        return int(psutil.Process().memory_info().rss)

    def _budget(self) -> int:
        if self.budget_is_measured:
            return int(self._room_bytes * BUDGET_FRACTION)
        return min(self._budget_bytes, int(self._room_bytes))


def _in_proportion(speed: int, part: int, whole: int) -> int:
    return speed * part // whole if whole else speed
