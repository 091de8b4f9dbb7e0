"""Which layers lose bits: as few as in the best of all ways, alike everywhere, without flapping."""

from dataclasses import replace
from itertools import product
from random import Random

import pytest

from coeld.deployment.proposal import Deliberation, Proposal
from coeld.deployment.supply import facts_of
from coeld.deployment.widths import (
    NARROW_S,
    WIDEN_S,
    Widths,
    must_narrow,
    narrow_layers,
    quotas,
    rest_s,
)
from coeld.ids import Lot, ModelHash, NodeId
from coeld.messages import Record
from coeld.view import ModelDemand

MODEL = ModelHash("5e" * 32)


def demand(layers: int = 6, experts: int = 4, wide: int = 100, narrow: int = 55) -> ModelDemand:
    return ModelDemand(
        MODEL, "m", layers, experts, wide, 1000, narrow_lot_bytes=narrow,
        narrow_first=tuple(sorted(range(layers), key=lambda i: (abs(2 * i - layers + 1), i))),
    )  # fmt: skip


def fewest(want: ModelDemand, rooms: list[int]) -> int | None:
    """Of all ways to share whole layers out, the fewest that are narrow; None: it does not fit."""
    wide, narrow = (want.experts * size for size in want.sizes)
    found: list[int] = []
    for counts in product(range(want.layers + 1), repeat=len(rooms)):
        if sum(counts) == want.layers:
            needed = [
                next((n for n in range(c + 1) if (c - n) * wide + n * narrow <= room), None)
                for c, room in zip(counts, rooms, strict=True)
            ]
            if None not in needed:
                found.append(sum(n for n in needed if n is not None))
    return min(found, default=None)


@pytest.mark.parametrize("seed", range(150))
def test_few_more_layers_are_narrow_than_in_the_best_of_all_ways(seed: int) -> None:
    rng = Random(seed)
    want = demand(rng.randint(3, 6), rng.choice([1, 4]), 100, rng.choice([52, 55, 62]))
    rooms = [rng.randint(0, want.layers * want.experts * 60) for _ in range(rng.randint(1, 3))]
    best = fewest(want, rooms)
    if not must_narrow(want, rooms):
        lots = sum(room // want.lot_bytes for room in rooms)
        assert best is None or lots >= want.layers * want.experts, f"{seed=}"
        return
    assert best is not None, f"{seed=}"
    counts = quotas(want, rooms, range(len(rooms)))
    assert sum(counts) == want.layers, f"{seed=}"
    total = 0
    for count, room in zip(counts, rooms, strict=True):
        lots = [Lot(layer, e) for layer in range(count) for e in range(want.experts)]
        chosen = narrow_layers(want, lots, room, ())
        sizes = [want.sizes[lot.layer in chosen] for lot in lots]
        assert sum(sizes) <= room, f"{seed=}: it fits"
        total += len(chosen)
    # One lot of room is left at each device to change widths in, which may cost it three layers.
    spare = -(-want.lot_bytes // (want.experts * (want.lot_bytes - want.narrow_lot_bytes)))
    assert best <= total <= best + spare * len(rooms), f"{seed=}: {total}, best {best}"


@pytest.mark.parametrize("seed", range(20))
def test_every_device_finds_the_same_whatever_the_order_of_records(seed: int) -> None:
    rng = Random(seed)
    want = demand(12, 8)
    budgets = [1000 + rng.randint(1, 4) * 800 for _ in range(4)]
    records = [
        Record(NodeId(f"{i:016x}"), 1, 1, memory_budget_bytes=budget, kernel_mb_per_s=4000)
        for i, budget in enumerate(budgets)
    ]
    found: set[tuple] = set()
    for _ in range(5):
        rng.shuffle(records)
        thinking = Deliberation(facts_of(want, records))
        while not thinking.advance():
            pass
        fresh = thinking.fresh({})
        found.add(tuple(sorted(fresh.owners.items())) if fresh else ())
    assert len(found) == 1, f"{seed=}"
    if thinking.facts.narrow:
        assert len(found.pop()) == 96, f"{seed=}: all are placed"


def test_what_is_served_stays_and_only_holes_are_filled() -> None:
    want = demand(12, 8)
    a, b = NodeId("a" * 16), NodeId("b" * 16)
    records = [
        Record(node, 1, 1, memory_budget_bytes=1000 + 4 * 800 + 100, kernel_mb_per_s=4000)
        for node in (a, b)
    ]
    facts = facts_of(want, records)
    assert facts.narrow
    thinking = Deliberation(facts)
    served = {lot: a if lot.layer < 4 else b for lot in want.lots() if lot.layer % 4 != 3}
    fresh = thinking.fresh(served)
    assert fresh is not None
    kept = thinking.kept(served, fresh)
    assert isinstance(kept, Proposal)
    moved = [lot for lot, node in kept.owners.items() if lot in served and served[lot] != node]
    assert len({lot.layer for lot in moved}) == 0
    assert sorted(kept.owners) == want.lots()


def test_one_device_that_forbids_it_speaks_for_all() -> None:
    want = demand(12, 8)
    records = [
        Record(NodeId(c * 16), 1, 1, memory_budget_bytes=5300, kernel_mb_per_s=4000) for c in "ab"
    ]
    assert facts_of(want, records).narrow
    assert not facts_of(want, [records[0], replace(records[1], stays_wide=True)]).narrow


def test_only_what_lacks_memory_for_the_stored_and_not_for_the_narrow_is_narrowed() -> None:
    want = demand(6, 4)
    assert not must_narrow(want, [1200, 1200])
    assert must_narrow(want, [1200, 1199])
    assert must_narrow(want, [660, 660])
    assert not must_narrow(want, [660, 659])  # not even in fewer bits, by whole layers
    assert not must_narrow(demand(6, 4, narrow=0), [1200, 1199])


def test_the_middle_goes_first_but_what_is_narrow_already_before_it() -> None:
    want = demand(6, 4)
    assert narrow_layers(want, want.lots(), 2400, ()) == frozenset()
    assert narrow_layers(want, want.lots(), 2300, ()) == {2, 3}
    assert narrow_layers(want, want.lots(), 2300, {0}) == {0, 2}


def test_a_layer_gets_its_bits_back_when_there_was_room_for_long_enough() -> None:
    want, widths = demand(6, 4), Widths()
    lots = want.lots()
    assert widths.want(want, lots, 2300, (), 0.0) == {2, 3}
    assert widths.due == float("inf")
    assert widths.want(want, lots, 2400, {2, 3}, 10.0) == {2, 3}
    assert widths.due == 10.0 + WIDEN_S
    assert widths.want(want, lots, 2300, {2, 3}, 20.0) == {2, 3}  # gone again
    assert widths.want(want, lots, 2400, {2, 3}, 30.0) == {2, 3}
    assert widths.want(want, lots, 2400, {2, 3}, 29.9 + WIDEN_S) == {2, 3}
    assert widths.want(want, lots, 2400, {2, 3}, 30.0 + WIDEN_S) == frozenset()
    assert widths.want(want, lots[:4], 2400, {3}, 0.0) == frozenset()  # it is another's now


def test_a_swarm_waits_before_its_first_layer_loses_bits_and_not_before_the_next() -> None:
    record = Record(NodeId("a" * 16), 1, 1)
    assert rest_s(False, [record], 0.06) == 0.06
    assert rest_s(True, [record], 0.06) == NARROW_S
    assert rest_s(True, [record, replace(record, narrow=((2, 3),))], 0.06) == 0.06
