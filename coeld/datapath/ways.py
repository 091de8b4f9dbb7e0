"""The way of a request: which device runs which of its layers. Pure.

The route table names the legs. What it says may be out of date for the moment in which a request
sets out: a device on the way has just failed, or this device's own graphs do not begin and end
where its legs do. This device can run any layers itself, cut by cut, since it holds the whole
trunk; so it takes over what nobody else can run now.
"""

from collections.abc import Collection

from coeld.ids import NodeId
from coeld.routes import Leg, RouteTable

Way = tuple[Leg, ...]
"""Layer 0 to the last, without gaps; neighbouring legs are of different devices."""


def way_of(table: RouteTable | None, me: NodeId, layers: int, lost: Collection[NodeId]) -> Way:
    """The table's way with the legs of `lost` devices, and of those without an address, here."""
    alone = (Leg(me, 0, layers),)
    if table is None or not table.legs or not _joined(table.legs, layers):
        return alone
    way: list[Leg] = []
    for leg in table.legs:
        reachable = leg.node in table.addresses and leg.node not in lost
        node = leg.node if reachable else me
        first = way.pop().first if way and way[-1].node == node else leg.first
        way.append(Leg(node, first, leg.stop))
    return tuple(way)


def _joined(legs: Way, layers: int) -> bool:
    """Whether each leg begins where the one before ends, from layer 0 to the last."""
    borders = [0, *(leg.stop for leg in legs)]
    begins = all(leg.first == border for leg, border in zip(legs, borders, strict=False))
    return begins and borders[-1] == layers and borders == sorted(set(borders))
