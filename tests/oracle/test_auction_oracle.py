"""The auction against an obvious central greedy, over random swarms and random message orders."""

from random import Random

import pytest

from coeld.deployment.auction import bundle, leaders
from coeld.deployment.pricing import PROPOSED, TIE_BITS
from coeld.deployment.proposal import tie
from coeld.ids import Lot, NodeId
from coeld.messages import Claim, Record


def priced(node: NodeId, layer: int, value: int, mine: bool) -> int:
    return (PROPOSED if mine else 0) | value << TIE_BITS | tie(node, layer)


class Bidder:
    """One device with a fixed capacity, fixed bids and whatever it has heard so far."""

    def __init__(self, rng: Random, index: int, lots: list[Lot], copies: int) -> None:
        self.id = NodeId(f"{index:016x}")
        self.capacity = rng.randrange(0, len(lots))
        value = rng.choice([50, 200, 200, 200])
        mine = {lot for lot in lots if rng.random() < 0.2}  # proposals that contradict each other
        self.bids = {lot: priced(self.id, lot.layer, value, lot in mine) for lot in lots}
        self.barred = {lot for lot in lots if rng.random() < 0.05}
        self.lots, self.copies = lots, copies
        self.heard: dict[NodeId, Record] = {}
        self.record = Record(self.id, 1, 1)

    def rebid(self) -> bool:
        rivals = leaders(self.heard.values())
        claims = bundle(
            self.id,
            self.lots,
            self.bids.__getitem__,
            rivals,
            self.capacity,
            self.copies,
            self.barred,
        )
        if claims == self.record.claims:
            return False
        self.record = Record(self.id, 1, self.record.seq + 1, claims=claims)
        return True

    def hear(self, record: Record) -> None:
        if self.heard.get(record.origin, record).seq <= record.seq:
            self.heard[record.origin] = record


def central_greedy(bidders: list[Bidder]) -> dict[NodeId, set[Claim]]:
    """All (copy, bid, node, lot) in one list, best first; take what is free and fits."""
    offers = [
        (copy, -bidder.bids[lot], -int(bidder.id, 16), lot, bidder.id)
        for bidder in bidders
        for lot in bidder.lots
        if lot not in bidder.barred
        for copy in range(bidder.copies)
    ]
    room = {bidder.id: bidder.capacity for bidder in bidders}
    taken: set[tuple[Lot, int]] = set()
    won: dict[NodeId, dict[Lot, Claim]] = {bidder.id: {} for bidder in bidders}
    for copy, negative_price, _, lot, node in sorted(offers):
        if (lot, copy) not in taken and lot not in won[node] and len(won[node]) < room[node]:
            taken.add((lot, copy))
            won[node][lot] = Claim(lot, copy, -negative_price)
    return {node: set(claims.values()) for node, claims in won.items()}


def settle(bidders: list[Bidder], rng: Random) -> int:
    """Random losses, repetitions and orders until nobody changes its mind; returns the rounds."""
    in_flight: list[tuple[Bidder, Record]] = []
    for steps in range(10_000):
        if rng.random() < 0.5 or not in_flight:
            bidder = rng.choice(bidders)
            if bidder.rebid() or rng.random() < 0.3:
                reached = [b for b in bidders if b is not bidder and rng.random() > 0.2]
                in_flight += [(other, bidder.record) for other in reached]
        else:
            other, record = rng.choice(in_flight)
            other.hear(record)
            if rng.random() > 0.1:
                in_flight.remove((other, record))
        if steps % 200 == 199 and _calm(bidders):
            return steps
    raise AssertionError("the auction does not settle")


def _calm(bidders: list[Bidder]) -> bool:
    known = all(
        other.heard.get(b.id) == b.record for b in bidders for other in bidders if other is not b
    )
    return known and not any(bidder.rebid() for bidder in bidders)


@pytest.mark.parametrize("seed", range(60))
def test_the_auction_finds_what_a_central_greedy_finds_in_any_order_of_messages(seed: int) -> None:
    rng = Random(seed)
    lots = [Lot(layer, e) for layer in range(rng.randrange(1, 6)) for e in range(4)]
    count = rng.randrange(1, 7)
    bidders = [Bidder(rng, index, lots, rng.randrange(1, 4)) for index in range(count)]
    for bidder in bidders:
        bidder.copies = bidders[0].copies
    settle(bidders, rng)
    expected = central_greedy(bidders)
    assert {b.id: set(b.record.claims) for b in bidders} == expected


@pytest.mark.parametrize("seed", range(10))
def test_every_lot_is_owned_before_any_replica_when_capacity_is_short(seed: int) -> None:
    rng = Random(seed)
    lots = [Lot(layer, e) for layer in range(6) for e in range(4)]
    bidders = [Bidder(rng, index, lots, 2) for index in range(3)]
    for bidder in bidders:
        bidder.capacity, bidder.barred = rng.randrange(1, 8), set()
    settle(bidders, rng)
    claims = [claim for bidder in bidders for claim in bidder.record.claims]
    assert len(claims) == min(len(lots), sum(bidder.capacity for bidder in bidders))
    assert all(claim.copy == 0 for claim in claims)


def test_equal_devices_win_whole_layers_so_that_the_model_is_cut_in_few_places() -> None:
    lots = [Lot(layer, e) for layer in range(30) for e in range(8)]
    rng = Random(1)
    bidders = [Bidder(rng, index, lots, 1) for index in range(3)]
    for bidder in bidders:
        bidder.capacity, bidder.barred = 240, set()
        bidder.bids = {lot: priced(bidder.id, lot.layer, 1000, False) for lot in lots}
    settle(bidders, rng)
    owners = {c.lot: b.id for b in bidders for c in b.record.claims}
    assert all(len({owners[Lot(layer, e)] for e in range(8)}) == 1 for layer in range(30))
    assert min(len(b.record.claims) for b in bidders) >= 240 // 6
