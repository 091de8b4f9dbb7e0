"""What fits and what it is worth."""

from dataclasses import replace

from coeld.deployment.placement import Quiet
from coeld.deployment.pricing import bid, capacity, tie, value_ns
from coeld.ids import ModelHash, NodeId
from coeld.messages import BID_MAX
from coeld.view import ModelDemand

DEMAND = ModelDemand(ModelHash("5e" * 32), "m", 30, 8, 350_000, 30_000_000)
A, B = NodeId("a" * 16), NodeId("b" * 16)


def test_capacity_is_what_is_left_beside_the_trunk_and_never_negative() -> None:
    assert capacity(30_000_000 + 350_000 * 7 + 349_999, DEMAND) == 7
    assert capacity(29_999_999, DEMAND) == 0
    assert capacity(0, DEMAND) == 0
    assert capacity(10**15, replace(DEMAND, lot_bytes=0)) == 4096


def test_a_faster_device_values_a_lot_higher() -> None:
    assert value_ns(350_000, 8000, False) > value_ns(350_000, 4000, False)


def test_another_must_be_a_quarter_faster_to_take_what_is_held() -> None:
    held = value_ns(350_000, 4000, True)
    assert value_ns(350_000, 4900, False) < held
    assert value_ns(350_000, 5100, False) > held


def test_every_bid_fits_the_wire() -> None:
    for size in (0, 1, 350_000, 2**53):
        for speed in (0, 1, 2**53):
            value = value_ns(size, speed, True)
            assert value >= 1
            assert 0 < bid(A, 0, value) <= BID_MAX


def test_ties_are_broken_by_device_and_layer_and_never_beat_a_value() -> None:
    assert tie(A, 3) == tie(A, 3)
    assert len({tie(A, layer) for layer in range(30)}) > 25
    assert bid(A, 1, 101) > max(bid(B, layer, 100) for layer in range(100))


def test_a_swarm_that_never_rests_is_not_waited_for_for_ever() -> None:
    quiet = Quiet()
    for step in range(200):
        quiet.disturb(step * 0.1, rest_s=1.0)
    assert quiet.since(0.06) <= 0.6 + 0.1
    assert quiet.since(1.0) <= 10.0
