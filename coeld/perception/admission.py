"""How many messages of one neighbour are listened to: more than any honest one sends. Pure.

A token bucket per sender. What is above it is dropped unread and counted, so a neighbour that
floods, mad or malicious, costs a bounded share of this device's time; gossip repeats what an honest
one may have lost by it.
"""

from coeld.ids import NodeId

MESSAGES_PER_S = 200
"""An auction publishes at most 50 records a second, relays and answers come to about as much."""
BURST = 1000
SENDERS_MAX = 4096


class Admission:
    """Who may still be heard."""

    def __init__(self) -> None:
        self.refused = 0
        self._buckets: dict[NodeId, tuple[float, float]] = {}
        """Tokens left, and when that was."""

    def admit(self, sender: NodeId, now: float) -> bool:
        """May this message of `sender` be read?"""
        tokens, at = self._buckets.get(sender, (float(BURST), now))
        tokens = min(BURST, tokens + max(0.0, now - at) * MESSAGES_PER_S)
        if tokens < 1:
            self.refused += 1
            return False
        if sender not in self._buckets and len(self._buckets) >= SENDERS_MAX:
            self._buckets.clear()
        self._buckets[sender] = (tokens - 1, now)
        return True
