"""What is worth telling, and whom to listen to."""

from dataclasses import replace
from random import Random

import pytest

from coeld.ids import NodeId
from coeld.perception.neighbours import Rings, positions
from coeld.perception.resources import Squeeze, Told, stepped_speed
from coeld.view import Resources


@pytest.mark.parametrize("seed", range(10))
def test_noise_of_ten_percent_is_soon_told_no_more(seed: int) -> None:
    rng, told = Random(seed), Told()
    samples = [
        Resources(
            int(1e9 * rng.uniform(0.9, 1.1)),
            10**9,
            rng.randrange(40, 55),
            int(4000 * rng.uniform(0.9, 1.1)),
        )
        for _ in range(500)
    ]
    tellings = [told.sample(sample, 0.0) for sample in samples]
    assert tellings.count(True) <= 3
    speeds = set()
    for sample in samples:
        told.sample(sample, 0.0)
        assert told.resources is not None
        speeds.add(told.resources.kernel_mb_per_s)
    assert len(speeds) == 1


def test_a_halved_budget_a_busy_cpu_and_a_throttled_kernel_are_told() -> None:
    told = Told()
    base = Resources(1000, 1000, 10, 4000)
    assert told.sample(base, 0.0)
    assert told.sample(Resources(500, 1000, 10, 4000), 0.0)
    assert told.sample(Resources(500, 1000, 90, 4000), 0.0)
    assert told.sample(Resources(500, 1000, 90, 1500), 0.0)
    assert not told.sample(Resources(500, 1000, 90, 1500), 0.0)


def test_a_low_battery_and_arithmetic_that_slows_down_are_told_alone() -> None:
    told = Told()
    base = Resources(1000, 1000, 10, 4000, 40_000)
    assert told.sample(base, 0.0)
    assert not told.sample(replace(base, row_mb_per_s=44_000), 0.0)
    assert told.sample(replace(base, row_mb_per_s=16_000), 0.0)
    assert told.resources is not None
    speeds = told.resources.kernel_mb_per_s, told.resources.row_mb_per_s
    assert speeds == (stepped_speed(4000), stepped_speed(16_000))
    assert told.sample(replace(base, row_mb_per_s=16_000, sparing=True), 0.0)
    assert told.resources.sparing


def test_work_for_cuts_is_told_in_steps_like_speeds() -> None:
    told = Told()
    base = Resources(1000, 1000, 10, 4000, 40_000, cut_us=600)
    assert told.sample(base, 0.0)
    assert told.facts()["cut_us"] == stepped_speed(600)
    assert not told.sample(replace(base, cut_us=700), 0.0)
    assert told.sample(replace(base, cut_us=1500), 0.0)
    assert told.facts()["cut_us"] == stepped_speed(1500)


def test_pressure_takes_half_of_the_budget_in_steps_and_calm_gives_it_back() -> None:
    squeeze, now = Squeeze(), 0.0
    pressed = Resources(1000, 1000, 0, 4000, memory_pressure_percent=30)
    seen = []
    for _ in range(150):  # five minutes of samples every 2 s
        seen.append(squeeze.budget(pressed, now))
        now += 2
    assert seen == sorted(seen, reverse=True)
    assert sorted(set(seen), reverse=True) == [800, 640, 510, 500]
    assert seen.index(640) - seen.index(800) == 15
    uneasy = replace(pressed, memory_pressure_percent=5)
    assert {squeeze.budget(uneasy, now + at) for at in range(0, 600, 2)} == {500}
    back = [
        squeeze.budget(replace(pressed, memory_pressure_percent=0), now + at) for at in range(600)
    ]
    assert back == sorted(back)
    assert back[-1] == 1000


def test_a_shrunken_budget_is_told() -> None:
    told = Told()
    assert told.sample(Resources(1000, 1000, 0, 4000), 0.0)
    assert told.sample(Resources(1000, 1000, 0, 4000, memory_pressure_percent=50), 2.0)
    assert told.resources is not None
    assert told.resources.memory_budget_bytes == 800


def test_almost_equal_devices_tell_equal_speeds() -> None:
    speeds = set()
    for speed in range(3000, 3600, 50):
        told = Told()
        told.sample(Resources(1, 1, 0, speed), 0.0)
        assert told.resources is not None
        speeds.add(told.resources.kernel_mb_per_s)
    assert len(speeds) == 1


def ids(count: int) -> list[NodeId]:
    return [NodeId(f"{index:016x}") for index in range(count)]


def rings(me: NodeId, others: list[NodeId]) -> Rings:
    found = Rings(me, 8)
    for node in others:
        found.put(node, True)
    return found


def test_a_small_swarm_is_a_full_mesh() -> None:
    me, *others = ids(9)
    assert rings(me, others).neighbours() == set(others)


@pytest.mark.parametrize("count", [10, 11, 50, 400])
def test_in_a_large_swarm_everybody_has_few_neighbours_mutually_and_news_needs_few_hops(
    count: int,
) -> None:
    everyone = ids(count)
    links = {me: rings(me, [n for n in everyone if n != me]).neighbours() for me in everyone}
    assert all(3 <= len(chosen) <= 8 for chosen in links.values())
    assert all(me in links[other] for me in everyone for other in links[me])
    reached, fresh, hops = {everyone[0]}, [everyone[0]], 0
    while fresh:
        fresh = sorted({node for link in fresh for node in links[link]} - reached)
        reached |= set(fresh)
        hops += bool(fresh)
    assert reached == set(everyone)
    assert hops <= 5


@pytest.mark.parametrize("seed", range(5))
def test_neighbours_are_the_next_and_the_last_on_every_ring_whoever_came_and_went(
    seed: int,
) -> None:
    rng = Random(seed)
    me, *others = ids(60)
    found, present = Rings(me, 8), set()
    for _ in range(300):
        node, there = rng.choice(others), rng.random() < 0.7
        found.put(node, there)
        (present.add if there else present.discard)(node)
    expected = set()
    for ring in range(4):
        order = sorted([me, *present], key=lambda node: positions(node, 4)[ring])
        at = order.index(me)
        expected |= {order[at - 1], order[(at + 1) % len(order)]}
    assert found.neighbours() == expected


def test_one_that_joins_changes_few_links() -> None:
    me, *others = ids(100)
    before = rings(me, others[:-1]).neighbours()
    assert len(before & rings(me, others).neighbours()) >= 6


def test_news_of_one_quantity_does_not_carry_the_noise_of_another() -> None:
    told = Told()
    assert told.sample(Resources(1_000_000, 10**7, 10, 4000), 0.0)
    assert told.sample(Resources(930_000, 10**7, 60, 4300), 0.0)
    assert told.resources is not None
    assert told.resources.memory_budget_bytes == 1_000_000
    assert told.resources.cpu_load_percent == 60
