"""What this device can hold and what it bids for each lot: integers, from shared facts. Pure.

A bid is one integer that decides, in four parts. The top bit says that the lot is this device's
in the proposal that it believes in (coeld.deployment.proposal), the next that a replica of it is
(coeld.deployment.replicas). Then the value: the microseconds
per token that owning the lot here saves the swarm against reading it from the slowest disk each
time it is used, popularity × (disk − compute here − its part of the call), summed over those who
ask. At the bottom 16 bits of a rendezvous hash of device and *layer*: equal devices get whole
layers, and the choice stays the same when others join or leave.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final

from coeld.deployment.cost import PPM, CostModel, Tier
from coeld.deployment.proposal import tie
from coeld.ids import Lot, NodeId
from coeld.lot_sets import LOTS_PER_RECORD_MAX
from coeld.messages import BID_MAX
from coeld.view import ModelDemand

DISK: Final = Tier("disk", 0, 10)
"""A tired SD card: what a device without the lot in memory would read it from."""
HELD_WORTH: Final = (5, 4)
TIE_BITS: Final = 16
VALUE_MAX: Final = (1 << 28) - 1
"""Four minutes; no lot is worth more."""
REPLICA: Final = 1 << 44
PROPOSED: Final = REPLICA << 1
assert VALUE_MAX << TIE_BITS < REPLICA
assert PROPOSED + REPLICA < BID_MAX


def capacity(memory_budget_bytes: int, demand: ModelDemand) -> int:
    """How many lots fit beside the trunk. The budget counts bytes of weights, not resident size."""
    lots = (memory_budget_bytes - demand.trunk_bytes) // max(1, demand.lot_bytes)
    return max(0, min(lots, LOTS_PER_RECORD_MAX))


def claimable(mine: int, everybody: Iterable[int], demand: ModelDemand) -> int:
    """How many of the lots it has room for a device should claim; `everybody`: rooms, mine too.

    Parts of layers only where nothing else covers the model: a layer that is together costs one
    call and gives the bits of a single device (see coeld.datapath.dispatch). Where the model does
    not fit at all nobody can answer, and a part loaded then would stay when others come.
    """
    return mine if _parts(list(everybody), demand) else _whole(mine, demand)


def missing_lots(unclaimed: int, everybody: Iterable[int], demand: ModelDemand) -> int:
    """For how many lots there is no room, when so many are unclaimed: room for a part of a layer
    is room, though it is not claimed, and so is room for what cannot be loaded."""
    return max(0, min(unclaimed, demand.layers * demand.experts - sum(everybody)))


def _parts(rooms: Sequence[int], demand: ModelDemand) -> bool:
    """Does only a placement with parts of layers cover the model?"""
    whole = sum(_whole(room, demand) for room in rooms)
    return whole < demand.layers * demand.experts <= sum(rooms)


def _whole(lots: int, demand: ModelDemand) -> int:
    return lots // demand.experts * demand.experts


def value_us(model: CostModel, device: int, uses_ppm: int) -> int:
    """Microseconds per token, summed over askers, that a lot in `device`'s memory saves; ≥ 4."""
    demand, site = model.demand, model.sites.index((device, 0))
    here = DISK.lot_ns(demand.lot_bytes) - model.tiers[site].lot_ns(demand.lot_bytes)
    saved = sum(
        model.devices[asker].weight * (here - model.reach_ns(asker, site) // demand.used)
        for asker in model.askers
    )
    return max(4, min(VALUE_MAX, saved * uses_ppm // PPM // 1000))


def bids(
    model: CostModel,
    me: NodeId,
    owners: Mapping[Lot, NodeId],
    held: Collection[Lot],
    copied: Collection[int] = (),
) -> dict[Lot, int]:
    """This device's bid for every lot. `owners` is the proposal, empty if there is none; `copied`
    are the layers of which it proposes a replica here.

    A layer's lots are all worth what its most used one is, so that they stay together and are told
    in few words. Replicas `held` already are worth a quarter more, so that they stay where they
    are; an owner's bid does not change while it loads, so that claims rest. A device that the model
    does not know (there are too many) values all the least.
    """
    index = {device.node: i for i, device in enumerate(model.devices)}.get(me)
    values: dict[int, int] = {}
    found: dict[Lot, int] = {}
    for layer in range(model.demand.layers):
        lots = model.demand.lots_of(layer)
        most = max(map(model.uses, lots))
        if most not in values:
            values[most] = 4 if index is None else value_us(model, index, most)
        order = tie(me, layer)
        for lot in lots:
            mine = PROPOSED if owners.get(lot) == me else REPLICA if layer in copied else 0
            value = values[most]
            if lot in held and not mine:
                value = value * HELD_WORTH[0] // HELD_WORTH[1]
            found[lot] = mine | min(VALUE_MAX, value) << TIE_BITS | order
    return found
