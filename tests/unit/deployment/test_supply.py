"""What the market makes of what devices say of themselves."""

from dataclasses import replace

from coeld.asked import NOTHING, Asked, Rates
from coeld.deployment.cost import CUT_US, LAN, Link
from coeld.deployment.popularity import STRANGER, WEIGHT_MAX
from coeld.deployment.supply import SPARING, UNNEEDED, considered, facts_among, facts_of
from coeld.ids import ModelHash, NodeId
from coeld.measured import MeasuredLink
from coeld.messages import Record
from coeld.view import ModelDemand

DEMAND = ModelDemand(ModelHash("5e" * 32), "m", 4, 2, 1000, 500)
A, B = NodeId("a" * 16), NodeId("b" * 16)


def record(
    node: NodeId, speed: int, rows: int = 0, sparing: bool = False, asked: Asked = NOTHING
) -> Record:
    return Record(
        node,
        1,
        1,
        memory_budget_bytes=8500,
        kernel_mb_per_s=speed,
        row_mb_per_s=rows,
        sparing=sparing,
        asked=asked,
    )


def test_measured_speeds_become_the_tier_and_unknown_ones_are_assumed() -> None:
    first, second = facts_of(DEMAND, [record(A, 4000, 12_000), record(B, 4000)]).devices
    assert (first.tiers[0].mb_per_s, first.tiers[0].row_speed) == (4000, 12_000)
    assert second.tiers[0].row_speed == 8 * 4000


def test_work_of_a_cut_counts_twice_where_rows_are_sent_and_once_where_they_arrive() -> None:
    told = [replace(record(A, 4000), cut_us=900), replace(record(B, 4000), cut_us=300)]
    model = facts_of(DEMAND, told).model()
    assert (model.cut_us(0, 1), model.cut_us(1, 0)) == (700, 500)
    assert model.reach_ns(0, 1) - model.reach_ns(1, 0) == 200_000
    unknown = facts_of(DEMAND, [record(A, 4000), record(B, 4000)]).model()
    assert unknown.cut_us(0, 1) == CUT_US


def test_a_device_on_a_low_battery_counts_as_slow_and_takes_what_is_left() -> None:
    records = [record(A, 4000, 12_000, sparing=True), record(B, 1000, 3000)]
    first, second = facts_of(DEMAND, records).devices
    assert (first.node, first.tiers[0].mb_per_s) == (A, 4000 // SPARING)
    assert first.tiers[0].row_mb_per_s == 12_000 // SPARING
    assert second.tiers[0].mb_per_s == 1000


def test_a_far_slower_device_gets_no_lots_to_have_them_as_stored_where_they_fit_in_fewer_bits() -> (
    None
):
    demand = replace(DEMAND, narrow_lot_bytes=600, narrow_first=tuple(range(4)))
    fast = [replace(record(node, 16_000), memory_budget_bytes=3500) for node in (A, B)]
    slow, slower = (record(NodeId("c" * 16), 16_000 // n) for n in (UNNEEDED, UNNEEDED + 1))
    assert facts_of(demand, fast).narrow
    assert considered(demand, [*fast, slower]) == considered(demand, fast)
    assert slow in considered(demand, [*fast, slow])
    wide = [replace(each, stays_wide=True) for each in fast]
    assert slower in considered(demand, [*wide, slower]), "nobody may hold fewer bits"


def test_askers_weigh_as_much_as_they_ask_for_and_all_alike_while_nobody_asks() -> None:
    idle = facts_of(DEMAND, [record(A, 4000), record(B, 4000)])
    assert [device.weight for device in idle.devices] == [1, 1]
    little = Asked(Rates(4, 512, STRANGER // 2))
    assert facts_of(DEMAND, [record(A, 4000, asked=little), record(B, 4000)]) == idle
    much = Asked(Rates(64, 8 * STRANGER, 3 * STRANGER))
    facts = facts_of(DEMAND, [record(A, 4000, asked=much), record(B, 4000)])
    assert [device.weight for device in facts.devices] == [5, 1]
    absurd = Asked(Rates(64, 0, 2**40))
    facts = facts_of(DEMAND, [record(A, 4000, asked=absurd), record(B, 4000)])
    assert facts.devices[0].weight == WEIGHT_MAX


def test_a_slow_device_that_is_asked_much_counts_as_asker_without_room() -> None:
    slow = 4000 // (UNNEEDED + 1)
    assert len(facts_of(DEMAND, [record(A, slow), record(B, 4000)]).devices) == 1
    asked = Asked(Rates(64, 0, 3 * STRANGER))
    first, second = facts_of(DEMAND, [record(A, slow, asked=asked), record(B, 4000)]).devices
    assert (first.node, first.weight, first.tiers[0].memory_bytes) == (A, 4, 0)
    assert (second.node, second.weight) == (B, 1)
    assert second.tiers[0].memory_bytes > 0


def test_links_are_as_their_ends_measured_them_and_assumed_where_nobody_did() -> None:
    c = NodeId("c" * 16)
    a = replace(
        record(A, 4000), links=(MeasuredLink(B, 2000, 9000, 10), MeasuredLink(c, 50, 60, 400))
    )
    b = replace(record(B, 4000), links=(MeasuredLink(A, 4000, 9000, 40),))
    found = facts_among(DEMAND, [record(c, 4000), b, a]).links
    assert found[0][1] == Link(2000, 16), "the asker's round trip, both directions' bandwidth"
    assert found[1][0] == Link(4000, 16)
    assert found[0][2] == found[2][0] == Link(50, 400), "one end knows it"
    assert found[1][2] == found[2][1] == LAN
    gone = facts_of(DEMAND, [a, record(c, 4000)]).links
    assert gone[0][1] == Link(50, 400)


def test_prices_follow_the_links() -> None:
    near = facts_of(DEMAND, [record(A, 4000), record(B, 4000)]).model()
    a = replace(record(A, 4000), links=(MeasuredLink(B, 6000, 9000, 5),))
    far = facts_of(DEMAND, [a, record(B, 4000)]).model()
    assert far.reached(0, 1) - near.reached(0, 1) == (6000 - 300) * 1000
    assert far.reached(1, 0) == far.reached(0, 1)


def test_links_count_as_measured_when_everybody_has_measured_its_own() -> None:
    a, b = (replace(record(node, 4000), probed=True) for node in (A, B))
    assert facts_among(DEMAND, [a, b]).measured
    assert not facts_among(DEMAND, [a, b, record(NodeId("c" * 16), 4000)]).measured


def test_what_is_measured_of_the_same_devices_is_told_from_what_changes_who_is_there() -> None:
    before = facts_among(DEMAND, [record(A, 4000), record(B, 4000)])
    slower = facts_among(DEMAND, [record(A, 400), record(B, 4000)])
    linked = replace(record(A, 4000), links=(MeasuredLink(B, 9000, 9000, 5),))
    assert slower.measured_anew(before)
    assert facts_among(DEMAND, [linked, record(B, 4000)]).measured_anew(before)
    assert not facts_among(DEMAND, [record(A, 4000)]).measured_anew(before)
    smaller = replace(record(A, 4000), memory_budget_bytes=5000)
    assert not facts_among(DEMAND, [smaller, record(B, 4000)]).measured_anew(before)
    other = replace(DEMAND, model=ModelHash("6e" * 32))
    assert not facts_among(other, [record(A, 4000), record(B, 4000)]).measured_anew(before)
