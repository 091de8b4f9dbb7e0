"""The way of a request: which device runs which of its layers. Pure.

The route table names the legs. What it says may be out of date for the moment in which a request
sets out: a device on the way has just failed, or this device's own graphs do not begin and end
where its legs do. Another device may serve the very same layers. If none does, this one can run any
layers itself, cut by cut, since it holds the whole trunk.
"""

from collections.abc import Collection

from coeld.ids import NodeId
from coeld.routes import Leg, RouteTable

Way = tuple[Leg, ...]
"""Layer 0 to the last, without gaps; neighbouring legs are of different devices."""


def way_of(table: RouteTable | None, me: NodeId, layers: int, lost: Collection[NodeId]) -> Way:
    """The table's way without `lost` devices, and without those that have no address."""
    alone = (Leg(me, 0, layers),)
    if table is None or not table.legs or not _joined(table.legs, layers):
        return alone
    reachable = (table.addresses.keys() | {me}) - set(lost)
    others = {(leg.first, leg.stop): leg.node for leg in table.spans if leg.node in reachable}
    way: list[Leg] = []
    for leg in table.legs:
        known = leg.node in reachable
        node = leg.node if known else others.get((leg.first, leg.stop), me)
        first = way.pop().first if way and way[-1].node == node else leg.first
        way.append(Leg(node, first, leg.stop))
    return tuple(way)


def _joined(legs: Way, layers: int) -> bool:
    """Whether each leg begins where the one before ends, from layer 0 to the last."""
    borders = [0, *(leg.stop for leg in legs)]
    begins = all(leg.first == border for leg, border in zip(legs, borders, strict=False))
    return begins and borders[-1] == layers and borders == sorted(set(borders))
