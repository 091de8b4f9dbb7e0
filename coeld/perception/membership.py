"""Who is in the swarm and how they are: alive, suspect, dead, left. Pure.

SWIM's states (Das, Gupta, Motivala: "SWIM", 2002) as one total order, so that news merges by
"keep the larger" whatever its order of arrival: first incarnation, then dead or left, then the
heartbeat counter, then suspicion. Counters travel in digests, so a device is known to live
through anyone who hears it. It follows that a suspect refutes with a mere heartbeat (a suspicion
tells the counter it was based on), which keeps its records valid; only a device that was declared
dead must raise its incarnation.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from coeld.ids import NodeId
from coeld.messages import DigestEntry, Status
from coeld.node_config import NodeConfig
from coeld.perception.suspicion import LocalHealth

MEMBERS_MAX = 1024


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

    @property
    def present(self) -> bool:
        """A suspect is present: it keeps its lots until it is dead."""
        return self.status <= Status.SUSPECT


def precedence(incarnation: int, heartbeat: int, status: Status) -> tuple[int, int, int, bool]:
    """The total order of news about one device; the larger wins."""
    final = int(status) if status >= Status.DEAD else 0
    return incarnation, final, heartbeat, status == Status.SUSPECT


class Membership:
    """All other devices. `on_change(member, before)` is told of every change of state."""

    def __init__(
        self, config: NodeConfig, on_change: Callable[[Member, Status | None], None]
    ) -> None:
        self.members: dict[NodeId, Member] = {}
        self.ignored_full = 0
        """News of unknown devices that did not fit into the table."""
        self.due = float("inf")
        """When `tick` next has something to do; never later than that."""
        self._health = LocalHealth(config.heartbeat_ms / 1000)
        self._silence_s = config.silence_ms / 1000
        self._suspicion_s = config.suspicion_ms / 1000
        self._forget_s = config.forget_ms / 1000
        self._on_change = on_change

    def present(self) -> Iterator[Member]:
        return (member for member in self.members.values() if member.present)

    def apply(self, news: DigestEntry, now: float) -> None:
        """Merge what somebody knows of another device."""
        member = self.members.get(news.node)
        if member is None:
            self._meet(news, now)
            return
        held = precedence(member.incarnation, member.heartbeat, member.status)
        if precedence(news.incarnation, news.heartbeat, news.status) <= held:
            return
        if (news.incarnation, news.heartbeat) > (member.incarnation, member.heartbeat):
            member.heard_at = now
        reborn = news.incarnation > member.incarnation
        member.incarnation, member.heartbeat = news.incarnation, news.heartbeat
        self._become(member, news.status, now, reborn)

    def suspect(self, node: NodeId, now: float) -> None:
        """Something local speaks against it: a broken link, a failed call, silence."""
        member = self.members.get(node)
        if member is not None and member.status == Status.ALIVE:
            self._become(member, Status.SUSPECT, now)

    def woke(self, late_s: float, now: float) -> None:
        """This device woke `late_s` after it asked to: it could not hear anyone meanwhile."""
        deaf_s = self._health.woke(late_s)
        if deaf_s:
            for member in self.members.values():
                member.heard_at = min(now, member.heard_at + deaf_s)
                if member.status == Status.SUSPECT:
                    member.changed_at = min(now, member.changed_at + deaf_s)
        self.due = now

    def tick(self, now: float) -> list[NodeId]:
        """Let time pass; returns the devices that are forgotten."""
        if now < self.due:
            return []
        forgotten = []
        self.due = float("inf")
        for member in list(self.members.values()):
            expires_at = self._expires_at(member)
            if expires_at <= now:
                if member.status >= Status.DEAD:
                    del self.members[member.node]
                    forgotten.append(member.node)
                    continue
                worse = Status.SUSPECT if member.status == Status.ALIVE else Status.DEAD
                self._become(member, worse, now)
                expires_at = self._expires_at(member)
            self.due = min(self.due, expires_at)
        return forgotten

    def _expires_at(self, member: Member) -> float:
        patience = self._health.patience
        if member.status == Status.ALIVE:
            return member.heard_at + self._silence_s * patience
        if member.status == Status.SUSPECT:
            return member.changed_at + self._suspicion_s * patience
        return member.changed_at + self._forget_s

    def _meet(self, news: DigestEntry, now: float) -> None:
        if len(self.members) >= MEMBERS_MAX:
            self.ignored_full += 1
            return
        member = Member(news.node, news.incarnation, news.heartbeat, news.status, now, now)
        self.members[news.node] = member
        self.due = min(self.due, self._expires_at(member))
        self._on_change(member, None)

    def _become(self, member: Member, status: Status, now: float, reborn: bool = False) -> None:
        before = member.status
        if status == before and not reborn:
            return
        member.status = status
        member.changed_at = now
        self.due = min(self.due, self._expires_at(member))
        self._on_change(member, before)
