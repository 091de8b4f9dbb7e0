"""Which measurements are worth telling: only those that would change somebody's decision. Pure.

Memory, load and kernel speed are measured often and are never twice the same. If every wobble
were gossiped, lots would move for noise. A value is told again only when it left a band around
what was told last; kernel speed is told in steps of a factor of 1.5, so that equal devices bid
equally and the tie is broken by a hash instead of by measurement error.
"""

import math
from dataclasses import replace
from typing import Any

from coeld.view import Resources

BUDGET_SHRINK = 0.10
BUDGET_GROWTH = 0.25  # less memory is urgent, more is not; the band is wider than noise of ±10 %
LOAD_POINTS = 20
PRESSED_PERCENT = 10
CALM_PERCENT = 1
SQUEEZE_S = 30.0
RELAX_S = 120.0
"""After a change, before memory is given up, or taken again: pressure is a mean over a minute."""
SQUEEZED_MIN = 50
"""Percent of the budget that stay in any case."""
SPEED_STEP = 1.5
SPEED_BAND = 1.1  # steps: half a step is rounding, the rest is wider than noise of ±10 %


def stepped_speed(mb_per_s: int) -> int:
    """The nearest power of SPEED_STEP, in MB/s; 0 stays 0, which is "unknown"."""
    return 0 if mb_per_s == 0 else round(SPEED_STEP ** round(math.log(mb_per_s, SPEED_STEP)))


def stepped(told: int, fresh: int) -> int:
    """What to tell of a measure: what was told, unless it is out of the band around that."""
    ratio = max(1, fresh) / max(1, told)
    return stepped_speed(fresh) if abs(math.log(ratio, SPEED_STEP)) > SPEED_BAND else told


class Squeeze:
    """How much of the budget to use: less while programs wait for memory, back when they do not.

    Memory may be "available" and yet thrashed: then weights that are read back from disk again and
    again cost everybody more than they are worth. systemd-oomd kills at 60 % of pressure.
    """

    def __init__(self) -> None:
        self.percent = 100
        self._changed_at = float("-inf")

    def budget(self, fresh: Resources, now: float) -> int:
        """Bytes to tell of, given the pressure of the last minute."""
        pressure, since_s = fresh.memory_pressure_percent, now - self._changed_at
        if pressure >= PRESSED_PERCENT and since_s >= SQUEEZE_S and self.percent > SQUEEZED_MIN:
            self.percent, self._changed_at = max(SQUEEZED_MIN, self.percent * 4 // 5), now
        elif pressure <= CALM_PERCENT and since_s >= RELAX_S and self.percent < 100:
            self.percent, self._changed_at = min(100, self.percent * 5 // 4 + 1), now
        return fresh.memory_budget_bytes * self.percent // 100


class Told:
    """What this device last told the swarm of its resources."""

    def __init__(self) -> None:
        self.resources: Resources | None = None
        self.squeeze = Squeeze()

    def sample(self, fresh: Resources, now: float) -> bool:
        """Note a measurement; True if it matters, and then `resources` is new.

        Each quantity keeps what was told of it unless it left its own band: else one quantity's
        news would carry the noise of the others.
        """
        told = self.resources
        budget = self.squeeze.budget(fresh, now)
        speeds = fresh.kernel_mb_per_s, fresh.row_mb_per_s, fresh.cut_us
        if told is None:
            kernel, row, cut_us = map(stepped_speed, speeds)
        else:
            if not _budget_moved(told.memory_budget_bytes, budget):
                budget = told.memory_budget_bytes
            before = told.kernel_mb_per_s, told.row_mb_per_s, told.cut_us
            kernel, row, cut_us = map(stepped, before, speeds)
            same = (budget, kernel, row, cut_us) == (told.memory_budget_bytes, *before)
            busy = abs(fresh.cpu_load_percent - told.cpu_load_percent) > LOAD_POINTS
            if same and not busy and fresh.sparing == told.sparing:
                return False
        self.resources = replace(
            fresh,
            memory_budget_bytes=budget,
            kernel_mb_per_s=kernel,
            row_mb_per_s=row,
            cut_us=cut_us,
        )
        return True

    def facts(self) -> dict[str, Any]:
        """What `resources` mean for this device's record, by its fields."""
        assert self.resources is not None
        speeds = "kernel_mb_per_s", "row_mb_per_s", "cut_us"
        names = "memory_budget_bytes", "cpu_load_percent", *speeds, "sparing"
        return {name: getattr(self.resources, name) for name in names}


def _budget_moved(before: int, budget: int) -> bool:
    return budget < before * (1 - BUDGET_SHRINK) or budget > before * (1 + BUDGET_GROWTH)
