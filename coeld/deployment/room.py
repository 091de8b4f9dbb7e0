"""What a device may claim and hold, by its budget, those of others and the width of lots. Pure."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from coeld.deployment.cost import CostModel
from coeld.deployment.own_spans import roomy
from coeld.deployment.pricing import capacity, claimable, missing_lots
from coeld.deployment.supply import considered
from coeld.deployment.widths import in_narrow, narrow_capacity
from coeld.ids import Lot, NodeId
from coeld.messages import Record
from coeld.view import ModelDemand


def fitting(records: Iterable[Record]) -> Callable[[int, ModelDemand], int]:
    """How many lots of a model fit into a budget in bytes: as they are stored, or, where some of
    these devices hold lots in fewer bits, so."""
    return narrow_capacity if any(record.narrow for record in records) else capacity


@dataclass(frozen=True, slots=True)
class Room:
    """Memory for the lots of one model."""

    stored: ModelDemand
    me: Record
    records: Sequence[Record]
    """Of all devices with the model, this one too."""
    narrow: bool
    """The lots fit only if some are held in fewer bits (coeld.deployment.widths)."""
    _rooms: list[int] = field(default_factory=list, init=False, repr=False, compare=False)
    """How many lots fit at each device that is considered, once counted."""

    @property
    def demand(self) -> ModelDemand:
        """With lots as small as they may have to be."""
        return in_narrow(self.stored) if self.narrow else self.stored

    @property
    def lots(self) -> int:
        """How many fit here."""
        return capacity(self.me.memory_budget_bytes, self.demand)

    @property
    def beside_trunk_bytes(self) -> int:
        return max(0, self.me.memory_budget_bytes - self.stored.trunk_bytes)

    @property
    def capacity_bytes(self) -> int:
        """For lots; in whole ones while all have one size."""
        return self.beside_trunk_bytes if self.narrow else self.lots * self.stored.lot_bytes

    def claimable(self, most: int, whole: bool) -> int:
        """How many lots to claim, `most` at most; `whole`: no layer in parts unless it must be."""
        mine = min(most, self.lots)
        return claimable(mine, self._everybody(), self.demand) if whole else mine

    def most(self, model: CostModel, owners: Mapping[Lot, NodeId]) -> int:
        """How many lots to claim at most, if `owners` are as proposed."""
        return self.lots if self.narrow else roomy(model, self.me, owners)

    @property
    def others_suffice(self) -> bool:
        """Have the other devices room for the model as it is stored? Not those that are sparing."""
        others = (r for r in self.records if r.origin != self.me.origin and not r.sparing)
        room = sum(capacity(record.memory_budget_bytes, self.stored) for record in others)
        return room >= self.stored.layers * self.stored.experts

    def fill_bytes(self, most: int, whole: bool) -> int:
        """What loading may fill up to."""
        if self.narrow:
            return self.capacity_bytes
        return self.claimable(most, whole) * self.stored.lot_bytes

    def missing_bytes(self, unclaimed: int) -> int:
        """What the swarm lacks, once every device claims what it can and `unclaimed` lots are
        left. In fewer bits they fit."""
        if self.narrow:
            return 0
        return missing_lots(unclaimed, self._everybody(), self.stored) * self.stored.lot_bytes

    def _everybody(self) -> list[int]:
        if not self._rooms:
            counted, demand = considered(self.stored, self.records), self.demand
            self._rooms.extend(capacity(r.memory_budget_bytes, demand) for r in counted)
        return self._rooms
