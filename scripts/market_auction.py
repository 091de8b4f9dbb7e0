"""The auction among devices that only exchange records: for benchmarks and tests, without a node.

Every device deliberates, bids and hears as coeld.node does; records travel through the real codec,
in random order, late and repeated. Counts bytes, rounds and CPU seconds.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random

from coeld.deployment.auction import bundle, leaders
from coeld.deployment.placement import owners
from coeld.deployment.pricing import bids, claimable
from coeld.deployment.proposal import Deliberation, Facts
from coeld.deployment.replicas import replicas
from coeld.ids import Lot, NodeId
from coeld.messages import Claim, Delta, Record, decode, encode


@dataclass(slots=True)
class Bidder:
    """One device: facts, a proposal of its own, and the records it has heard."""

    node: NodeId
    facts: Facts
    copies: int
    barred: frozenset[Lot] = frozenset()
    valued: bool = True
    """Replicas go by what they save; else, while all are worth the same, by a hash."""
    heard: dict[NodeId, Record] = field(default_factory=dict)
    bid: dict[Lot, int] = field(default_factory=dict)
    whole: bool = False
    cpu_s: float = 0.0
    sent_bytes: int = 0
    published: int = 0
    record: Record = field(init=False)

    def __post_init__(self) -> None:
        self.record = Record(self.node, 1, 1, model=self.facts.demand.model)

    def deliberate(self) -> None:
        started = time.process_time()
        thinking = Deliberation(self.facts)
        while not thinking.advance():
            pass
        fresh = thinking.fresh({})
        self.whole = thinking.whole
        plan = fresh.owners if fresh else {}
        model = self.facts.model()
        copied = replicas(model, plan, (), self.copies) if self.valued else {}
        self.bid = bids(model, self.node, plan, (), copied.get(self.node, ()))
        self.cpu_s += time.process_time() - started

    @property
    def room(self) -> int:
        return room(self.facts, self.node)

    def rebid(self) -> bool:
        """Bid again; True if the claims changed."""
        started = time.process_time()
        rooms = [room(self.facts, device.node) for device in self.facts.devices]
        claims = bundle(
            self.node,
            self.facts.demand.lots(),
            self.bid.__getitem__,
            leaders(self.heard.values()),
            claimable(self.room, rooms, self.facts.demand) if self.whole else self.room,
            self.copies,
            self.barred,
        )
        changed = claims != self.record.claims
        if changed:
            self.record = Record(
                self.node, 1, self.record.seq + 1, model=self.record.model, claims=claims
            )
        self.cpu_s += time.process_time() - started
        return changed

    def publish(self) -> bytes:
        started = time.process_time()
        data = encode(Delta("market", self.node, 1, (self.record,)))
        self.cpu_s += time.process_time() - started
        self.sent_bytes += len(data)
        self.published += 1
        return data

    def hear(self, data: bytes) -> None:
        started = time.process_time()
        message = decode(data)
        assert isinstance(message, Delta)
        for record in message.records:
            held = self.heard.get(record.origin)
            if held is None or held.seq <= record.seq:
                self.heard[record.origin] = record
        self.cpu_s += time.process_time() - started


def room(facts: Facts, node: NodeId) -> int:
    device = next(device for device in facts.devices if device.node == node)
    return sum(tier.memory_bytes for tier in device.tiers) // facts.demand.lot_bytes


def settle(bidders: list[Bidder], rng: Random, limit: int = 200) -> int:
    """Rounds until nobody changes its claims; in each, everybody bids and news arrive at random."""
    waiting: list[tuple[Bidder, bytes]] = []
    for bidder in bidders:
        bidder.deliberate()
    for rounds in range(limit):
        calm = True
        for bidder in rng.sample(bidders, len(bidders)):
            if bidder.rebid():
                calm = False
                data = bidder.publish()
                waiting += [(other, data) for other in bidders if other is not bidder]
        rng.shuffle(waiting)
        late = [item for item in waiting if rng.random() < 0.3]
        for other, data in waiting:
            other.hear(data)
        if calm and not waiting:
            return rounds
        waiting = late  # and so some arrive twice
    raise AssertionError("the auction does not settle")


def outcome(bidders: list[Bidder]) -> Mapping[Lot, NodeId]:
    """Who owns what, as everybody sees it."""
    return owners(leaders(bidder.record for bidder in bidders))


def claims_of(bidders: list[Bidder]) -> dict[NodeId, tuple[Claim, ...]]:
    return {bidder.node: bidder.record.claims for bidder in bidders}
