"""When a better placement pays for moving there."""

from random import Random

import pytest

from coeld.deployment.proposal import Deliberation
from coeld.deployment.supply import facts_of
from coeld.ids import ModelHash, NodeId
from coeld.messages import Record
from coeld.update.worth import GAIN_MIN_PERCENT, HORIZON_S, MOVE_MB_PER_S, worth_moving
from coeld.view import ModelDemand

MODEL = ModelHash("5e" * 32)


def test_a_gain_below_the_floor_moves_nothing_even_for_free() -> None:
    assert not worth_moving(1000, 1001 - 10 * GAIN_MIN_PERCENT, 0)
    assert worth_moving(1000, 1000 - 10 * GAIN_MIN_PERCENT, 0)
    assert not worth_moving(1000, 1200, 0)


def test_what_is_saved_within_the_horizon_has_to_pay_for_the_bytes() -> None:
    half = HORIZON_S * MOVE_MB_PER_S * 1_000_000 // 2
    assert worth_moving(1000, 500, half)
    assert not worth_moving(1000, 500, half + 10**6)


@pytest.mark.parametrize("seed", range(40))
def test_a_device_ten_times_slower_never_makes_the_best_placement_slower(seed: int) -> None:
    rng = Random(seed)
    layers, experts = rng.randint(3, 8), rng.choice([2, 4, 8])
    demand = ModelDemand(
        MODEL, "m", layers, experts, 1_000_000, 0, top_k=rng.choice([1, 2]), hidden=576
    )
    rooms = [rng.randint(1, layers * experts) for _ in range(rng.randint(2, 4))]
    rooms[0] += max(0, layers * experts - sum(rooms))
    speeds = [rng.choice([2000, 4000, 10000]) for _ in rooms]
    fast = [record(i, demand, *device) for i, device in enumerate(zip(rooms, speeds, strict=True))]
    slow = record(9, demand, rng.randint(1, layers * experts), min(speeds) // 10)
    assert price_ns(demand, [*fast, slow]) <= price_ns(demand, fast), f"seed={seed}"


def record(index: int, demand: ModelDemand, room: int, speed: int) -> Record:
    return Record(
        NodeId(f"{index:016x}"),
        1,
        1,
        memory_budget_bytes=room * demand.lot_bytes,
        kernel_mb_per_s=speed,
        model=MODEL,
    )


def price_ns(demand: ModelDemand, records: list[Record]) -> int:
    """Of the placement that the market proposes to these devices."""
    thinking = Deliberation(facts_of(demand, records))
    while not thinking.advance():
        pass
    fresh = thinking.fresh({})
    assert fresh is not None
    return fresh.price_ns
