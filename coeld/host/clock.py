"""How fast the processor's clock may run now: heat, a weak power supply and settings limit it.

The kernel's cooling and a governor's limits appear as cpufreq's `scaling_max_freq`, per policy. A
Raspberry Pi is slowed down by its firmware instead, which that file does not show: it says so in
`get_throttled` (bits 0 to 3: under-voltage, capped, throttled, soft temperature limit; from 16 on
the same, since boot), and while one of the first is set the present clock is what it may run at.
Sources: kernel.org, admin-guide/pm/cpufreq; raspberrypi.com, vcgencmd get_throttled.
"""

from pathlib import Path
from typing import Final

ROOT: Final = Path("/")
PI_THROTTLED: Final = "sys/devices/platform/soc/soc:firmware/get_throttled"
PI_NOW: Final = 0b1111
"""Bits of what is so now."""
PI_NAMES: Final = ("under-voltage", "clock capped", "throttled", "soft temperature limit")


def allowed_mhz(root: Path = ROOT) -> int:
    """The clock that is allowed now, a mean over all cores, in MHz; 0: not known here."""
    total, cores = 0, 0
    limit = "scaling_cur_freq" if pi_throttled(root) & PI_NOW else "scaling_max_freq"
    for policy in sorted((root / "sys/devices/system/cpu/cpufreq").glob("policy*")):
        khz = number(policy / limit) or number(policy / "cpuinfo_max_freq")
        count = len(text(policy / "related_cpus").split()) or 1
        total, cores = total + khz * count, cores + count
    return total // cores // 1000 if cores else 0


def pi_throttled(root: Path = ROOT) -> int:
    """The firmware's flags of a Raspberry Pi; 0 elsewhere."""
    try:
        return int(text(root / PI_THROTTLED) or "0", 16)
    except ValueError:
        return 0


def pi_complaints(root: Path = ROOT) -> list[str]:
    """What a Raspberry Pi's firmware complains of now."""
    flags = pi_throttled(root)
    return [name for bit, name in enumerate(PI_NAMES) if flags >> bit & 1]


def text(path: Path) -> str:
    """A small file's text without the end of its line; "" if it is not there."""
    try:
        return path.read_text(errors="replace").strip("\0\n ")
    except OSError:
        return ""


def number(path: Path) -> int:
    """A file that holds one whole number; 0 if it is not there or holds something else."""
    try:
        return int(text(path))
    except ValueError:
        return 0
