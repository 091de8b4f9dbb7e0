"""Which brokers to listen to, when to stop, and at whose door to knock. Pure.

Links follow the neighbours that the rings give. Whoever else is heard (a first contact by mDNS or
from the configured list, a neighbour of yesterday) is left after a while, so that the load of a
device does not grow with the swarm; but never while no neighbour is heard. The dead are knocked at
now and then, one at a time: nothing else brings two halves of a healed partition together again.
"""

from collections.abc import Mapping
from random import Random

from coeld.effects import Connect, Disconnect, Effect
from coeld.ids import NodeId

LINGER_S = 2.0
"""That a link is kept to a device that is no neighbour: views of the ring settle meanwhile."""
KNOCK_S = 5.0
"""Between two attempts to reach one of the dead, ±50 %."""

Address = tuple[int, str, int]
"""incarnation, host and port of a device's broker."""


class Links:
    """The links of one device to the brokers of others."""

    def __init__(self, rng: Random) -> None:
        self.neighbours: set[NodeId] = set()
        self.heard: dict[NodeId, float] = {}
        """When each device was last heard directly."""
        self._rng = rng
        self._wanted: dict[NodeId, Address] = {}
        """The links that were asked for."""
        self._strangers: dict[NodeId, float] = {}
        """Since when somebody who is no neighbour is heard or listened to."""
        self._knock_at = float("-inf")

    def choose(self, neighbours: set[NodeId], addresses: Mapping[NodeId, Address]) -> list[Effect]:
        """From now on these; asks for links that are new, once per life and address."""
        self.neighbours = neighbours
        effects: list[Effect] = []
        for node in sorted(neighbours):
            address = addresses.get(node)
            if address is not None and self._wanted.get(node) != address:
                self._wanted[node] = address
                effects.append(Connect(node, address[1], address[2]))
        return effects

    def review(self, gone: Mapping[NodeId, Address], now: float) -> list[Effect]:
        """Once per heartbeat: leave strangers, knock at one of those who are gone."""
        effects: list[Effect] = []
        for node, at in list(self.heard.items()):
            if now - at > LINGER_S:
                del self.heard[node]
        strangers = (self.heard.keys() | self._wanted.keys()) - self.neighbours
        self._strangers = {node: self._strangers.get(node, now) for node in strangers}
        if not self.neighbours or self.heard.keys() & self.neighbours:
            for node in sorted(strangers):
                if now - self._strangers[node] > LINGER_S:
                    effects.append(Disconnect(node))
                    self._forget(node)
        if now >= self._knock_at:
            if self._knock_at > float("-inf") and gone:
                node = self._rng.choice(sorted(gone))
                self._wanted[node] = gone[node]
                effects.append(Connect(node, gone[node][1], gone[node][2]))
            self._knock_at = now + KNOCK_S * self._rng.uniform(0.5, 1.5)
        return effects

    def _forget(self, node: NodeId) -> None:
        for known in (self.heard, self._wanted, self._strangers):
            known.pop(node, None)
