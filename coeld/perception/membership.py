"""Who is in the swarm and how they are: alive, suspect, dead, left. Pure.

SWIM's states (Das, Gupta, Motivala: "SWIM", 2002) in one total order, so that news merges by "keep
the larger" whatever its order of arrival: first incarnation, then the heartbeat counter, then how
bad it is. Every verdict thus carries the date of its evidence, a heartbeat, and yields to a later
sign of life: a suspect, or somebody wrongly declared dead, refutes with a mere heartbeat, and
whoever heard a later one says so for it. Only a few neighbours watch a device; all others believe
what is told, and let a suspicion run out by themselves in case the accuser dies too.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from coeld.ids import NodeId
from coeld.messages import Entry, Status
from coeld.node_config import NodeConfig
from coeld.perception.suspicion import CONFIRMATIONS, LocalHealth, suspicion_s

MEMBERS_MAX = 2048


@dataclass(slots=True)
class Member:
    """What is known of another device. Times are this device's clock, in seconds."""

    node: NodeId
    incarnation: int
    heartbeat: int
    status: Status
    heard_at: float
    """When its heartbeat counter last grew, or this device last looked."""
    changed_at: float
    """When it became what it is."""
    watched: bool = False
    """Is it a neighbour, whose silence this device must notice?"""
    accusers: set[NodeId] = field(default_factory=set)
    """Who suspects it by its own observation: at most CONFIRMATIONS + 1."""

    @property
    def present(self) -> bool:
        """A suspect is present: it keeps its lots until it is dead."""
        return self.status <= Status.SUSPECT


def precedence(incarnation: int, heartbeat: int, status: Status) -> tuple[int, int, Status]:
    """The total order of news about one device; the larger wins."""
    return incarnation, heartbeat, status


