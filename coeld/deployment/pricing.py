"""What this device can hold and what a lot is worth to it: integers, from measured figures. Pure.

A lot's value is the time that owning it here saves per token against reading it from the slowest
disk each time, in nanoseconds: bytes / disk speed − bytes / kernel speed. Whoever holds all of a
layer already counts its own cost as a fifth less, so another must be 25 % faster to take it:
moving is not free, and this keeps noise from moving anything; a layer that is torn between devices
has no such tie and comes together again. Below the value, 16 bits of a rendezvous hash of device
and *layer* break ties: equal devices get whole layers, and the choice stays the same when others
join or leave.
"""

import hashlib
from collections.abc import Iterable
from functools import lru_cache

from coeld.ids import NodeId
from coeld.messages import BID_MAX, LOTS_PER_RECORD_MAX
from coeld.view import ModelDemand

DISK_MB_PER_S = 10
"""A tired SD card: what a device without the lot in memory would read it with."""
HELD_COST = (4, 5)
TIE_BITS = 16
VALUE_MAX = (BID_MAX >> TIE_BITS) - 1


def capacity(memory_budget_bytes: int, demand: ModelDemand) -> int:
    """How many lots fit beside the trunk. The budget counts bytes of weights, not resident size."""
    lots = (memory_budget_bytes - demand.trunk_bytes) // max(1, demand.lot_bytes)
    return max(0, min(lots, LOTS_PER_RECORD_MAX))


def claimable(mine: int, everybody: Iterable[int], demand: ModelDemand) -> int:
    """How many of the lots it has room for a device should claim; `everybody`: rooms, mine too.

    Only whole layers, as long as the whole layers of all devices cover the model: a layer that is
    together costs one call and gives the bits of a single device (see coeld.datapath.dispatch).
    """

    def whole(lots: int) -> int:
        return lots // demand.experts * demand.experts

    enough = sum(map(whole, everybody)) >= demand.layers * demand.experts
    return whole(mine) if enough else mine


def value_ns(lot_bytes: int, kernel_mb_per_s: int, held: bool) -> int:
    """Nanoseconds per token that one lot in memory here saves; at least 1."""
    cost_ns = lot_bytes * 1000 // max(1, kernel_mb_per_s)
    if held:
        cost_ns = cost_ns * HELD_COST[0] // HELD_COST[1]
    return max(1, min(VALUE_MAX, lot_bytes * 1000 // DISK_MB_PER_S - cost_ns))


@lru_cache(maxsize=65536)
def tie(node: NodeId, layer: int) -> int:
    """Highest random weight (Thaler, Ravishankar, 1998) of a device for a layer."""
    digest = hashlib.sha256(f"{node}/{layer}".encode()).digest()
    return int.from_bytes(digest[: TIE_BITS // 8], "big")


def bid(node: NodeId, layer: int, value: int) -> int:
    """One integer that decides: first the value, then the tie-break."""
    return (value << TIE_BITS) | tie(node, layer)
