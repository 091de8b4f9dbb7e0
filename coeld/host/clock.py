"""Heat, and what it does to the processor's clock: it may run slower than it could.

The kernel's cooling and a governor's limits appear as cpufreq's `scaling_max_freq`, per policy.
Where the hardware slows itself down, that file does not show it, and while it does the present
clock is what it may run at: a Raspberry Pi's firmware says so in `get_throttled` (bits 0 to 3:
under-voltage, clock capped, throttled, soft temperature limit; from 16 on the same, since boot), an
x86 processor counts it in `thermal_throttle`. Sources: kernel.org, admin-guide/pm/cpufreq.rst and
driver-api/thermal/sysfs-api.rst; raspberrypi.com, vcgencmd get_throttled.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from coeld.host.small_files import ROOT, number, text

CPU: Final = "sys/devices/system/cpu"
PI_THROTTLED: Final = "sys/devices/platform/soc/soc:firmware/get_throttled"
PI_NAMES: Final = ("under-voltage", "clock capped", "throttled", "soft temperature limit")
"""By bit, from 0."""
UNREAD: Final = -1 << 30
SANE_MC: Final = (-50_000, 200_000)
"""Thousandths of a degree: sensors that are not connected say anything."""


@dataclass(frozen=True, slots=True)
class Heat:
    """0 and None: not known here."""

    celsius: int | None
    """Of the hottest place that is measured."""
    where: str
    limit_celsius: int | None
    """From where on the kernel slows that place down."""
    clock_mhz: int
    """What is allowed now, a mean over all cores."""
    clock_full_mhz: int
    complaints: tuple[str, ...]
    """What holds the processor back now."""


class HeatSensor:
    """Reads heat; remembers counters, which tell of throttling by growing."""

    def __init__(self, root: Path = ROOT) -> None:
        self._root = root
        self._throttled = _throttle_count(root)

    def read(self) -> Heat:
        before, self._throttled = self._throttled, _throttle_count(self._root)
        complaints = pi_complaints(self._root)
        if self._throttled > before:
            complaints += ("too hot",)
        celsius, where, limit = _hottest(self._root)
        slowed = bool(complaints)
        allowed, full = allowed_mhz(self._root, slowed), _mean_mhz(self._root, "cpuinfo_max_freq")
        return Heat(celsius, where, limit, allowed, full, complaints)


def allowed_mhz(root: Path = ROOT, slowed: bool = False) -> int:
    """The clock that is allowed now, a mean over all cores, in MHz; 0: not known here.

    `slowed`: something other than the kernel's own limits is known to hold the clock back.
    """
    limit = _mean_mhz(root, "scaling_max_freq")
    if slowed or pi_complaints(root):
        return min(limit, _mean_mhz(root, "scaling_cur_freq") or limit)
    return limit


def pi_complaints(root: Path = ROOT) -> tuple[str, ...]:
    """What a Raspberry Pi's firmware complains of now; nothing elsewhere."""
    try:
        flags = int(text(root / PI_THROTTLED) or "0", 16)
    except ValueError:
        return ()
    return tuple(name for bit, name in enumerate(PI_NAMES) if flags >> bit & 1)


def _mean_mhz(root: Path, file: str) -> int:
    total, cores = 0, 0
    for policy in sorted((root / CPU / "cpufreq").glob("policy*")):
        khz = number(policy / file) or number(policy / "cpuinfo_max_freq")
        count = len(text(policy / "related_cpus").split()) or 1
        total, cores = total + khz * count, cores + count
    return total // cores // 1000 if cores else 0


def _throttle_count(root: Path) -> int:
    """How often the cores and the whole package of an x86 processor have slowed themselves down."""
    files = (root / CPU).glob("cpu[0-9]*/thermal_throttle/*_throttle_count")
    return sum(map(number, files))


def _hottest(root: Path) -> tuple[int | None, str, int | None]:
    """Degrees, name and limit of the hottest thermal zone; without zones, of hwmon's sensors."""
    zones = sorted((root / "sys/class/thermal").glob("thermal_zone*"))
    found = [(number(zone / "temp", UNREAD), text(zone / "type"), _passive(zone)) for zone in zones]
    found = found or [
        (number(at, UNREAD), text(at.parent / "name"), number(at.with_name(f"{at.name[:-5]}max")))
        for at in sorted((root / "sys/class/hwmon").glob("hwmon*/temp*_input"))
    ]
    sane = [one for one in found if SANE_MC[0] <= one[0] <= SANE_MC[1]]
    if not sane:
        return None, "", None
    hottest, where, limit = max(sane)
    return round(hottest / 1000), where, round(limit / 1000) if limit > 0 else None


def _passive(zone: Path) -> int:
    """The lowest temperature at which the kernel slows things down, in thousandths; 0: none."""
    trips = [
        number(kind.with_name(kind.name.replace("_type", "_temp")))
        for kind in zone.glob("trip_point_*_type")
        if text(kind) == "passive"
    ]
    return min((trip for trip in trips if trip > 0), default=0)
