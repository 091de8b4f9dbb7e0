"""The perceiving stage as one: hears messages and signs of failure, tells what this device is.

It keeps the swarm's records and members and turns them into messages to send; it decides nothing
about lots. What a device sends at rest does not depend on the size of the swarm: a beat with one
fingerprint, to a bounded set of neighbours. Own news is published at once (together, once per
step), except what nobody waits for; news of others is passed on once, as versions, and whoever
lacks a record asks for it. Views that differ although nothing is under way are compared part by
part. Three versions count what changed: `market` (who bids what), `supply` (who serves what, at
which address) and `marks` (who announces which epoch).
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from random import Random
from typing import Any

from coeld.effects import Effect, Publish, Report, Send
from coeld.ids import NodeId
from coeld.messages import (
    ENTRIES_MAX,
    WANTED_MAX,
    Ask,
    Beat,
    Delta,
    Digest,
    Entry,
    Message,
    Record,
    Status,
)
from coeld.node_config import NodeConfig
from coeld.perception import gossip
from coeld.perception.admission import Admission
from coeld.perception.comparing import Comparing, differing
from coeld.perception.fingerprint import Fingerprints, part_of, parts_for
from coeld.perception.links import Address, Links
from coeld.perception.membership import Member, Membership
from coeld.perception.neighbours import Rings
from coeld.perception.oneself import Oneself, Reaction, first_record
from coeld.perception.rumours import Rumours

ASK_AGAIN_S = 0.25
"""Before asking a second device for the same record, or answering the same device again."""
LAZY_PER_S = 32
"""What nobody waits for, in records per second of the whole swarm."""


class Perception:
    """`me` is this device's own record; `held` are those of others."""

    def __init__(
        self, node: NodeId, incarnation: int, config: NodeConfig, rng: Random, now: float = 0.0
    ) -> None:
        self.me = first_record(node, incarnation, config)
        self.told = self.me
        """Our record as it was last published: later changes have no version yet."""
        self.held: dict[NodeId, Record] = {}
        self.membership = Membership(node, config, self._changed)
        self.suspects = self.membership.suspects
        self.rings = Rings(node, config.neighbours_max)
        self.links = Links(rng)
        self.market = self.supply = self.marks = 0
        self.counters = {"other_swarm": 0, "forged_sender": 0, "stale": 0}
        self.admission = Admission()
        grown_up_s = 2 * config.silence_ms / 1000
        self.oneself = Oneself(node, config.heartbeat_ms / 1000, grown_up_s)
        self._config = config
        self._embedded = config.mqtt_port is not None
        self._rng = rng
        self._beat_s = config.heartbeat_ms / 1000
        self._heartbeat = 0
        self._beat_at = self._spoke_at = self._published_at = now
        self._urgent = self._lazy = True
        self._accused_at = float("-inf")
        self._view = Fingerprints()
        self._view.note(node, incarnation, 1, Status.ALIVE)
        self._rumours = Rumours()
        self._objected: dict[NodeId, float] = {}
        """When we last contradicted old news of a device."""
        self._comparing = Comparing(self._beat_s)
        self._asks: dict[NodeId, dict[NodeId, None]] = {}
        self._asked: dict[NodeId, tuple[gossip.Version, float]] = {}
        self._there: dict[NodeId, Record] = {}  # of the others who are present
        self._present: tuple[Record, ...] = ()  # and ours; empty: to be gathered anew
        self._rewired = False
        """Did something change that the choice of neighbours depends on?"""
        self._outbox: list[Effect] = []

    # ---- what others may read ------------------------------------------------------------

    def record(self, member: Member) -> Record | None:
        """What a member says of itself in its present incarnation."""
        record = self.held.get(member.node)
        return record if record and record.incarnation == member.incarnation else None

    def present(self) -> tuple[Record, ...]:
        """Records of the devices that are there, this one first. The same tuple until one changes:
        what was worked out from it still holds."""
        if not self._present or self._present[0] is not self.me:
            self._present = (self.me, *self._there.values())
        return self._present

    @property
    def view(self) -> str:
        """Fingerprint of all that is known: equal on devices that know the same."""
        return self._view.whole

    @property
    def complete(self) -> bool:
        """Is the record of every present device known?"""
        return len(self.present()) == self.membership.present_count + 1

    @property
    def due(self) -> float:
        return min(self._beat_at, self.membership.due)

    @property
    def silent(self) -> bool:
        """Is there nothing that `flush` would say before `due`?"""
        return not (
            self._outbox
            or self._asks
            or self._urgent
            or (self._rewired and self._small)
            or self.membership.verdicts
        )

    # ---- in ------------------------------------------------------------------------------

    def hear(self, sender: NodeId, message: Message, now: float) -> None:
        """Merge a message; answers wait for `flush`."""
        if message.swarm != self._config.swarm:
            self.counters["other_swarm"] += 1
        elif sender != message.sender:
            self.counters["forged_sender"] += 1
        elif sender == self.me.origin:
            self.oneself.hear_myself(message, self.me, self._heartbeat, now)
        elif self.admission.admit(sender, now):
            self.links.heard[sender] = now
            match message:
                case Beat():
                    self._hear_beat(message, now)
                case Delta(records=records):
                    for record in records:
                        self._hear_record(record, now)
                case Digest():
                    self._hear_digest(message, now)
                case Ask():
                    self._answer(message, now)

    def lost(self, node: NodeId, now: float) -> None:
        """A link to or from `node` broke: a reason to suspect a neighbour, and nobody else."""
        member = self.membership.members.get(node)
        if member is not None and member.watched:
            self.membership.suspect(node, now)

    def tell(self, urgent: bool = True, **changes: Any) -> None:
        """Change this device's own record."""
        if all(getattr(self.me, name) == value for name, value in changes.items()):
            return
        before, self.me = self.me, replace(self.me, **changes)
        self._compare(before, self.me)
        self._urgent |= urgent
        self._lazy = True

    def tick(self, now: float) -> None:
        self.oneself.lives(now)
        for node in self.membership.tick(now):
            self._comparing.forget(node)
            for known in (self.held, self._asked, self._objected):
                known.pop(node, None)

    # ---- out -----------------------------------------------------------------------------

    def flush(self, now: float) -> list[Effect]:
        """Everything that has to be said now."""
        beat = now >= self._beat_at
        self._rewire(beat, now)
        for node in self.membership.verdicts:
            self._tell_of(node, True, now)
        self.membership.verdicts.clear()
        lazy_s = self.membership.present_count / LAZY_PER_S
        if self._urgent or (beat and self._lazy and now - self._published_at >= lazy_s):
            self.me = replace(self.me, seq=self.me.seq + 1)
            self._view.note(self.me.origin, *gossip.version(self.me), Status.ALIVE)
            self._urgent = self._lazy = False
            self._published_at = now
            self.told = self.me
            self._outbox.append(Publish(self._delta((self.me,))))
        for device, asked in self._asks.items():
            nodes = tuple(asked)
            for at in range(0, len(nodes), WANTED_MAX):
                self._send_ask(device, wanted=nodes[at : at + WANTED_MAX])
        self._asks.clear()
        if now >= self._beat_at:
            self._outbox.append(Publish(self._beat(now)))
        self._outbox += self.oneself.reports()
        out, self._outbox = self._outbox, []
        return out

    def leave(self) -> list[Effect]:
        """Say goodbye: nothing is held any more, do not wait for suspicion."""
        self.me = replace(self.me, seq=self.me.seq + 1, model=None, claims=(), serving=())
        self._heartbeat += 1
        farewell = self._entry_of_me(Status.LEFT)
        return [Publish(self._delta((self.me,))), Publish(self._say((farewell,)))]

    def _beat(self, now: float) -> Beat:
        """A sign of life, with the oldest news on board."""
        self._heartbeat += 1
        self._spoke_at = now
        self._beat_at = now + self._rng.uniform(0.9, 1.1) * self._beat_s
        members = self.membership.members
        entries = [self._entry(members[n]) for n in self._rumours.take() if n in members]
        self._beat_at = min(self._beat_at, now + self._rumours.pause_s)
        return self._say(tuple(entries))

    def _say(self, news: tuple[Entry, ...]) -> Beat:
        me = self.me
        head = self._config.swarm, me.origin, me.incarnation, me.seq, self._heartbeat
        return Beat(*head, self.view, news)

    def _delta(self, records: tuple[Record, ...]) -> Delta:
        return Delta(self._config.swarm, self.me.origin, self.me.incarnation, records)

    def _send_ask(
        self, to: NodeId, sums: tuple[int, ...] = (), wanted: tuple[NodeId, ...] = ()
    ) -> None:
        me = self.me
        ask = Ask(self._config.swarm, me.origin, me.incarnation, sums, wanted)
        self._outbox.append(Send(to, ask))

    def _entry(self, member: Member) -> Entry:
        record = self.record(member)
        return Entry(
            member.node,
            member.incarnation,
            record.seq if record else 0,
            member.heartbeat,
            member.status,
            self._accuser(member),
        )

    def _accuser(self, member: Member) -> NodeId | None:
        """Whom to name: ourselves if we are one, for that is news that only we can bring."""
        if member.status != Status.SUSPECT or not member.accusers:
            return None
        return self.me.origin if self.me.origin in member.accusers else min(member.accusers)

    def _entry_of_me(self, status: Status = Status.ALIVE) -> Entry:
        return Entry(self.me.origin, *gossip.version(self.me), self._heartbeat, status)

    def _rewire(self, beat: bool, now: float) -> None:
        """Choose neighbours; in a large swarm, where that costs time, mostly once per heartbeat."""
        if self._rewired and (beat or self._small):
            self._rewired = False
            members = self.membership.members
            before = self.links.neighbours
            chosen = self.rings.neighbours()
            for node in sorted(before - chosen):
                self.membership.watch(node, False, now)
            for node in sorted(chosen - before):
                self.membership.watch(node, True, now)
            addresses = self._addresses(members[node] for node in chosen)
            self._outbox += self.links.choose(chosen, addresses)
        if beat and self._embedded:
            gone = self._addresses(self.membership.gone())
            self._outbox += self.links.review(gone, now)

    @property
    def _small(self) -> bool:
        return self.membership.present_count <= 2 * self._config.neighbours_max

    def _addresses(self, members: Iterable[Member]) -> dict[NodeId, Address]:
        found = {}
        for member in members:
            record = self.held.get(member.node)
            if record and record.mqtt_port:
                found[member.node] = (record.incarnation, record.mqtt_host, record.mqtt_port)
        return found

    def _relay(self, node: NodeId, now: float) -> None:
        """Pass on what is new of a device, if there are some who do not hear everybody.

        That one has come is told once its record is here to be given.
        """
        member = self.membership.members.get(node)
        if not self._embedded or self.membership.present_count <= self._config.neighbours_max:
            return
        if member and (member.status > Status.ALIVE or self.record(member)):
            self._tell_of(node, member.status > Status.ALIVE, now)

    def _tell_of(self, node: NodeId, alarm: bool, now: float) -> None:
        """Have what is known of a device on board of a beat that comes early."""
        self._rumours.add(node, alarm)
        self._beat_at = min(self._beat_at, max(now, self._spoke_at + self._rumours.pause_s))

    # ---- hearing -------------------------------------------------------------------------

    def _hear_beat(self, beat: Beat, now: float) -> None:
        sender = beat.sender
        self._hear_entry(
            Entry(sender, beat.incarnation, beat.seq, beat.heartbeat, Status.ALIVE), sender, now
        )
        for entry in beat.news:
            if self._knows(entry):
                self._rumours.heard_again(entry.node)
            else:
                self._hear_entry(entry, sender, now)
        if beat.view == self._view.whole:
            self._comparing.agrees(sender)
        elif sender in self.membership.members and self._comparing.differs(sender, now):
            parts = parts_for(self.membership.present_count + 1)
            self._send_ask(sender, sums=self._view.parts(parts))

    def _knows(self, entry: Entry) -> bool:
        """Is it what most news are, heard before? A quick look that spares the long one."""
        held = self.held.get(entry.node)
        if held is None or entry.seq > held.seq or entry.incarnation != held.incarnation:
            return False
        member = self.membership.members[entry.node]
        return (
            entry.status == member.status == Status.ALIVE
            and entry.incarnation == member.incarnation
            and not member.watched
        )

    def _hear_entry(self, entry: Entry, sender: NodeId, now: float) -> None:
        node = entry.node
        if node == self.me.origin:
            self._hear_about_me(entry, now)
            return
        if self.membership.apply(entry, now):
            self._relay(node, now)
        else:
            self._object(entry, now)
        if entry.seq and entry.status <= Status.SUSPECT:
            held = self.held.get(node)
            if held is None or (entry.incarnation, entry.seq) > (held.incarnation, held.seq):
                self._want(entry, sender, now)

    def _object(self, entry: Entry, now: float) -> None:
        """Whoever knows better than old news says so, whomever it is about, once per heartbeat.

        That a device lives which somebody accuses on older evidence; that one is gone which
        somebody counts on; that one has begun a new life.
        """
        member = self.membership.members.get(entry.node)
        if member is None:
            return
        later = (member.incarnation, member.heartbeat) > (entry.incarnation, entry.heartbeat)
        if (
            (entry.status > member.status and later)
            or (entry.status <= Status.SUSPECT and not member.present)
            or entry.incarnation < member.incarnation
        ) and now - self._objected.get(entry.node, float("-inf")) >= self._beat_s:
            self._objected[entry.node] = now
            self._tell_of(entry.node, True, now)

    def _want(self, entry: Entry, sender: NodeId, now: float) -> None:
        """Ask for a record that is newer there, unless somebody has just been asked for it."""
        member = self.membership.members.get(entry.node)
        if member is None or entry.incarnation < member.incarnation:
            return
        version = (entry.incarnation, entry.seq)
        asked, at = self._asked.get(entry.node, (gossip.NOTHING, float("-inf")))
        if asked < version or now - at > ASK_AGAIN_S:
            self._asked[entry.node] = (version, now)
            self._asks.setdefault(sender, {})[entry.node] = None

    def _hear_record(self, record: Record, now: float) -> None:
        origin = record.origin
        if origin == self.me.origin:
            version = gossip.version(record)
            self._hear_about_me(Entry(origin, *version, 0, Status.ALIVE), now)
            if version == gossip.version(self.told) and record != self.told:
                self.oneself.twin(now)
            return
        self.membership.apply(Entry(origin, record.incarnation, record.seq, 0, Status.ALIVE), now)
        member = self.membership.members.get(origin)
        held = self.held.get(origin)
        if member is None or not gossip.newer(record, held):
            self.counters["stale"] += 1
            return
        self.held[origin] = record
        self._asked.pop(origin, None)
        self._note(member)
        self._compare(held, record)
        self._relay(origin, now)

    # ---- comparing views -----------------------------------------------------------------

    def _answer(self, ask: Ask, now: float) -> None:
        """Give an asking device the records it wants, and name what differs."""
        sender = ask.sender
        wanted = [self._own_or_held(node) for node in ask.wanted]
        for records in gossip.parcels(record for record in wanted if record is not None):
            self._outbox.append(Send(sender, self._delta(records)))
        known = sender in self.membership.members
        if ask.sums and known and self._comparing.answers(sender, now):
            parts, where = differing(self._view, ask.sums, self.membership.present_count + 1)
            for section, entries in gossip.sections(self._entries(parts, where), parts, where):
                self._send_digest(sender, entries, parts, section)

    def _hear_digest(self, digest: Digest, now: float) -> None:
        """Take what is newer there; answer with what is newer here."""
        for entry in digest.entries:
            self._hear_entry(entry, digest.sender, now)
        if not digest.parts:
            return
        shown = {entry.node: entry for entry in digest.entries}
        mine = self._entries(digest.parts, digest.differing)
        better = [entry for entry in mine if gossip.improves(entry, shown.get(entry.node))]
        for at in range(0, len(better), ENTRIES_MAX):
            self._send_digest(digest.sender, better[at : at + ENTRIES_MAX], 0, [])

    def _entries(self, parts: int, differing: Iterable[int]) -> Iterator[Entry]:
        wanted = set(differing)
        if part_of(self.me.origin, parts) in wanted:
            yield self._entry_of_me()
        for member in self.membership.present():
            if part_of(member.node, parts) in wanted:
                yield self._entry(member)

    def _send_digest(
        self, to: NodeId, entries: list[Entry], parts: int, differing: list[int]
    ) -> None:
        head = self._config.swarm, self.me.origin, self.me.incarnation
        self._outbox.append(Send(to, Digest(*head, tuple(entries), parts, tuple(differing))))

    def _own_or_held(self, node: NodeId) -> Record | None:
        if node == self.me.origin:
            return self.told
        member = self.membership.members.get(node)
        return self.record(member) if member else None

    # ---- news of oneself -----------------------------------------------------------------

    def _hear_about_me(self, entry: Entry, now: float) -> None:
        match self.oneself.hear(entry, self.me, self._heartbeat, now):
            case Reaction.OBJECT:
                self._beat_at = min(self._beat_at, max(now, self._spoke_at + self._beat_s / 4))
                if now - self._accused_at >= self._beat_s:
                    self._accused_at = now
                    self.membership.health.accused()
            case Reaction.RISE:
                self.tell(incarnation=entry.incarnation + 1)
                self._beat_at = now

    # ---- what changed --------------------------------------------------------------------

    def _note(self, member: Member) -> None:
        record = self.record(member)
        self._there.pop(member.node, None)
        if record and member.present:
            self._there[member.node] = record
        self._present = ()
        seq = record.seq if record else 0
        self._view.note(member.node, member.incarnation, seq, member.status)

    def _compare(self, before: Record | None, after: Record) -> None:
        if before is None or gossip.market(before) != gossip.market(after):
            self.market += 1
        if before is None or gossip.supply(before) != gossip.supply(after):
            self.supply += 1
            self._rewired = True
        if before is None or gossip.marks(before) != gossip.marks(after):
            self.marks += 1

    def _changed(self, member: Member, before: Status | None) -> None:
        self.supply += 1
        self._note(member)
        was_present = before is not None and before <= Status.SUSPECT
        if was_present == member.present and before is not None:
            if member.status == Status.ALIVE and before == Status.ALIVE:
                self.market += 1  # a new life: what the old one claimed is void
            return
        self.market += 1
        self._rewired = True
        self.rings.put(member.node, member.present)
        if not member.present:
            self._comparing.forget(member.node)
        record = self.held.get(member.node)
        who = f"{record.name} ({member.node})" if record and record.name else str(member.node)
        if member.present:
            self._outbox.append(Report(f"{who} {'joined' if before is None else 'is back'}"))
        elif before is not None:
            how = "left" if member.status == Status.LEFT else "is dead: its lots go to others"
            self._outbox.append(Report(f"{who} {how}"))
