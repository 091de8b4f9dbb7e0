"""What fits and what it is worth."""

from dataclasses import replace

from coeld.deployment.cost import LAN, CostModel, Device, Link, Tier
from coeld.deployment.placement import PATIENCE, URGENT_PATIENCE, Quiet
from coeld.deployment.pricing import PROPOSED, bids, capacity, value_us
from coeld.deployment.proposal import tie
from coeld.ids import Lot, ModelHash, NodeId
from coeld.lot_sets import LOTS_PER_RECORD_MAX
from coeld.messages import BID_MAX
from coeld.view import ModelDemand

DEMAND = ModelDemand(ModelHash("5e" * 32), "m", 30, 8, 350_000, 30_000_000)
A, B = NodeId("a" * 16), NodeId("b" * 16)


def model(speed_a: int = 4000, speed_b: int = 4000, demand: ModelDemand = DEMAND) -> CostModel:
    devices = [Device(A, (Tier("ram", 1, speed_a),)), Device(B, (Tier("ram", 1, speed_b),))]
    return CostModel(demand, devices, lambda a, b: LAN)


def test_capacity_is_what_is_left_beside_the_trunk_and_never_negative() -> None:
    assert capacity(30_000_000 + 350_000 * 7 + 349_999, DEMAND) == 7
    assert capacity(29_999_999, DEMAND) == 0
    assert capacity(0, DEMAND) == 0
    assert capacity(10**15, replace(DEMAND, lot_bytes=0)) == LOTS_PER_RECORD_MAX


def test_a_lot_is_worth_the_microseconds_it_saves_all_who_ask() -> None:
    alone = CostModel(DEMAND, [Device(A, (Tier("ram", 1, 4000),))], lambda a, b: LAN)
    disk_us, here_us, call_us = 35_000, 87, 70 / 8
    assert abs(value_us(alone, 0, 1_000_000) - (disk_us - here_us - call_us)) <= 2
    both = value_us(model(), 0, 1_000_000)
    assert 2 * (disk_us - here_us) - 600 < both < 2 * (disk_us - here_us)


def test_a_faster_device_a_nearer_one_and_a_more_popular_lot_are_worth_more() -> None:
    assert value_us(model(8000), 0, 10**6) > value_us(model(4000), 0, 10**6)
    assert value_us(model(), 0, 10**6) > value_us(model(), 0, 5 * 10**5)
    devices = [Device(A, (Tier("ram", 1, 4000),)), Device(B, (Tier("ram", 1, 4000),))]
    air = CostModel(DEMAND, devices, lambda a, b: Link(4000, 30))
    assert value_us(model(), 0, 10**6) > value_us(air, 0, 10**6)


def test_what_the_proposal_gives_a_device_outbids_everything_that_it_does_not() -> None:
    mine = bids(model(500, 500), A, dict.fromkeys(DEMAND.lots(), A), ())
    others = bids(model(10**6, 10**6), B, {}, DEMAND.lots())
    assert min(mine.values()) >= PROPOSED > max(others.values())


def test_a_replica_stays_where_it_is_unless_another_device_is_much_better() -> None:
    held, fresh = bids(model(), A, {}, DEMAND.lots()), bids(model(4400, 4400), B, {}, ())
    assert all(held[lot] > fresh[lot] for lot in DEMAND.lots())


def test_every_bid_fits_the_wire() -> None:
    for size in (0, 1, 350_000, 2**53):
        for speed in (0, 1, 2**53):
            found = bids(model(speed, speed, replace(DEMAND, lot_bytes=size)), A, {}, DEMAND.lots())
            assert all(0 < bid <= BID_MAX for bid in found.values())


def test_ties_are_broken_by_device_and_layer_and_the_lots_of_a_layer_stay_together() -> None:
    assert tie(A, 3) == tie(A, 3)
    assert len({tie(A, layer) for layer in range(30)}) > 25
    skewed = replace(DEMAND, top_k=1, popularity=((500_000,) + (71_428,) * 7,) * 30)
    found = bids(model(demand=skewed), A, {}, ())
    assert all(len({found[Lot(layer, e)] for e in range(8)}) == 1 for layer in range(30))


def test_a_device_beyond_those_that_are_considered_bids_least() -> None:
    stranger = bids(model(), NodeId("c" * 16), {}, ())
    assert max(stranger.values()) < min(bids(model(), A, {}, ()).values())


def test_a_swarm_that_never_rests_is_not_waited_for_for_ever() -> None:
    quiet = Quiet()
    for step in range(200):
        quiet.disturb(step * 0.1, rest_s=1.0)
    assert quiet.since(0.06, URGENT_PATIENCE * 1.0) == 2.0
    assert quiet.since(1.0, PATIENCE * 1.0) == 10.0
    assert quiet.since(0.06, 100.0) > 19.9
