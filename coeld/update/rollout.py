"""When a device goes over to the newest version of its model: a rule that all compute alike. Pure.

Old and new are never in one memory together, so a device that goes over leaves a hole. While some
may go without one (the others still serve every lot of the old version) and have room for the whole
new version, these go first; the others answer until the new version is served in full. Then, or at
once where memory is for one copy only, everybody else admits no more requests, and goes over when
nobody has one under way any more. So an answer ends on the version that it began on, for at most a
named time; and only where one copy fills the swarm is there a gap without answers.

Nothing begins while somebody still fetches the new version and has answers to lose, nor unless
those who have it on disk have room for all of it. Whoever cannot get it stays on the old one and
answers as long as others who stay serve the rest. The rule asks records only; where views differ
for a moment two may take each other for those who stay, so whoever goes says so first, and waits.
Until its lots are let go it comes back if one of those who were to answer on fails.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

from coeld.effects import Admit, Effect, EndRequests, OpenModel, Report
from coeld.ids import Lot, NodeId
from coeld.messages import Record
from coeld.releases import NO_VERSIONS, Phase, Progress, Release, Versions
from coeld.view import ModelDemand

LINGER_S: Final = 0.5
"""From saying that nothing is served here any more to letting it go: routes follow meanwhile, and
calls that were under way end."""


class Turn(Enum):
    STAY = "stay"
    FIRST = "first"
    """Go while others answer."""
    ALL = "all"
    """Nobody answers with the old version any more."""


def release_of(demand: ModelDemand) -> Release:
    return Release(demand.version, demand.model)


@dataclass(frozen=True, slots=True)
class Swarm:
    """The present devices, by how far they are from `old` to `new`."""

    old: ModelDemand
    new: ModelDemand
    staying: Mapping[NodeId, Record]
    """They have the old version open."""
    ready: Collection[NodeId]
    """Those of `staying` that may go."""
    fetching: bool
    """Does any device with another version open still fetch the new one?"""
    elsewhere: Collection[Record]
    """They may go too, from a third version."""
    gone: Collection[Record]
    """They have gone over, or are on the way: nothing is open there."""
    suspects: Collection[NodeId]
    room: Callable[[int, ModelDemand], int]
    """Lots that fit into a budget in bytes."""

    @staticmethod
    def of(
        old: ModelDemand,
        new: ModelDemand,
        records: Iterable[Record],
        suspects: Collection[NodeId],
        room: Callable[[int, ModelDemand], int],
    ) -> "Swarm":
        staying: dict[NodeId, Record] = {}
        ready, elsewhere, gone, fetching = set(), [], [], False
        for record in records:
            versions = record.versions
            named = versions.name == new.name
            told = named and versions.next == release_of(new)
            if record.model == new.model or (
                record.model is None and told and versions.progress is Progress.READY
            ):
                gone.append(record)
                continue
            if record.model == old.model:
                staying[record.origin] = record
                if told and versions.progress is Progress.READY:
                    ready.add(record.origin)
            elif told and versions.progress is Progress.READY:
                elsewhere.append(record)
            if named and record.model is not None:
                fetching |= not told or versions.progress is Progress.FETCHING
        return Swarm(old, new, staying, ready, fetching, elsewhere, gone, suspects, room)

    def turn(self, me: NodeId) -> Turn:
        """What `me`, which has the old version open, is to do now."""
        if not self.ready:
            return Turn.STAY
        served = self._served(self.old, self.staying.values())
        if self.fetching and len(served) == _lots(self.old):
            return Turn.STAY
        lots = _lots(self.new)
        room = sum(map(self._room, self.gone))
        going = [*(self.staying[node] for node in self.ready), *self.elsewhere]
        if room + sum(map(self._room, going)) < lots:
            return Turn.STAY
        if len(self._served(self.new, self.gone)) == lots:
            return Turn.ALL
        first = self.first(lots - room)
        if first is None:
            return Turn.ALL
        return Turn.FIRST if me in first else Turn.STAY

    def first(self, lots: int) -> set[NodeId] | None:
        """Who may go while the rest serves every lot of the old version, with room for `lots`; None
        if that many cannot. Who has said that it goes comes first, then who has more room."""
        served = self._served(self.old, self.staying.values())
        if len(served) < _lots(self.old):
            return None
        chosen: set[NodeId] = set()
        ranked = sorted(
            (self.staying[node] for node in self.ready),
            key=lambda r: (r.versions.phase is Phase.SERVING, -self._room(r), r.origin),
        )
        for record in ranked:
            if lots <= 0:
                break
            mine = () if record.origin in self.suspects else _held(self.old, record)
            if all(served[lot] > 1 for lot in mine):
                served.subtract(mine)
                chosen.add(record.origin)
                lots -= self._room(record)
        return chosen if lots <= 0 else None

    def drained(self, me: NodeId) -> bool:
        """Has nobody else a request of the old version under way?"""
        return all(
            record.versions.phase is Phase.DRAINED
            for node, record in self.staying.items()
            if node != me
        )

    @property
    def misses_lots(self) -> bool:
        """Has somebody answers to end with the old version, and not every lot of it is served?"""
        ended = all(r.versions.phase is Phase.DRAINED for r in self.staying.values())
        return not ended and len(self._served(self.old, self.staying.values())) < _lots(self.old)

    def _room(self, record: Record) -> int:
        return self.room(record.memory_budget_bytes, self.new)

    def _served(self, demand: ModelDemand, records: Iterable[Record]) -> Counter[Lot]:
        """How often each lot is served beyond suspicion."""
        served: Counter[Lot] = Counter()
        for record in records:
            if record.model == demand.model and record.origin not in self.suspects:
                served.update(_held(demand, record))
        return served


def _lots(demand: ModelDemand) -> int:
    return demand.layers * demand.experts


def _held(demand: ModelDemand, record: Record) -> list[Lot]:
    """Lots of the model that the device serves: what exists of what it says."""
    return [
        lot for lot in record.serving if lot.layer < demand.layers and lot.expert < demand.experts
    ]


class Rollout:
    """This device on its way from one version to the next. `versions` is what it says of that."""

    def __init__(self, drain_s: float, settle_s: float) -> None:
        self.versions = NO_VERSIONS
        self.due = float("inf")
        """When `step` should be called although nothing has happened."""
        self.turn = Turn.STAY
        self._drain_s, self._settle_s = drain_s, settle_s
        self._open: ModelDemand | None = None
        self._next: ModelDemand | None = None
        self._since = 0.0
        """When it stopped to admit requests."""
        self._leave_at: float | None = None
        """Nothing is served here any more; it opens the new version then."""
        self._over = False
        """Its requests took too long and were ended."""
        self._seen: object = None

    def unchanged(self, seen: object, now: float) -> bool:
        """Would `step` find what it found before? `seen` stands for all that it is told."""
        if self._next is None and self._leave_at is None and self.due == float("inf"):
            return True  # there is nothing to go over to
        key = seen, self._next, self._open, self.versions
        if key == self._seen and now < self.due:
            return True
        self._seen = key
        return False

    @property
    def serving(self) -> bool:
        """Whether lots may still move: not once requests are no longer admitted."""
        return self.versions.phase is Phase.SERVING

    @property
    def leaving(self) -> bool:
        return self._leave_at is not None

    def opened(self, demand: ModelDemand | None) -> list[Effect]:
        """The engine has this model open, and nothing in memory but its trunk."""
        was_serving, before = self.serving, self.versions
        self.turn, self._leave_at, self._open = Turn.STAY, None, demand
        self.versions = Versions(demand.name, demand.version) if demand else NO_VERSIONS
        if self._next is not None and self._newer(self._next):
            self.versions = before._replace(version=self.versions.version, phase=Phase.SERVING)
        else:
            self._next = None
        return [] if was_serving else [Admit("")]

    def found(self, new: ModelDemand, progress: Progress) -> None:
        """A newer version of the open model is coming to this device's disk."""
        if not self.leaving and self._newer(new):
            self._next = new
            self.versions = self.versions._replace(next=release_of(new), progress=progress)

    def _newer(self, new: ModelDemand) -> bool:
        old = self._open
        return old is not None and old.name == new.name and release_of(new) > release_of(old)

    def drained(self) -> None:
        """None of this device's own requests is under way."""
        if self.versions.phase is Phase.DRAINING:
            self.versions = self.versions._replace(phase=Phase.DRAINED)

    def step(
        self,
        records: Iterable[Record],
        suspects: Collection[NodeId],
        room: Callable[[int, ModelDemand], int],
        me: NodeId,
        idle: bool,
        rests: bool,
        now: float,
    ) -> list[Effect]:
        """What to do now; `idle`: nothing is loaded or dropped here; `rests`: and no claim has
        changed for a while. While it is `leaving`, the caller tells that it serves nothing, but
        not that its engine has gone: until OpenModel it may come back."""
        self.due = float("inf")
        old, new = self._open, self._next
        if old is None or new is None:
            return []
        swarm = Swarm.of(old, new, records, suspects, room)
        if self._leave_at is not None:
            lingers = self.turn is Turn.FIRST and self._leave_at < float("inf")
            come_back = lingers and swarm.misses_lots
            return self._come_back(new, now) if come_back else self._leave(now)
        if me not in swarm.staying:
            return []
        if rests:
            self.turn = swarm.turn(me)
        out = self._follow(new, now)
        if idle and self._may_leave(swarm, me, rests, now):
            lingers = self.turn is Turn.FIRST  # else nobody calls any more
            self._leave_at = self.due = now + (LINGER_S if lingers else 0)
            out.append(Report(f"going over to version {new.version} of {new.name}"))
        return out

    def _follow(self, new: ModelDemand, now: float) -> list[Effect]:
        """Admit requests, or no longer, as the turn says."""
        phase = self.versions.phase
        if self.turn is Turn.STAY:
            if phase is Phase.SERVING:
                return []
            self.versions = self.versions._replace(phase=Phase.SERVING)
            return [Admit("")]
        why = f"Version {new.version} of {new.name} is being rolled out: this device"
        if phase is Phase.SERVING:
            self._since, self._over = now, False
            self.versions = self.versions._replace(phase=Phase.DRAINING)
            self.due = now + min(self._settle_s, self._drain_s)
            return [Admit(f"{why} admits no requests until it has it. Ask again in a few seconds.")]
        ends = self._since + self._drain_s
        if phase is Phase.DRAINING and now >= ends and not self._over:
            self._over = True
            return [EndRequests(f"{why} waited {self._drain_s:g} s for this answer. Ask again.")]
        times = (self._since + self._settle_s, ends)
        self.due = min((at for at in times if at > now), default=float("inf"))
        return []

    def _may_leave(self, swarm: Swarm, me: NodeId, rests: bool, now: float) -> bool:
        """Own requests are over, and nobody else needs what is served here."""
        said_s = now - self._since
        if self.versions.phase is not Phase.DRAINED or said_s < self._settle_s:
            return False
        if me not in swarm.ready:
            return False
        if self.turn is Turn.FIRST:
            return rests
        return swarm.drained(me) or said_s >= self._drain_s

    def _come_back(self, new: ModelDemand, now: float) -> list[Effect]:
        """Whoever was to answer on has failed while this device's lots are still in memory."""
        self.turn, self._leave_at = Turn.STAY, None
        text = f"not going over to version {new.version} of {new.name} yet: others need lots here"
        return [*self._follow(new, now), Report(text)]

    def _leave(self, now: float) -> list[Effect]:
        assert self._next is not None
        assert self._leave_at is not None
        if now < self._leave_at:
            self.due = self._leave_at
            return []
        self._leave_at = float("inf")  # until it is open
        return [OpenModel(self._next.name, self._next.model)]
