"""When to compare views part by part, and what differs: anti-entropy that rests at rest. Pure.

Every beat shows the fingerprint of a view. News under way explain one beat with another view than
ours, so only the second in a row is followed up; a first contact is, at once. At most one question
per heartbeat, and one answer per device in half the time: a swarm in turmoil compares no more
often than one at rest talks.
"""

from coeld.ids import NodeId
from coeld.perception.fingerprint import Fingerprints, parts_for

ODD_BEATS = 2
"""Beats in a row with another view before it is compared."""


class Comparing:
    """With whom, and when."""

    def __init__(self, heartbeat_s: float) -> None:
        self._heartbeat_s = heartbeat_s
        self._odd: dict[NodeId, int] = {}
        """Beats in a row in which a device's view was another than ours."""
        self._asked_at = float("-inf")
        self._answered: dict[NodeId, float] = {}

    def agrees(self, sender: NodeId) -> None:
        self._odd[sender] = 0

    def differs(self, sender: NodeId, now: float) -> bool:
        """Another view there: is it time to find out where?"""
        first = sender not in self._odd
        odd = self._odd[sender] = self._odd.get(sender, 0) + 1
        rested_s = now - self._asked_at
        ask = (first and rested_s >= self._heartbeat_s / 2) or (
            odd >= ODD_BEATS and rested_s >= self._heartbeat_s
        )
        if ask:
            self._asked_at = now
            self._odd[sender] = 0
        return ask

    def answers(self, sender: NodeId, now: float) -> bool:
        """May this device be answered, or did it ask a moment ago?"""
        if now - self._answered.get(sender, float("-inf")) < self._heartbeat_s / 4:
            return False
        self._answered[sender] = now
        return True

    def forget(self, node: NodeId) -> None:
        self._odd.pop(node, None)
        self._answered.pop(node, None)


def differing(view: Fingerprints, sums: tuple[int, ...], devices: int) -> tuple[int, list[int]]:
    """Which parts of a view differ from `sums`, and of how many; at least as fine as suits it."""
    mine = view.parts(len(sums))
    parts = max(len(sums), parts_for(devices))
    scale = parts // len(sums)
    return parts, [part for part in range(parts) if mine[part // scale] != sums[part // scale]]