class Membership:
    """All other devices. `on_change(member, before)` is told of every change of state."""

    def __init__(
        self, me: NodeId, config: NodeConfig, on_change: Callable[[Member, Status | None], None]
    ) -> None:
        self.members: dict[NodeId, Member] = {}
        self.present_count = 0
        self.ignored_full = 0
        """News of unknown devices that did not fit into the table."""
        self.verdicts: list[NodeId] = []
        """Whom this device itself came to suspect or hold for dead, until somebody takes note."""
        self.due = float("inf")
        """When `tick` next has something to do; never later than that."""
        self.health = LocalHealth(config.heartbeat_ms / 1000)
        self._me = me
        self._silence_s = config.silence_ms / 1000
        self._suspicion_s = config.suspicion_ms / 1000
        self._forget_s = config.forget_ms / 1000
        self._on_change = on_change
        self._listening = True
        self._timed: dict[NodeId, Member] = {}
        """Those whose state will change by itself."""

    def present(self) -> Iterator[Member]:
        return (member for member in self.members.values() if member.present)

    def suspects(self) -> set[NodeId]:
        return {node for node, member in self._timed.items() if member.status == Status.SUSPECT}

    def gone(self) -> list[Member]:
        """The dead and those who left, who may come back where nobody here hears of it."""
        return [member for member in self._timed.values() if member.status >= Status.DEAD]

    # ---- news ------------------------------------------------------------------------------

    def apply(self, news: Entry, now: float) -> bool:
        """Merge what somebody knows of another device; True if others should hear of it too."""
        member = self.members.get(news.node)
        if member is None:
            return self._meet(news, now)
        ours, theirs = (
            (member.incarnation, member.heartbeat),
            (news.incarnation, news.heartbeat),
        )
        if theirs < ours or (theirs == ours and news.status < member.status):
            return False
        if theirs > ours:
            member.heard_at = now
            member.incarnation, member.heartbeat = theirs
        changed = self._become(member, news.status, now, theirs[0] > ours[0])
        return self._accuse(member, news.accuser) or changed

    def suspect(self, node: NodeId, now: float) -> None:
        """Something local speaks against it: a broken link, a failed call, silence."""
        member = self.members.get(node)
        if member is not None and member.present:
            changed = self._become(member, Status.SUSPECT, now)
            if self._accuse(member, self._me) or changed:
                self.verdicts.append(node)

    def watch(self, node: NodeId, watched: bool, now: float) -> None:
        """From now on notice its silence, or no more."""
        member = self.members.get(node)
        if member is not None and member.watched != watched:
            member.watched = watched
            member.heard_at = now
            self._time(member)

    # ---- time ------------------------------------------------------------------------------

    def woke(self, late_s: float, now: float) -> None:
        """This device woke `late_s` after it asked to: it could not hear anyone meanwhile."""
        deaf_s = self.health.woke(late_s)
        if deaf_s:
            for member in self._timed.values():
                member.heard_at = min(now, member.heard_at + deaf_s)
                if member.status == Status.SUSPECT:
                    member.changed_at = min(now, member.changed_at + deaf_s)
        self.due = min(self.due, now)

    def listen(self, possible: bool, now: float) -> None:
        """Whether anybody can be heard at all: while not, nobody's silence is counted, suspicions
        wait, and the dead are remembered."""
        if possible and not self._listening:
            for member in self._timed.values():
                member.heard_at = now
                if member.status == Status.SUSPECT:
                    member.changed_at = now
        self._listening = possible
        self.due = now

    def tick(self, now: float) -> list[NodeId]:
        """Let time pass; returns the devices that are forgotten."""
        if now < self.due:
            return []
        forgotten = []
        self.due = float("inf")
        if not self._listening:
            return []
        for member in list(self._timed.values()):
            expires_at = self._expires_at(member)
            if expires_at <= now:
                if member.status >= Status.DEAD:
                    del self.members[member.node], self._timed[member.node]
                    forgotten.append(member.node)
                    continue
                if member.status == Status.SUSPECT and self._dead_at(member) <= now:
                    self._become(member, Status.DEAD, now)
                    if member.watched or self._me in member.accusers:
                        self.verdicts.append(member.node)
                else:
                    self.suspect(member.node, now)
                expires_at = self._expires_at(member)
            self.due = min(self.due, expires_at)
        return forgotten

    def _silent_at(self, member: Member) -> float:
        """When the silence of a neighbour becomes an accusation of our own, once."""
        if not member.watched or self._me in member.accusers:
            return float("inf")
        return member.heard_at + self._silence_s * self.health.patience

    def _dead_at(self, member: Member) -> float:
        confirmations = max(0, len(member.accusers) - 1)
        wait_s = suspicion_s(self._suspicion_s, confirmations, self.present_count + 1)
        return member.changed_at + wait_s * self.health.patience

    def _expires_at(self, member: Member) -> float:
        if member.status == Status.ALIVE:
            return self._silent_at(member)
        if member.status == Status.SUSPECT:
            return min(self._silent_at(member), self._dead_at(member))
        return member.changed_at + self._forget_s

    def _time(self, member: Member) -> None:
        """Note when it changes by itself, if it does."""
        expires_at = self._expires_at(member)
        if expires_at == float("inf"):
            self._timed.pop(member.node, None)
        else:
            self._timed[member.node] = member
            self.due = min(self.due, expires_at)

    # ---- changes ---------------------------------------------------------------------------

    def _meet(self, news: Entry, now: float) -> bool:
        if len(self.members) >= MEMBERS_MAX:
            self.ignored_full += 1
            return False
        member = Member(news.node, news.incarnation, news.heartbeat, news.status, now, now)
        self.members[news.node] = member
        self.present_count += member.present
        self._accuse(member, news.accuser)
        self._time(member)
        self._on_change(member, None)
        return True

    def _become(self, member: Member, status: Status, now: float, reborn: bool = False) -> bool:
        before = member.status
        if status == before and not reborn:
            return False
        self.present_count += (status <= Status.SUSPECT) - member.present
        member.status = status
        member.changed_at = now
        if status != Status.DEAD:
            member.accusers.clear()
        self._time(member)
        self._on_change(member, before)
        return True

    def _accuse(self, member: Member, accuser: NodeId | None) -> bool:
        """Count who suspects it independently; True while that still shortens the wait."""
        if accuser is None or member.status != Status.SUSPECT or accuser in member.accusers:
            return False
        enough = len(member.accusers) > CONFIRMATIONS
        if not enough or accuser == self._me:
            member.accusers.add(accuser)
            self._time(member)
        return not enough
