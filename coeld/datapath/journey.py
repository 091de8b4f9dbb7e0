"""A request's caches along its way: here, and at the devices that run the other legs.

Caches cannot move. When the way ends, the journey does, and another is made from the request's
tokens.
"""

from coeld.datapath.ports import Cache, PeerLink
from coeld.datapath.ways import Way
from coeld.ids import NodeId


class Journey:
    """Where the keys and values of one request are."""

    def __init__(self, way: Way, here: Cache, number: int, peers: PeerLink) -> None:
        self.way = way
        self.here = here
        """Of the layers that run on this device."""
        self.number = number
        """Names the request at peers."""
        self.asked: set[NodeId] = set()
        """Peers that may hold caches."""
        self._peers = peers

    @property
    def bytes(self) -> int:
        return self.here.bytes

    def free(self) -> None:
        self.here.free()
        for node in self.asked:
            self._peers.free(node, self.number)
        self.asked.clear()
