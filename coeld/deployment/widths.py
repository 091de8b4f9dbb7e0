"""Which layers are held in fewer bits than they are stored in, and how many, where memory is short.

While the lots fit these devices as they are stored, none is narrow. If they do not, and would in
fewer bits, every device works out from the same records how many layers each device takes
(`quotas`), so that as few as possible lose bits: first as many as each holds as stored, then one
more after the other wherever that costs the fewest. A swarm that is short of memory for the model
has none for replicas: what is narrow has one owner, and so one width. Which of its layers an owner
narrows follows from what it has won and its budget alone (`narrow_layers`): those that hurt least
(ModelDemand.narrow_first), but first those that are narrow already. Whole layers, never parts: one
width is one kernel call. Where not even whole layers in fewer bits fit, nothing is narrowed. Pure.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Final

from coeld.ids import Lot
from coeld.lot_sets import LOTS_PER_RECORD_MAX
from coeld.messages import Record
from coeld.view import ModelDemand

WIDEN_S: Final = 30.0
"""For how long there must have been room before a layer gets its bits back: a device that comes and
goes costs others no reading."""
NARROW_S: Final = 2.0
"""How long the facts must have been the same before the first layer of a swarm loses bits: devices
that are started one after the other meet first. Requests wait for longer (engine.patience_s)."""


def rest_s(narrow: bool, records: Iterable[Record], quiet_s: float) -> float:
    """How long facts must be the same before a device thinks about them: `quiet_s`, or longer if it
    is the first time that layers would lose bits."""
    return NARROW_S if narrow and not any(record.narrow for record in records) else quiet_s


def in_narrow(demand: ModelDemand) -> ModelDemand:
    """The demand if every lot were narrow."""
    return replace(demand, lot_bytes=demand.narrow_lot_bytes, narrow_lot_bytes=0)


def narrow_capacity(budget_bytes: int, demand: ModelDemand) -> int:
    """How many lots fit beside the trunk in fewer bits, in whole layers; as they are stored if
    they have no such form."""
    lot_bytes = demand.narrow_lot_bytes or demand.lot_bytes
    return _layers(demand, lot_bytes, max(0, budget_bytes - demand.trunk_bytes)) * demand.experts


def must_narrow(demand: ModelDemand, rooms_bytes: Sequence[int]) -> bool:
    """Do the lots fit beside the trunks only if some are narrow?"""
    if not demand.narrow_lot_bytes:
        return False
    if sum(room // max(1, demand.lot_bytes) for room in rooms_bytes) >= len(demand.lots()):
        return False
    return sum(_layers(demand, demand.narrow_lot_bytes, room) for room in rooms_bytes) >= (
        demand.layers
    )


def quotas(demand: ModelDemand, rooms_bytes: Sequence[int], order: Sequence[object]) -> list[int]:
    """Layers of each device, `layers` in all, so that the fewest are narrow; of equal devices the
    first in `order` (any comparable values that differ) takes one more. `must_narrow` holds."""
    most = [_layers(demand, demand.narrow_lot_bytes, room) for room in rooms_bytes]
    counts = [_layers(demand, demand.lot_bytes, room) for room in rooms_bytes]
    for _ in range(demand.layers - sum(counts)):
        free = [site for site, count in enumerate(counts) if count < most[site]]

        def costs(site: int) -> tuple[int, object]:
            count, room = counts[site], rooms_bytes[site]
            more = _narrow(demand, count + 1, room) - _narrow(demand, count, room)
            return more, order[site]

        counts[min(free, key=costs)] += 1
    return counts


def narrow_layers(
    demand: ModelDemand, won: Iterable[Lot], room_bytes: int, narrow: Collection[int]
) -> frozenset[int]:
    """Of the layers won, those to hold in fewer bits, so that all fit; `narrow` are already.

    Room is left for one lot beside itself, so that a lot can change its width and answer.
    """
    counts = Counter(lot.layer for lot in won)
    over = sum(counts.values()) * demand.lot_bytes - room_bytes
    if over <= 0 or not demand.narrow_lot_bytes:
        return frozenset()
    over += demand.lot_bytes
    rank = {layer: place for place, layer in enumerate(demand.narrow_first)}
    chosen: list[int] = []
    for layer in sorted(counts, key=lambda layer: (layer not in narrow, rank.get(layer, 0), layer)):
        if over <= 0:
            break
        chosen.append(layer)
        over -= counts[layer] * (demand.lot_bytes - demand.narrow_lot_bytes)
    return frozenset(chosen)


class Widths:
    """The layers that this device wants to hold in fewer bits. What need not be narrow any more
    stays so until there has been room for it for WIDEN_S."""

    def __init__(self) -> None:
        self.narrow: frozenset[int] = frozenset()
        self._since = float("inf")

    @property
    def due(self) -> float:
        """When layers may become wider."""
        return self._since + WIDEN_S

    def want(
        self,
        demand: ModelDemand,
        won: Collection[Lot],
        room_bytes: int,
        held: Collection[int],
        now: float,
    ) -> frozenset[int]:
        """`held`: layers that are here in fewer bits."""
        needed = narrow_layers(demand, won, room_bytes, held)
        spared = frozenset(held) & {lot.layer for lot in won} - needed
        self._since = min(self._since, now) if spared else float("inf")
        self.narrow = needed if now >= self.due else needed | spared
        return self.narrow


def _layers(demand: ModelDemand, lot_bytes: int, room_bytes: int) -> int:
    """How many whole layers of lots of that size fit."""
    return min(room_bytes // lot_bytes, LOTS_PER_RECORD_MAX) // demand.experts


def _narrow(demand: ModelDemand, layers: int, room_bytes: int) -> int:
    """How many of so many layers have to be narrow in that room."""
    over = layers * demand.experts * demand.lot_bytes - room_bytes
    if over <= 0:
        return 0
    saved = demand.experts * (demand.lot_bytes - demand.narrow_lot_bytes)
    return min(layers, -(-(over + demand.lot_bytes) // saved))
