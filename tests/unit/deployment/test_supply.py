"""What the market makes of what devices say of themselves."""

from coeld.deployment.supply import SPARING, facts_of
from coeld.ids import ModelHash, NodeId
from coeld.messages import Record
from coeld.view import ModelDemand

DEMAND = ModelDemand(ModelHash("5e" * 32), "m", 4, 2, 1000, 500)
A, B = NodeId("a" * 16), NodeId("b" * 16)


def record(node: NodeId, speed: int, rows: int = 0, sparing: bool = False) -> Record:
    return Record(
        node,
        1,
        1,
        memory_budget_bytes=8500,
        kernel_mb_per_s=speed,
        row_mb_per_s=rows,
        sparing=sparing,
    )


def test_measured_speeds_become_the_tier_and_unknown_ones_are_assumed() -> None:
    first, second = facts_of(DEMAND, [record(A, 4000, 12_000), record(B, 4000)]).devices
    assert (first.tiers[0].mb_per_s, first.tiers[0].row_speed) == (4000, 12_000)
    assert second.tiers[0].row_speed == 8 * 4000


def test_a_device_on_a_low_battery_counts_as_slow_and_takes_what_is_left() -> None:
    records = [record(A, 4000, 12_000, sparing=True), record(B, 1000, 3000)]
    first, second = facts_of(DEMAND, records).devices
    assert (first.node, first.tiers[0].mb_per_s) == (A, 4000 // SPARING)
    assert first.tiers[0].row_mb_per_s == 12_000 // SPARING
    assert second.tiers[0].mb_per_s == 1000
