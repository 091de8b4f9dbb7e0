"""Memory that goes and comes: layers lose bits only where they must, and get them back."""

from dataclasses import replace
from random import Random

import pytest

from coeld.deployment.widths import NARROW_S, WIDEN_S
from coeld.effects import Effect, LoadLots, SwapRoutes
from coeld.events import ResourcesSampled
from coeld.node import NodeConfig
from coeld.sim import checkers
from coeld.sim.world import MODEL, Device, Spec, World
from coeld.view import Resources

DEMAND = replace(
    MODEL, layers=12, narrow_lot_bytes=200_000, narrow_first=(6, 5, 7, 4, 8, 3, 9, 2, 10, 1, 11, 0)
)
LAYER = DEMAND.experts * DEMAND.lot_bytes
NARROW = DEMAND.experts * DEMAND.narrow_lot_bytes


def swarm(seed: int, layers: list[float], config: NodeConfig | None = None) -> World:
    """Devices with room for so many layers as they are stored."""
    specs = [Spec(DEMAND.trunk_bytes + int(room * LAYER)) for room in layers]
    world = World(seed, specs, DEMAND, config=config)
    checkers.watch(world)
    world.start_all()
    return world


def told_missing(world: World) -> list[int]:
    """Collects what route tables say is missing, from now on."""
    found: list[int] = []

    def watch(_: World, _device: Device, effect: Effect) -> None:
        if isinstance(effect, SwapRoutes):
            found.append(effect.table.missing_bytes)

    world.watchers.append(watch)
    return found


def narrow_layers(world: World) -> set[int]:
    return {lot.layer for device in world.up() for lot in device.narrow}


@pytest.mark.parametrize("seed", range(10))
def test_a_plug_is_pulled_and_the_model_goes_on_in_fewer_bits_and_gets_them_back(seed: int) -> None:
    world = swarm(seed, [4.5, 4.5, 4.5])
    world.run(6)
    checkers.at_rest(world)
    assert not narrow_layers(world)
    missing = told_missing(world)
    lost = world.device(seed % 3)
    world.crash(lost)
    world.run_until(lambda: checkers.covered(world), 1 + 2 * NARROW_S + 2)
    world.run(6)
    checkers.at_rest(world)
    assert set(missing) == {0}, f"{seed=}: nobody was told that memory is missing"
    # 12 layers in the room of 9: 3 layers have to be saved, 3/7 of one is saved by each.
    assert 7 <= len(narrow_layers(world)) <= 9, f"{seed=}"
    world.start(lost)
    world.run(WIDEN_S - 10)
    assert checkers.covered(world)
    assert narrow_layers(world), f"{seed=}: who knows whether it stays"
    world.run(20)
    checkers.at_rest(world)
    assert not narrow_layers(world), f"{seed=}"
    assert all(device.table and device.table.narrow == () for device in world.up())


@pytest.mark.parametrize("seed", range(0, 30, 2))
def test_any_swarm_narrows_what_it_must_and_no_more(seed: int) -> None:
    rng = Random(seed)
    layers = [rng.uniform(0.3, 6) for _ in range(rng.randint(2, 6))]
    world = swarm(seed, layers)
    world.run(12)
    checkers.at_rest(world)
    narrow = narrow_layers(world)
    rooms = checkers.rooms(world)
    if sum(rooms) >= 96 or not checkers.fits_narrow(world):
        assert not narrow, f"{seed=}"
        return
    assert checkers.covered(world), f"{seed=}"
    lacking = DEMAND.layers * LAYER - sum(
        device.spec.budget_bytes - DEMAND.trunk_bytes for device in world.up()
    )
    least = max(1, -(-lacking // (LAYER - NARROW)))
    # Layers are whole: each device may waste less than one, and keeps room to change a lot.
    assert least <= len(narrow) <= min(12, least + 3 * len(layers)), f"{seed=}: {narrow}"
    owners = {device.id: {lot.layer for lot in device.serving} for device in world.up()}
    assert sum(map(len, owners.values())) == DEMAND.layers, "no replicas"


@pytest.mark.parametrize("seed", range(5))
def test_a_device_that_comes_and_goes_has_nobody_change_back_and_forth(seed: int) -> None:
    world = swarm(seed, [4.5, 4.5, 4.5])
    world.run(6)
    lost = world.device(seed % 3)
    world.crash(lost)
    world.run(12)
    before = narrow_layers(world)
    wider = [0]

    def watch(_: World, device: Device, effect: Effect) -> None:
        if isinstance(effect, LoadLots):
            wider[0] += len(set(effect.lots) & device.serving & device.narrow)

    world.watchers.append(watch)
    for _ in range(3):
        world.start(lost)
        world.run(15)
        world.crash(lost)
        world.run(12)
    checkers.at_rest(world)
    assert len(narrow_layers(world)) <= len(before) + 1, f"{seed=}"
    assert wider[0] == 0, f"{seed=}: {wider[0]} lots got bits back that they lose again"


def test_who_forbids_it_is_told_what_is_missing_as_ever() -> None:
    world = swarm(1, [4.5, 4.5, 4.5], NodeConfig(narrow=False))
    world.run(6)
    world.crash(world.device(1))
    world.run(12)
    checkers.at_rest(world)
    assert not narrow_layers(world)
    table = world.up()[0].table
    assert table is not None
    assert table.missing_bytes == (96 - 2 * 36) * DEMAND.lot_bytes


@pytest.mark.parametrize("seed", range(5))
def test_a_budget_that_shrinks_is_obeyed_at_once_and_answered_with_fewer_bits(seed: int) -> None:
    world = swarm(seed, [6.5, 6.5])
    world.run(6)
    device = world.device(seed % 2)
    device.spec = Spec(DEMAND.trunk_bytes + int(4.5 * LAYER))
    world.feed(device, ResourcesSampled(Resources(device.spec.budget_bytes, 1, 5, 16_000)))
    world.run(0.1)
    assert checkers.bytes_of(world, device) <= 4.5 * LAYER, f"{seed=}"
    world.run_until(lambda: checkers.covered(world), 12)
    world.run(6)
    checkers.at_rest(world)
    assert narrow_layers(world), f"{seed=}"


@pytest.mark.parametrize("seed", range(5))
def test_loads_that_fail_and_messages_that_are_lost_delay_it_only(seed: int) -> None:
    world = swarm(seed, [4.5, 4.5, 4.5])
    world.run(6)
    world.load_failure, world.network.loss = 0.3, 0.05
    world.crash(world.device(seed % 3))
    world.run(20)
    world.load_failure = world.network.loss = 0.0
    world.run(70)
    checkers.at_rest(world)
    assert checkers.covered(world), f"{seed=}"
