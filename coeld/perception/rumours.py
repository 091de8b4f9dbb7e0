"""Of whom to tell the neighbours, how soon, and when it is no longer needed. Pure.

News of others are passed on once, as versions and states, on board of the next beat, and the beat
comes early for them: at once for the first, together for a burst (the gossip interval of
memberlist), and without much waiting for alarms. SWIM repeats each piece λ·log n times because
its targets are random and its packets get lost; here neighbours are fixed, each device hears the
same from several of them, and comparing views repairs the rest. So the other way round: what
several neighbours told meanwhile is not told again (counter-based suppression as for broadcast
storms: Ni, Tseng, Chen, Sheu, 1999).
"""

from itertools import islice

from coeld.ids import NodeId

RELAY_S = 0.2
"""Between two publications of news in a burst."""
ALARM_S = 0.02
"""The same while somebody is accused, dead or cleared."""
NEWS_MAX = 128
"""Devices in one beat; more wait for the next."""
ENOUGH = 3
"""Neighbours that told of something before we did, after which we need not."""


class Rumours:
    """Devices to tell of, in order; alarms come first."""

    def __init__(self) -> None:
        self._alarms: dict[NodeId, None] = {}
        self._news: dict[NodeId, int] = {}
        """And how many told the same meanwhile."""

    @property
    def pause_s(self) -> float:
        """How long after a beat the next one is due for what waits here."""
        return ALARM_S if self._alarms else RELAY_S if self._news else float("inf")

    def add(self, node: NodeId, alarm: bool) -> None:
        if alarm:
            self._news.pop(node, None)
            self._alarms[node] = None
        elif node not in self._alarms:
            self._news[node] = 0

    def heard_again(self, node: NodeId) -> None:
        """Somebody told of it who has no later news than we."""
        times = self._news.get(node, -1) + 1
        if times >= ENOUGH:
            del self._news[node]
        elif times > 0:
            self._news[node] = times

    def take(self) -> list[NodeId]:
        """The next NEWS_MAX, which are then told."""
        taken = list(islice(self._alarms, NEWS_MAX))
        taken += islice(self._news, NEWS_MAX - len(taken))
        for node in taken:
            self._alarms.pop(node, None)
            self._news.pop(node, None)
        return taken
