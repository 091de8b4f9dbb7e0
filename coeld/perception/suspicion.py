"""Am I the slow one? How much longer to wait before accusing others. Pure arithmetic.

Lifeguard (Dadgar, Phillips, Currey: "Lifeguard: SWIM-ing with Situational Awareness", 2017): most
false accusations come from an accuser that was too busy to hear. A device pinned by its own
inference, or a laptop that slept, first doubts itself. Two measures: time in which this device
was late does not count as silence of others, and while it keeps being late every timeout is
multiplied by 1 + its health score.
"""

SCORE_MAX = 7  # timeouts grow at most 8-fold, as in the paper
LATE_SHARE = 0.25  # of a heartbeat: later than this is late


class LocalHealth:
    """Score 0 (well) .. SCORE_MAX, raised by late wake-ups, lowered by punctual ones."""

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
