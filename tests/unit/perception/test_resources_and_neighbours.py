"""What is worth telling, and whom to listen to."""

from random import Random

import pytest

from coeld.ids import NodeId
from coeld.perception.neighbours import choose
from coeld.perception.resources import Told
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
    tellings = [told.sample(sample) for sample in samples]
    assert tellings.count(True) <= 3
    speeds = set()
    for sample in samples:
        told.sample(sample)
        assert told.resources is not None
        speeds.add(told.resources.kernel_mb_per_s)
    assert len(speeds) == 1


def test_a_halved_budget_a_busy_cpu_and_a_throttled_kernel_are_told() -> None:
    told = Told()
    base = Resources(1000, 1000, 10, 4000)
    assert told.sample(base)
    assert told.sample(Resources(500, 1000, 10, 4000))
    assert told.sample(Resources(500, 1000, 90, 4000))
    assert told.sample(Resources(500, 1000, 90, 1500))
    assert not told.sample(Resources(500, 1000, 90, 1500))


def test_almost_equal_devices_tell_equal_speeds() -> None:
    speeds = set()
    for speed in range(3000, 3600, 50):
        told = Told()
        told.sample(Resources(1, 1, 0, speed))
        assert told.resources is not None
        speeds.add(told.resources.kernel_mb_per_s)
    assert len(speeds) == 1


def ids(count: int) -> list[NodeId]:
    return [NodeId(f"{index:016x}") for index in range(count)]


def test_a_small_swarm_is_a_full_mesh() -> None:
    me, *others = ids(9)
    assert choose(me, others, set(), 8, Random(1)) == set(others)


def test_a_large_swarm_is_connected_with_a_bounded_number_of_links() -> None:
    everyone = ids(100)
    links = {
        me: choose(me, [node for node in everyone if node != me], set(), 8, Random(int(me, 16)))
        for me in everyone
    }
    assert all(len(chosen) == 8 for chosen in links.values())
    reached, fresh = {everyone[0]}, [everyone[0]]
    while fresh:
        fresh = sorted({node for link in fresh for node in links[link]} - reached)
        reached |= set(fresh)
    assert reached == set(everyone)


def test_links_are_kept_when_others_come_and_go() -> None:
    me, *others = ids(40)
    before = choose(me, others, set(), 8, Random(1))
    after = choose(me, [*others[:-1], NodeId("f" * 16)], before, 8, Random(2))
    assert len(before & after) >= 6
