"""The battery that a device runs on, and when to spare it.

Batteries of mice and keyboards (`scope` is Device) do not count. Of several batteries the fullest
counts: the machine runs until the last one is empty. Source: kernel.org,
Documentation/ABI/testing/sysfs-class-power.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from coeld.host.small_files import ROOT, number, text

RECOVERED_PERCENT: Final = 5
"""Above the threshold, before a device that spares its battery no longer does."""


@dataclass(frozen=True, slots=True)
class Battery:
    percent: int
    discharging: bool
    """The machine lives on it: it discharges and no charger is connected."""


def read_battery(root: Path = ROOT) -> Battery | None:
    """None: this machine has none."""
    supplies = sorted((root / "sys/class/power_supply").glob("*"))
    own = [supply for supply in supplies if text(supply / "scope") != "Device"]
    plugged = any(
        number(supply / "online") for supply in own if text(supply / "type") in ("Mains", "USB")
    )
    charges = [
        (number(supply / "capacity"), text(supply / "status"))
        for supply in own
        if text(supply / "type") == "Battery" and text(supply / "capacity").isdigit()
    ]
    if not charges:
        return None
    discharging = any(status == "Discharging" for _, status in charges)
    return Battery(min(100, max(charges)[0]), discharging and not plugged)


def spares(battery: Battery | None, least_percent: int, before: bool) -> bool:
    """Whether to spare it now, given whether it was spared `before`."""
    if battery is None or not battery.discharging:
        return False
    return battery.percent < least_percent + (RECOVERED_PERCENT if before else 0)
