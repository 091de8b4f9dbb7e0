"""A new version of a model in whole swarms: answers end where they began, all end on the new."""

from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest

from coeld.effects import Effect, OpenModel, SwapRoutes
from coeld.ids import ModelHash
from coeld.node import NodeConfig
from coeld.releases import Progress
from coeld.sim import checkers
from coeld.sim.device import Device, Request, Spec
from coeld.sim.world import MODEL, World

OLD = replace(MODEL, layers=12)
NEW = replace(OLD, model=ModelHash("7a" * 32), version=2)
WHOLE = 12 * 8
STEP_S = 0.05


def swarm(seed: int, rooms: list[int], **config: int) -> World:
    """A swarm at rest on the old version, each device with room for so many lots."""
    specs = [Spec(OLD.trunk_bytes + room * OLD.lot_bytes) for room in rooms]
    world = World(seed, specs, OLD, NodeConfig(**config))
    checkers.watch(world)
    world.watchers.append(nobody_is_left_alone)
    world.start_all()
    world.run(6)
    return world


def nobody_is_left_alone(world: World, device: Device, effect: Effect) -> None:
    """Who goes over leaves every lot of its version to others while somebody answers with it."""
    if not isinstance(effect, OpenModel) or device.demand is None:
        return
    old = device.demand
    same = [d for d in world.up() if d.demand is old and d is not device]
    left = {lot for other in same for lot in other.serving}
    if any(other.requests for other in [*same, device]):
        assert left.issuperset(old.lots()), f"{device.id} goes over while answers need it"


def answers(world: World, device: Device) -> bool:
    """Would a request at this device be answered now?"""
    if device.node is None or device.demand is None or device.refusal:
        return False
    same = [d for d in world.up() if d.demand is device.demand]
    return {lot for other in same for lot in other.serving}.issuperset(device.demand.lots())


def everywhere(world: World, progress: Progress = Progress.READY) -> None:
    for device in world.up():
        world.release(device, NEW, progress)


def over(world: World) -> bool:
    return all(d.demand is NEW and answers(world, d) for d in world.up())


def follow(
    world: World, rng: Random, done: Callable[[], bool], limit_s: float = 40.0
) -> tuple[list[Request], float]:
    """Ask at random until `done`: what was asked, and for how long nobody would have answered."""
    asked, gap_s, start = [], 0.0, world.now
    while not done():
        assert world.now - start < limit_s, f"not over after {limit_s} s"
        if rng.random() < 0.2:
            asked.append(world.ask(rng.choice(world.up()), rng.uniform(0.1, 3)))
        gap_s += STEP_S * (not any(answers(world, device) for device in world.up()))
        world.run(STEP_S)
    world.run(4)
    return asked, gap_s


def ended(world: World) -> None:
    """Everything is as if there had never been an older version."""
    world.demand = NEW
    world.run(6)
    assert over(world)
    checkers.at_rest(world)


@pytest.mark.parametrize("seed", range(0, 12, 2))
def test_where_memory_is_for_two_copies_somebody_answers_at_every_moment(seed: int) -> None:
    rng = Random(seed)
    rooms = [WHOLE + 4] * rng.randint(2, 4) + [rng.randint(0, 60) for _ in range(rng.randint(0, 2))]
    world = swarm(seed, rng.sample(rooms, len(rooms)))
    everywhere(world)
    asked, gap_s = follow(world, rng, lambda: over(world))
    assert gap_s == 0, f"seed={seed}: nobody answered for {gap_s:.2f} s"
    assert {request.outcome for request in asked if request.model} == {"done"}, f"seed={seed}"
    ended(world)


@pytest.mark.parametrize("seed", range(6))
def test_a_swarm_whose_layers_are_narrow_goes_over_as_well(seed: int) -> None:
    rng = Random(seed)
    first = tuple(range(OLD.layers))
    old, new = (replace(d, narrow_lot_bytes=200_000, narrow_first=first) for d in (OLD, NEW))
    specs = [Spec(old.trunk_bytes + rng.randint(24, 30) * old.lot_bytes) for _ in range(3)]
    world = World(seed, specs, old)
    checkers.watch(world)
    world.start_all()
    world.run(8)
    assert any(device.narrow for device in world.up()), f"seed={seed}"
    for device in world.up():
        world.release(device, new, Progress.READY)
    follow(world, rng, lambda: all(d.demand is new and answers(world, d) for d in world.up()))
    assert any(device.narrow for device in world.up())


@pytest.mark.parametrize("seed", range(0, 12, 2))
def test_where_memory_is_for_one_copy_answers_end_before_all_go_over(seed: int) -> None:
    rng = Random(seed)
    world = swarm(seed, [rng.randint(40, 47) for _ in range(3)])
    running = [world.ask(device, rng.uniform(2, 5)) for device in world.up()]
    everywhere(world)
    asked, gap_s = follow(world, rng, lambda: over(world))
    assert 0 < gap_s < 8, f"seed={seed}: a gap of {gap_s:.2f} s"
    kept = [request for request in running + asked if request.model]
    assert {request.outcome for request in kept} == {"done"}, f"seed={seed}"
    assert all(request.model == OLD.model for request in running)
    assert world.ask(world.device(0), 1).model == NEW.model
    ended(world)


