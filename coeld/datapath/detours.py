"""Which way a connection to a peer takes: straight, or through a device that reaches it. Pure.

A link between two devices may be down though each of them reaches everybody else (a port of a
switch, Wi-Fi that hears but is not heard, a firewall). Then the swarm rightly holds both for alive,
nobody takes over what they serve, and only a way round helps. The straight way comes first, a way
that failed last: of those that all failed the one whose failure is the oldest.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final

from coeld.ids import NodeId

FAILED_S: Final = 3.0
"""So long a way that failed is none: as long as the swarm takes to bury a device."""
FORGET_S: Final = 60.0
NEVER: Final = float("-inf")


@dataclass(slots=True)
class Detours:
    """What is known of the ways to peers. A way is named by the device in between; None: nobody.
    Times are the caller's, in seconds."""

    _failed_at: dict[tuple[NodeId, NodeId | None], float] = field(default_factory=dict)

    def failed(self, node: NodeId, via: NodeId | None, now_s: float) -> None:
        known = self._failed_at.items()
        self._failed_at = {way: at_s for way, at_s in known if now_s - at_s < FORGET_S}
        self._failed_at[node, via] = now_s

    def works(self, node: NodeId) -> None:
        """It is reached straight (again): ways round it are forgotten."""
        for way in [way for way in self._failed_at if way[0] == node]:
            del self._failed_at[way]

    def straight(self, node: NodeId) -> bool:
        """Nothing speaks against the straight way."""
        return (node, None) not in self._failed_at

    def way(self, node: NodeId, others: Collection[NodeId], now_s: float) -> NodeId | None:
        """The way for the next connection to `node`, if any of `others` may be asked to help."""
        return min(self._ways(node, others, now_s), key=lambda via: self._at(node, via))

    def another(self, node: NodeId, others: Collection[NodeId], now_s: float) -> bool:
        """Is there a way that has not just failed?"""
        ways = self._ways(node, others, now_s)
        return any(now_s - self._at(node, via) >= FAILED_S for via in ways)

    def _at(self, node: NodeId, via: NodeId | None) -> float:
        return self._failed_at.get((node, via), NEVER)

    def _ways(self, node: NodeId, others: Collection[NodeId], now_s: float) -> list[NodeId | None]:
        """Straight, and through those that are reached straight themselves."""
        helpers = [
            other for other in others if other != node and now_s - self._at(other, None) >= FAILED_S
        ]
        return [None, *helpers]
