"""Which measurements are worth telling: only those that would change somebody's decision. Pure.

Memory, load and kernel speed are measured often and are never twice the same. If every wobble
were gossiped, lots would move for noise. A value is told again only when it left a band around
what was told last; kernel speed is told in steps of a factor of 1.5, so that equal devices bid
equally and the tie is broken by a hash instead of by measurement error.
"""

import math
from dataclasses import replace

from coeld.view import Resources

BUDGET_SHRINK = 0.10
BUDGET_GROWTH = 0.25  # less memory is urgent, more is not; the band is wider than noise of ±10 %
LOAD_POINTS = 20
SPEED_STEP = 1.5
SPEED_BAND = 1.1  # steps: half a step is rounding, the rest is wider than noise of ±10 %


def stepped_speed(kernel_mb_per_s: int) -> int:
    """The nearest power of SPEED_STEP, in MB/s."""
    return round(SPEED_STEP ** round(math.log(max(1, kernel_mb_per_s), SPEED_STEP)))


class Told:
    """What this device last told the swarm of its resources."""

    def __init__(self) -> None:
        self.resources: Resources | None = None

    def sample(self, fresh: Resources) -> bool:
        """Note a measurement; True if it matters, and then `resources` is new."""
        told = self.resources
        if told is not None and not _matters(told, fresh):
            return False
        speed = stepped_speed(fresh.kernel_mb_per_s)
        if told is not None and not _speed_moved(told, fresh):
            speed = told.kernel_mb_per_s
        budget = fresh.memory_budget_bytes
        if told is not None and not _budget_moved(told, fresh):
            budget = told.memory_budget_bytes  # else another quantity's news would carry its noise
        self.resources = replace(fresh, kernel_mb_per_s=speed, memory_budget_bytes=budget)
        return True


def _speed_moved(told: Resources, fresh: Resources) -> bool:
    ratio = max(1, fresh.kernel_mb_per_s) / max(1, told.kernel_mb_per_s)
    return abs(math.log(ratio, SPEED_STEP)) > SPEED_BAND


def _budget_moved(told: Resources, fresh: Resources) -> bool:
    before, budget = told.memory_budget_bytes, fresh.memory_budget_bytes
    return budget < before * (1 - BUDGET_SHRINK) or budget > before * (1 + BUDGET_GROWTH)


def _matters(told: Resources, fresh: Resources) -> bool:
    return (
        _budget_moved(told, fresh)
        or abs(fresh.cpu_load_percent - told.cpu_load_percent) > LOAD_POINTS
        or _speed_moved(told, fresh)
    )
