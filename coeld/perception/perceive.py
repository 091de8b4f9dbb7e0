"""The perceiving stage as one: hears messages and signs of failure, tells what this device is.

It keeps the swarm's records and members and turns them into messages to send; it decides nothing
about lots. Own news is published at once (together, once per step), except marks of the route
table, which wait for the next heartbeat because nobody waits for them. Three versions count what
changed: `market` (who bids what), `supply` (who serves what, at which address) and `marks` (who
announces which epoch).
"""

from collections.abc import Iterator
from dataclasses import replace
from random import Random
from typing import Any

from coeld.effects import Connect, Effect, Publish, Report, Send
from coeld.ids import NodeId
from coeld.messages import COUNTER_MAX, Delta, Digest, DigestEntry, Message, Record, Status
from coeld.node_config import NodeConfig
from coeld.perception import gossip, neighbours
from coeld.perception.membership import Member, Membership

ASK_AGAIN_S = 0.25
"""Before asking a second device for the same record, or answering the same device again."""
REPORT_TWIN_S = 60.0


class Perception:
    """`me` is this device's own record; `held` are those of others."""

    def __init__(
        self, node: NodeId, incarnation: int, config: NodeConfig, rng: Random, now: float = 0.0
    ) -> None:
        self.me = Record(node, incarnation, 1, config.name, config.mqtt_host, config.mqtt_port or 0)
        self.held: dict[NodeId, Record] = {}
        self.membership = Membership(config, self._changed)
        self.market = 0
        self.supply = 0
        self.marks = 0
        self.counters = {"other_swarm": 0, "forged_sender": 0, "twin": 0, "stale": 0}
        self._config = config
        self._rng = rng
        self._heartbeat = 0
        self._beat_at = now
        self._last_beat_at = self._published_at = now
        self._urgent = self._lazy = True
        self._raised_at = self._twin_at = float("-inf")
        self._started_at: float | None = None
        self._asked: dict[NodeId, tuple[gossip.Version, float]] = {}
        self._answered: dict[NodeId, float] = {}
        self._listening: dict[NodeId, tuple[int, str, int]] = {}
        self._listened = (-1, -1)
        self._outbox: list[Effect] = []

    # ---- what others may read ------------------------------------------------------------

    def record(self, member: Member) -> Record | None:
        """What a member says of itself in its present incarnation."""
        record = self.held.get(member.node)
        return record if record and record.incarnation == member.incarnation else None

    def present(self) -> Iterator[Record]:
        """Records of the devices that are there, this one included."""
        yield self.me
        for member in self.membership.present():
            record = self.record(member)
            if record is not None:
                yield record

    def suspects(self) -> set[NodeId]:
        members = self.membership.present()
        return {member.node for member in members if member.status == Status.SUSPECT}

    @property
    def complete(self) -> bool:
        """Is the record of every present device known?"""
        return all(self.record(member) is not None for member in self.membership.present())

    @property
    def due(self) -> float:
        return min(self._beat_at, self.membership.due)

    # ---- in ------------------------------------------------------------------------------

    def hear(self, sender: NodeId, message: Message, now: float) -> None:
        """Merge a message; answers wait for `flush`."""
        if message.swarm != self._config.swarm:
            self.counters["other_swarm"] += 1
        elif sender != message.sender:
            self.counters["forged_sender"] += 1
        elif sender == self.me.origin:
            self._hear_myself(message, now)
        elif isinstance(message, Digest):
            self._hear_digest(message, now)
        else:
            for record in message.records:
                self._hear_record(record, now)

    def tell(self, urgent: bool = True, **changes: Any) -> None:
        """Change this device's own record."""
        fresh = replace(self.me, **changes)
        if fresh == self.me:
            return
        self._compare(self.me, fresh)
        self.me = fresh
        self._urgent |= urgent
        self._lazy = True

    def tick(self, now: float) -> None:
        if self._started_at is None:
            self._started_at = now
        for node in self.membership.tick(now):
            self.held.pop(node, None)
            self._asked.pop(node, None)
            self._answered.pop(node, None)

    # ---- out -----------------------------------------------------------------------------

    def flush(self, now: float) -> list[Effect]:
        """Everything that has to be said now."""
        beat = now >= self._beat_at
        self._listen()
        if self._urgent or (beat and self._lazy):
            self.me = replace(self.me, seq=self.me.seq + 1)
            self._urgent = self._lazy = False
            self._published_at = now
            self._outbox.append(Publish(self._delta((self.me,))))
        if beat:
            self._heartbeat += 1
            self._last_beat_at = now
            jitter = self._rng.uniform(0.9, 1.1)
            self._beat_at = now + jitter * self._config.heartbeat_ms / 1000
            self._outbox.append(Publish(self._digest()))
        out, self._outbox = self._outbox, []
        return out

    def leave(self) -> list[Effect]:
        """Say goodbye: nothing is held any more, do not wait for suspicion."""
        self.me = replace(self.me, seq=self.me.seq + 1, model=None, claims=(), serving=())
        self._heartbeat += 1
        return [Publish(self._delta((self.me,))), Publish(self._digest(Status.LEFT))]

    def _digest(self, status: Status = Status.ALIVE, ask: bool = False) -> Digest:
        mine = DigestEntry(
            self.me.origin, self.me.incarnation, self.me.seq, self._heartbeat, status
        )
        others = []
        for member in self.membership.members.values():
            record = self.record(member)
            seq = record.seq if record else 0
            others.append(
                DigestEntry(member.node, member.incarnation, seq, member.heartbeat, member.status)
            )
        sender = self.me.origin, self.me.incarnation
        return Digest(self._config.swarm, *sender, (mine, *others), ask)

    def _delta(self, records: tuple[Record, ...]) -> Delta:
        return Delta(self._config.swarm, self.me.origin, self.me.incarnation, records)

    def _listen(self) -> None:
        """Ask for links to the brokers of chosen neighbours, once per life and address."""
        if self._listened == (self.market, self.supply):
            return
        self._listened = (self.market, self.supply)
        offers = {}
        for member in self.membership.members.values():
            record = self.record(member) if member.status == Status.ALIVE else None
            if record and record.mqtt_port:
                offers[member.node] = (record.incarnation, record.mqtt_host, record.mqtt_port)
            elif not member.present:
                self._listening.pop(member.node, None)
        chosen = neighbours.choose(
            self.me.origin,
            offers,
            set(self._listening),
            self._config.neighbours_max,
            self._rng,
        )
        for node in sorted(chosen):
            if self._listening.get(node) != offers[node]:
                self._listening[node] = offers[node]
                self._outbox.append(Connect(node, offers[node][1], offers[node][2]))

    # ---- hearing -------------------------------------------------------------------------

    def _hear_digest(self, digest: Digest, now: float) -> None:
        for entry in digest.entries:
            if entry.node == self.me.origin:
                self._hear_about_me(entry, now)
            else:
                self.membership.apply(entry, now)
        if digest.sender not in self.membership.members:
            return
        if digest.ask:
            self._answer(digest, now)
        else:
            self._introduce(digest, now)
            self._ask(digest, now)

    def _hear_record(self, record: Record, now: float) -> None:
        if record.origin == self.me.origin:
            version = gossip.version(record)
            self._hear_about_me(DigestEntry(record.origin, *version, 0, Status.ALIVE), now)
            if version == gossip.version(self.me) and not self._lazy and record != self.me:
                self._twin(now)
            return
        alive = DigestEntry(record.origin, record.incarnation, record.seq, 0, Status.ALIVE)
        self.membership.apply(alive, now)
        held = self.held.get(record.origin)
        if record.origin not in self.membership.members or not gossip.newer(record, held):
            self.counters["stale"] += 1
            return
        self.held[record.origin] = record
        self._compare(held, record)

    def _answer(self, digest: Digest, now: float) -> None:
        """Give an asking device what is newer here."""
        if now - self._answered.get(digest.sender, float("-inf")) < ASK_AGAIN_S / 2:
            return
        self._answered[digest.sender] = now
        known = {record.origin: record for record in self.present()}
        known.pop(digest.sender, None)
        for records in gossip.parcels(gossip.ahead(digest.entries, known)):
            self._outbox.append(Send(digest.sender, self._delta(records)))

    def _introduce(self, digest: Digest, now: float) -> None:
        """Somebody audible who does not hear us: tell of ourselves, with the broker's address."""
        shown = next((e for e in digest.entries if e.node == self.me.origin), None)
        version = (shown.incarnation, shown.seq) if shown else gossip.NOTHING
        settled = now - self._published_at > ASK_AGAIN_S or version[0] != self.me.incarnation
        recently = now - self._answered.get(digest.sender, float("-inf")) < ASK_AGAIN_S
        if version < gossip.version(self.me) and settled and not recently:
            self._answered[digest.sender] = now
            self._outbox.append(Send(digest.sender, self._delta((self.me,))))

    def _ask(self, digest: Digest, now: float) -> None:
        """Ask for what is newer there, unless somebody has just been asked for it."""
        wanted = False
        for origin, version in gossip.behind(digest.entries, self.held, self.me.origin).items():
            member = self.membership.members.get(origin)
            asked, at = self._asked.get(origin, (gossip.NOTHING, float("-inf")))
            if member is None or not member.present:
                continue
            if asked < version or now - at > ASK_AGAIN_S:
                self._asked[origin] = (version, now)
                wanted = True
        if wanted:
            self._outbox.append(Send(digest.sender, self._digest(ask=True)))

    # ---- news of oneself -----------------------------------------------------------------

    def _hear_about_me(self, entry: DigestEntry, now: float) -> None:
        """Refute: a suspicion with an early heartbeat, a death with a higher incarnation.

        News that this life did not write (of an earlier life, or of a twin) also raises the
        incarnation above it. Both at bounded rates, so that neither failing calls nor two devices
        with one identity can drive anyone wild.
        """
        beat_s = self._config.heartbeat_ms / 1000
        if entry.incarnation < self.me.incarnation or entry.incarnation >= COUNTER_MAX:
            return
        foreign = (
            entry.incarnation > self.me.incarnation
            or entry.heartbeat > self._heartbeat
            or entry.seq > self.me.seq
        )
        if not foreign and entry.status < Status.DEAD:
            if entry.status == Status.SUSPECT and entry.heartbeat == self._heartbeat:
                self._beat_at = min(self._beat_at, max(now, self._last_beat_at + beat_s / 4))
            return
        if foreign and entry.status < Status.DEAD and self._grown_up(now):
            self._twin(now)
        if now - self._raised_at >= beat_s:
            self._raised_at = now
            self.tell(incarnation=entry.incarnation + 1)
            self._beat_at = now

    def _grown_up(self, now: float) -> bool:
        """Old enough that nobody tells of an earlier life any more."""
        started_at = now if self._started_at is None else self._started_at
        return now - started_at > 2 * self._config.silence_ms / 1000

    def _hear_myself(self, message: Message, now: float) -> None:
        """A message with our own name on it: an echo, or a twin."""
        if message.incarnation > self.me.incarnation:
            self._twin(now)
        elif message.incarnation == self.me.incarnation and isinstance(message, Digest):
            mine = [entry for entry in message.entries if entry.node == self.me.origin]
            if any(entry.heartbeat > self._heartbeat for entry in mine):
                self._twin(now)

    def _twin(self, now: float) -> None:
        self.counters["twin"] += 1
        if now - self._twin_at >= REPORT_TWIN_S:
            self._twin_at = now
            self._outbox.append(
                Report(
                    f"another device uses the identity {self.me.origin} of this one: both will"
                    " misbehave; delete the state directory of the copy and restart it"
                )
            )

    # ---- what changed --------------------------------------------------------------------

    def _compare(self, before: Record | None, after: Record) -> None:
        if before is None or _market(before) != _market(after):
            self.market += 1
        if before is None or _supply(before) != _supply(after):
            self.supply += 1
        if before is None or _mark(before) != _mark(after):
            self.marks += 1

    def _changed(self, member: Member, before: Status | None) -> None:
        self.supply += 1
        was_present = before is not None and before <= Status.SUSPECT
        if was_present == member.present and before is not None:
            if member.status == Status.ALIVE and before == Status.ALIVE:
                self.market += 1  # a new life: what the old one claimed is void
            return
        self.market += 1
        record = self.held.get(member.node)
        who = f"{record.name} ({member.node})" if record and record.name else str(member.node)
        if member.present:
            self._outbox.append(Report(f"{who} {'joined' if before is None else 'is back'}"))
        elif before is not None:
            how = "left" if member.status == Status.LEFT else "is dead: its lots go to others"
            self._outbox.append(Report(f"{who} {how}"))


def _market(record: Record) -> tuple[object, ...]:
    return record.incarnation, record.model, record.claims, record.memory_budget_bytes


def _supply(record: Record) -> tuple[object, ...]:
    return (
        record.incarnation,
        record.model,
        record.serving,
        record.data_host,
        record.data_port,
        record.mqtt_host,
        record.mqtt_port,
    )


def _mark(record: Record) -> tuple[object, ...]:
    return record.epoch, record.fingerprint
