"""What the records of those who have the same model open say, as one node asks for it. Pure.

Also since when that rests: the auction is quiet when no claim has changed for a while.
"""

from collections.abc import Iterable, Mapping

from coeld.deployment.auction import Offer, Task, leaders
from coeld.deployment.placement import (
    Quiet,
    elsewhere,
    outlasting,
    owners,
    replaced,
    serving,
    winners,
    won,
)
from coeld.deployment.proposal import Facts
from coeld.deployment.room import Room
from coeld.deployment.supply import facts_of
from coeld.ids import Lot, NodeId
from coeld.messages import Record
from coeld.node_config import NodeConfig
from coeld.perception.perceive import Perception
from coeld.update.rollout import release_of
from coeld.view import ModelDemand


class Market:
    """Views of `perception` for the model in `demand`; None: there is none, and no market."""

    def __init__(self, perception: Perception, config: NodeConfig) -> None:
        self.demand: ModelDemand | None = None
        self._perception = perception
        self._me = perception.me.origin
        self._quiet_s, self._settle_s = config.quiet_ms / 1000, config.settle_ms / 1000
        self._spans = config.spans
        self._quiet = Quiet()
        self._seen = -1
        self._leading: dict[Task, Offer] | None = None
        """The best claims; None: not counted since they changed."""
        self._winners: dict[Lot, NodeId] = {}
        self._rivalling: list[Record] = []
        self._rivals: dict[Task, Offer] = {}
        """The best claims of these."""
        self._looked: tuple[tuple[Record, ...], ModelDemand | None] = (), None
        """All present devices, and the model, that these were worked out for:"""
        self._records: tuple[Record, ...] = ()
        self._facts: Facts | None = None
        self._room: Room | None = None

    def records(self) -> tuple[Record, ...]:
        """Of the present devices, this one included. The same tuple until one changes."""
        present, demand = self._perception.present(), self.demand
        if self._looked[0] is not present or self._looked[1] is not demand:
            self._looked, self._facts = (present, demand), None
            self._records = tuple(r for r in present if demand and r.model == demand.model)
        return self._records

    def facts(self) -> Facts:
        """What a proposal depends on."""
        assert self.demand is not None
        records = self.records()
        if self._facts is None:
            self._facts = facts_of(self.demand, records, self._spans)
        return self._facts

    def facts_after(self, before: Facts | None) -> Facts:
        """The facts to think about after those: the same while what follows from them is carried
        out. What is measured meanwhile waits, for lots that are half read are read in vain if
        another gets them; devices and memory that come and go do not."""
        facts = self.facts()
        if before is None or facts == before or not facts.measured_anew(before):
            return facts
        winners = self.winners()
        underway = winners.items() - serving(self.records(), winners).items()
        return before if underway else facts

    def others(self) -> list[Record]:
        return [record for record in self.records() if record.origin != self._me]

    @property
    def complete(self) -> bool:
        """Is the model open here, everybody's record known, and nobody still on the way to this
        version? Else what is missing may come yet."""
        demand, perception = self.demand, self._perception
        if demand is None or perception.me.model != demand.model or not perception.complete:
            return False
        told = [record.versions for record in perception.present() if record.model is None]
        return (demand.name, release_of(demand)) not in [(each.name, each.next) for each in told]

    def moved(self, now: float) -> bool:
        """Has any claim changed since the last look?"""
        if self._perception.market == self._seen:
            return False
        self._seen = self._perception.market
        self._leading = None
        self.disturb(now)
        return True

    def disturb(self, now: float) -> None:
        """Claims are about to change: the auction does not rest."""
        self._quiet.disturb(now, self._settle_s)

    def rests(self) -> tuple[float, float]:
        """From when on the auction counts as quiet, and as settled."""
        return self._quiet.rests(self._quiet_s, self._settle_s)

    def rivals(self) -> Mapping[Task, Offer]:
        """The best claims of the others."""
        others = self.others()
        if self._rivalling != others:
            self._rivalling, self._rivals = others, leaders(others)
        return self._rivals

    def leaders(self) -> Mapping[Task, Offer]:
        if self._leading is None:
            mine = [record for record in self.records() if record.origin == self._me]
            self._leading = leaders(mine, self.rivals())
            self._winners = owners(self._leading)
        return self._leading

    def winners(self) -> Mapping[Lot, NodeId]:
        """The owner of each lot that somebody claims."""
        self.leaders()
        return self._winners

    def won(self) -> dict[Lot, int]:
        """Lots won here, and which copy."""
        return won(self._perception.me, self.leaders())

    def taken_over(self, held: Iterable[Lot]) -> tuple[set[Lot], set[Lot]]:
        """Lots that another device serves beyond suspicion and will go on to serve; and, of those
        `held` here, lots lost to others all of whom serve them.

        What is only at devices that leave, or run out of battery, is as urgent as a hole. So is, of
        what is held here and lost, what is only at those who may let go of it as we may.
        """
        records, me, suspects = self.records(), self._perception.me, self._perception.suspects()
        unsure = suspects | {record.origin for record in records if record.sparing}
        there = elsewhere(records, me.origin, unsure)
        mine = self.won()
        lots = [lot for lot in held if lot not in mine]
        if not lots:
            return there, set()
        lost = winners(lots, self.leaders())
        if not me.sparing:  # on who leaves nobody counts
            there = there.difference(lots) | outlasting(lost, me.origin, records, unsure)
        return there, replaced(lost, records, suspects)

    def room(self, narrow: bool) -> Room:
        """Memory here and elsewhere; `narrow`: some lots have to be held in fewer bits."""
        assert self.demand is not None
        records = self.records()
        if self._room is None or self._room.records is not records or self._room.narrow != narrow:
            self._room = Room(self.demand, self._perception.me, records, narrow)
        return self._room
