"""How long to wait before accusing, and before believing an accusation. Pure arithmetic.

Lifeguard (Dadgar, Phillips, Currey: "Lifeguard: SWIM-ing with Situational Awareness", 2017): most
false accusations come from an accuser that was too busy to hear. A device pinned by its own
inference, or a laptop that slept, first doubts itself: time in which it was late does not count as
silence of others, and every timeout is multiplied by 1 + its health score. And agreement shortens
the wait: a lone accuser is slow to be believed, several independent ones are fast.
"""

import math
from functools import lru_cache

SCORE_MAX = 7  # timeouts grow at most 8-fold, as in the paper
LATE_SHARE = 0.25  # of a heartbeat: later than this is late
CONFIRMATIONS = 2
"""Accusers besides the first after which the shortest wait is enough (memberlist's default)."""
LONE_FACTOR = 3
"""How much longer an accusation that nobody confirms waits."""


class LocalHealth:
    """Score 0 (well) .. SCORE_MAX: raised when late or accused, lowered when punctual."""

    def __init__(self, heartbeat_s: float) -> None:
        self._heartbeat_s = heartbeat_s
        self._score = 0

    @property
    def patience(self) -> int:
        """What to multiply timeouts with: 1..8."""
        return 1 + self._score

    def woke(self, late_s: float) -> float:
        """Note one due wake-up; returns the seconds in which this device heard nobody."""
        if late_s <= self._heartbeat_s * LATE_SHARE:
            self._score = max(0, self._score - 1)
            return 0.0
        self._score = min(SCORE_MAX, self._score + 1 + int(late_s / self._heartbeat_s))
        return late_s

    def accused(self) -> None:
        """Somebody missed us: perhaps we are the slow one."""
        self._score = min(SCORE_MAX, self._score + 1)


@lru_cache(maxsize=8192)
def suspicion_s(least_s: float, confirmations: int, devices: int) -> float:
    """How long a suspect may object, with `confirmations` accusers besides the first.

    Lifeguard's formula: max − (max − min)·ln(c + 1) / ln(k + 1), with max = LONE_FACTOR · min and
    k = CONFIRMATIONS; `devices` counts everybody present. Where k others cannot be found (fewer
    than k + 2 devices) nobody waits for them, as in memberlist.
    """
    if devices - 2 < CONFIRMATIONS:
        return least_s
    agreed = math.log1p(min(confirmations, CONFIRMATIONS)) / math.log1p(CONFIRMATIONS)
    return least_s * (LONE_FACTOR - (LONE_FACTOR - 1) * agreed)
