"""What the records of those who have the same model open say, as one node asks for it. Pure.

Also since when that rests: the auction is quiet when no claim has changed for a while.
"""

from collections.abc import Iterable, Mapping

from coeld.deployment.auction import Offer, Task, leaders
from coeld.deployment.placement import Quiet, elsewhere, owners, replaced, won
from coeld.deployment.room import Room
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
        self._quiet = Quiet()
        self._seen = -1
        self._leading: dict[Task, Offer] | None = None
        """The best claims; None: not counted since they changed."""

    def records(self) -> list[Record]:
        """Of the present devices, this one included."""
        model = self.demand.model if self.demand else None
        return [r for r in self._perception.present() if model is not None and r.model == model]

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

    def leaders(self) -> Mapping[Task, Offer]:
        if self._leading is None:
            self._leading = leaders(self.records())
        return self._leading

    def winners(self) -> dict[Lot, NodeId]:
        """The owner of each lot that somebody claims."""
        return owners(self.leaders())

    def won(self) -> dict[Lot, int]:
        """Lots won here, and which copy."""
        return won(self._perception.me, self.leaders())

    def elsewhere(self) -> set[Lot]:
        """Lots that a device other than this one serves beyond suspicion."""
        return elsewhere(self.records(), self._me, self._perception.suspects())

    def replaced(self, held: Iterable[Lot]) -> set[Lot]:
        """Of the lots held here, those lost to others all of whom serve them."""
        mine = self.won()
        lost = [lot for lot in held if lot not in mine]
        if not lost:
            return set()
        return replaced(lost, self.records(), self.leaders(), self._perception.suspects())

    def room(self, narrow: bool) -> Room:
        """Memory here and elsewhere; `narrow`: some lots have to be held in fewer bits."""
        assert self.demand is not None
        return Room(self.demand, self._perception.me, self.records(), narrow)
