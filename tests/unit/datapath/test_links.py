"""Round trips and bandwidth of links, from made-up calls."""

from random import Random

import pytest

from coeld.datapath.links import (
    ASSUMED_BYTES_PER_S,
    INTERVALS,
    PROBED_AGAIN_S,
    SURE,
    LinkMeter,
)
from coeld.deployment.cost import LAN
from coeld.ids import NodeId
from coeld.measured import LINKS_MAX

A, B = NodeId("a" * 16), NodeId("b" * 16)


def interval(meter: LinkMeter, link_s: float, calls: int = 4, now_s: float = 0.0) -> None:
    for _ in range(calls):
        meter.answered(A, link_s, 0, now_s)


def measured(meter: LinkMeter, link_s: float, intervals: int = INTERVALS) -> int:
    """The round trip after some intervals like that, µs."""
    for _ in range(intervals):
        interval(meter, link_s)
        found = meter.look([A])
    return found[0].rtt_us


def test_median_and_99th_percentile_are_told_once_there_is_enough() -> None:
    rng, meter = Random(1), LinkMeter()
    for count in range(1, SURE + 1):
        for _ in range(1000):
            meter.answered(A, 0.004 if rng.random() < 0.05 else 0.0005, 0, 0.0)
        found = meter.look([A])
        assert bool(found) == (count >= SURE)
    assert (found[0].node, found[0].rtt_us, found[0].rtt_p99_us) == (A, 500, 4000)
    assert found[0].mb_per_s == 0, "nothing large was sent"


def test_a_burst_of_one_interval_is_forgotten_and_a_change_is_believed_after_three() -> None:
    meter = LinkMeter()
    assert measured(meter, 0.0005) == 500
    assert measured(meter, 0.01, 1) == 500
    assert measured(meter, 0.01, 1) == 500
    assert measured(meter, 0.01, 1) == 10_000


def test_the_payload_of_a_call_is_not_part_of_the_round_trip() -> None:
    meter = LinkMeter()
    for _ in range(SURE):
        meter.answered(A, 0.001, round(ASSUMED_BYTES_PER_S * 0.0004), 0.0)
        found = meter.look([A])
    assert found[0].rtt_us == 600
    meter.delivered(A, 10e6)
    for _ in range(INTERVALS):
        meter.answered(A, 0.001, 4000, 0.0)
        found = meter.look([A])
    assert (found[0].rtt_us, found[0].mb_per_s) == (600, 10)


def test_bandwidth_is_the_median_of_the_last_large_transfers() -> None:
    meter = LinkMeter()
    interval(meter, 0.001)
    for rate in (100e6, 101e6, 3e6, 102e6, 0.0):
        meter.delivered(A, rate)
    measured(meter, 0.001)
    assert meter.look([A])[0].mb_per_s == 100


def test_only_links_without_calls_are_probed_often_until_known_then_rarely() -> None:
    meter = LinkMeter()
    assert meter.due([A, B], 0.0) == [A, B]
    for count in range(INTERVALS):
        interval(meter, 0.001, now_s=2.0 * count)
        assert meter.due([A], 2.0 * count) == [], "it has just been heard"
        meter.look([A, B])
        assert meter.due([A], 2.0 * count) == ([A] if count < INTERVALS - 1 else [])
    last_s = 2.0 * (INTERVALS - 1)
    assert meter.due([A], last_s + PROBED_AGAIN_S - 1) == []
    assert meter.due([A], last_s + PROBED_AGAIN_S) == [A]
    interval(meter, 0.01, now_s=last_s + PROBED_AGAIN_S)
    meter.look([A])
    assert meter.due([A], last_s + PROBED_AGAIN_S) == [A], "it seems to have changed"


def test_who_is_no_peer_any_more_is_forgotten_and_there_is_room_for_so_many() -> None:
    meter = LinkMeter()
    measured(meter, 0.001)
    assert meter.look([B]) == ()
    nodes = [NodeId(f"{i:016x}") for i in range(LINKS_MAX + 10)]
    for _ in range(SURE):
        for node in nodes:
            meter.answered(node, 0.001, 0, 0.0)
        found = meter.look(nodes)
    assert len(found) == LINKS_MAX
    assert len(meter.due(nodes, 1e9)) == LINKS_MAX


def test_what_is_assumed_of_bandwidth_is_what_the_market_assumes() -> None:
    assert pytest.approx(LAN.mb_per_s * 1e6) == ASSUMED_BYTES_PER_S


@pytest.mark.parametrize("mb_per_s", [0.1, 0.25, 0.9, 2.5, 100.4])
def test_a_call_takes_what_round_trip_and_rate_say_together_however_slow_the_link(
    mb_per_s: float,
) -> None:
    """A rate is told in whole megabytes, 1 at least; what kernels deliver after losses is less."""
    meter = LinkMeter()
    meter.delivered(A, mb_per_s * 1e6)
    for _ in range(SURE):
        meter.answered(A, 0.033, 8192, 0.0)
        found = meter.look([A])
    assert found[0].rtt_us + 8192 / found[0].mb_per_s == pytest.approx(33_000, abs=1)