@pytest.mark.parametrize("seed", range(0, 12, 2))
def test_crashes_in_the_middle_of_a_rollout_end_on_the_new_version(seed: int) -> None:
    rng = Random(seed)
    world = swarm(seed, [rng.randint(40, 100) for _ in range(rng.randint(3, 5))])
    world.watchers.remove(nobody_is_left_alone)  # by who goes over, not by who crashes
    everywhere(world)
    for _ in range(4):
        until = world.now + rng.uniform(0, 2)
        follow(world, rng, lambda until=until: world.now >= until)
        victim = rng.choice(world.up())
        if rng.random() < 0.5:
            world.crash_engine(victim, restart_after_s=rng.uniform(0.2, 2))
        else:
            world.crash(victim, noticed=rng.random() < 0.5)
            world.run(rng.uniform(0, 5))
            world.start(victim)
    world.run(60)
    ended(world)


@pytest.mark.parametrize("seed", range(4))
def test_who_is_about_to_go_stays_when_the_device_that_was_to_answer_on_crashes(seed: int) -> None:
    world = swarm(seed, [WHOLE + 4, WHOLE + 4, 0])
    asker = world.device(2)
    everywhere(world)
    request = world.ask(asker, 6.0)
    while not (leaving := [d for d in world.up() if d.node and d.node.rollout.leaving]):
        world.run(0.01)
    (other,) = (d for d in world.up() if d not in [asker, *leaving])
    world.run(seed * 0.1)
    world.crash(other)
    world.run(2)
    assert asker.table is not None
    assert set(asker.table.owners.values()) == {(leaving[0].id,)}
    while not request.outcome:
        lots = {lot for d in world.up() if d.demand is OLD for lot in d.serving}
        assert lots.issuperset(OLD.lots()), f"{asker.id} asks for lots that nobody has"
        world.run(STEP_S)
    assert request.outcome == "done"
    follow(world, Random(seed), lambda: over(world))
    ended(world)


def test_a_lossy_network_ends_on_the_new_version_too() -> None:
    world = swarm(3, [WHOLE + 4, WHOLE + 4, 50, 50])
    world.network.loss, world.network.repeat, world.network.slow = 0.1, 0.1, 0.05
    everywhere(world)
    follow(world, Random(3), lambda: over(world), limit_s=60)
    world.network.loss = world.network.slow = 0.0
    ended(world)


def test_nobody_goes_over_while_somebody_fetches() -> None:
    world = swarm(1, [60, 60, 60])
    everywhere(world)
    world.release(world.device(2), NEW, Progress.FETCHING)
    world.run(20)
    assert all(device.demand is OLD and answers(world, device) for device in world.up())
    world.release(world.device(2), NEW, Progress.READY)
    world.run(10)
    ended(world)


def test_who_opens_the_new_version_sooner_waits_for_the_rest_and_misses_no_memory() -> None:
    specs = [Spec(OLD.trunk_bytes + 40 * OLD.lot_bytes, open_s=each) for each in (0.3, 3, 8)]
    world = World(1, specs, OLD)
    world.start_all()
    world.run(6)
    missed = []
    world.watchers.append(
        lambda _world, _device, effect: missed.extend(
            [effect.table.missing_bytes] if isinstance(effect, SwapRoutes) else []
        )
    )
    everywhere(world)
    follow(world, Random(1), lambda: over(world))
    assert set(missed) == {0}
    world.crash(world.device(2))
    world.run(8)
    assert missed[-1] == 16 * NEW.lot_bytes, "memory that is missing is told all the same"


def test_who_cannot_have_the_new_version_stays_and_answers_as_long_as_it_can() -> None:
    world = swarm(1, [WHOLE + 4] * 3)
    everywhere(world)
    last = world.device(2)
    world.release(last, NEW, Progress.FAILED)
    world.run(30)
    assert [device.demand for device in world.up()] == [NEW, NEW, OLD]
    assert all(answers(world, device) for device in world.up())
    world.release(last, NEW, Progress.READY)
    world.run(10)
    ended(world)


def test_a_version_that_does_not_fit_those_who_have_it_replaces_nothing() -> None:
    world = swarm(1, [40, 40, 40])
    everywhere(world)
    world.release(world.device(1), NEW, Progress.FAILED)
    world.run(30)
    assert all(device.demand is OLD and answers(world, device) for device in world.up())


def test_an_answer_that_takes_too_long_ends_and_lets_the_others_go_over() -> None:
    world = swarm(1, [40, 40, 40], drain_ms=5000)
    world.watchers.remove(nobody_is_left_alone)  # time is up for all within a millisecond
    endless = world.ask(world.device(0), 1000)
    everywhere(world)
    world.run(4)
    assert not endless.outcome
    assert all(device.demand is OLD for device in world.up())
    world.run(14)
    assert endless.outcome == "failed"
    ended(world)


def test_an_older_version_never_wins_back() -> None:
    world = swarm(1, [60, 60, 60])
    everywhere(world)
    world.run(15)
    ended(world)
    for device in world.up():
        world.release(device, OLD, Progress.READY)
    late = world.device(1)
    world.crash(late)
    world.run(5)
    late.chosen, late.found = OLD, {}  # as if it had been off all the time
    world.start(late)
    world.run(5)
    assert [device.demand for device in world.up()] == [NEW, OLD, NEW]
    world.release(late, NEW, Progress.READY)
    world.run(15)
    ended(world)


def test_devices_on_three_versions_end_on_the_newest() -> None:
    """Those on neither of the older ones have room for all of it."""
    world = swarm(1, [40, 40, 40, 40])
    world.watchers.remove(nobody_is_left_alone)
    everywhere(world)
    world.release(world.device(2), NEW, Progress.FAILED)
    world.run(30)
    assert [device.demand for device in world.up()] == [NEW, NEW, OLD, NEW]
    world.crash(world.device(3))
    world.run(15)
    newest = replace(NEW, model=ModelHash("8b" * 32), version=3)
    for device in world.up():
        world.release(device, newest, Progress.READY)
    world.run(30)
    assert all(device.demand is newest and answers(world, device) for device in world.up())
