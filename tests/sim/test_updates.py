"""What a change leads to in whole swarms: moves that pay, and another model without wrong calls."""

from dataclasses import replace
from random import Random

import pytest

from coeld.deployment.chains import placement_ns
from coeld.deployment.proposal import shares_of
from coeld.deployment.supply import facts_of
from coeld.effects import Effect, LoadLots
from coeld.events import ResourcesSampled
from coeld.ids import ModelHash
from coeld.node import NodeConfig
from coeld.sim import checkers
from coeld.sim.world import MODEL, Device, Spec, World
from coeld.update.worth import HORIZON_S, MOVE_MB_PER_S
from coeld.view import Resources

SMALL = replace(MODEL, layers=12)


def swarm(seed: int, rooms: list[int], config: NodeConfig | None = None) -> World:
    specs = [Spec(MODEL.trunk_bytes + room * MODEL.lot_bytes) for room in rooms]
    world = World(seed, specs, SMALL, config=config)
    checkers.watch(world)
    world.start_all()
    return world


def price_ns(world: World) -> int:
    """What a token costs as lots are served now, with what devices say of themselves now."""
    records = [d.node.perception.me for d in world.up() if d.node is not None]
    facts = facts_of(world.demand, records)
    model = facts.model()
    index = {device.node: i for i, device in enumerate(facts.devices)}
    placed = {lot: index[record.origin] for record in records for lot in record.serving}
    assert len(placed) == len(world.demand.lots())
    return placement_ns(model, shares_of(model, placed))


@pytest.mark.parametrize("seed", range(10))
def test_the_bytes_that_a_change_of_speed_moves_are_paid_back_within_the_horizon(seed: int) -> None:
    rng = Random(seed)
    world = swarm(seed, [60, 60, 60], NodeConfig(replicas_max=1))
    world.run(6)
    loaded = [0]

    def watch(_: World, device: Device, effect: Effect) -> None:
        if isinstance(effect, LoadLots):
            loaded[0] += len(effect.lots) * SMALL.lot_bytes

    world.watchers.append(watch)
    device = rng.choice(world.up())
    speed = rng.choice([4400, 6000, 8000, 11200, 14400, 17600, 36000])
    world.feed(device, ResourcesSampled(Resources(device.spec.budget_bytes, 1, 5, speed)))
    kept = price_ns(world)
    world.run(10)
    checkers.at_rest(world)
    gain = kept - price_ns(world)
    assert gain >= 0, f"seed={seed}"
    assert loaded[0] * kept <= gain * HORIZON_S * MOVE_MB_PER_S * 10**6, f"seed={seed}"


def test_another_model_comes_device_by_device_and_ends_in_one_plan() -> None:
    world = swarm(1, [60, 60, 60])
    world.run(6)
    old = SMALL.model
    world.demand = replace(SMALL, model=ModelHash("7a" * 32), layers=10)
    for device in world.up():
        world.crash_engine(device, restart_after_s=0.5)
        world.run(4)
        for other in world.up():
            assert other.table is not None
            same = {d.id for d in world.up() if d.table and d.table.model == other.table.model}
            assert set(other.table.addresses) == same, "nobody calls a device with another model"
    world.run(6)
    assert all(device.table and device.table.model != old for device in world.up())
    checkers.at_rest(world)
