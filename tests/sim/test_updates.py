"""What a change leads to in whole swarms: moves that pay, and another model without wrong calls.

Who asks, and what for, changes as well; noise in it does nothing.
"""

from collections import Counter
from dataclasses import replace
from random import Random

import pytest

from coeld.deployment.chains import placement_ns
from coeld.deployment.proposal import shares_of
from coeld.deployment.supply import facts_of
from coeld.effects import Effect, LoadLots
from coeld.events import LinksMeasured, ResourcesSampled, Used
from coeld.ids import Lot, ModelHash, NodeId
from coeld.measured import MeasuredLink
from coeld.node import NodeConfig
from coeld.sim import checkers
from coeld.sim.device import Device, Spec
from coeld.sim.world import MODEL, World
from coeld.update.worth import HORIZON_S, MOVE_MB_PER_S
from coeld.view import ModelDemand, Resources
from tests.harness.simulated import measure_links

SMALL = replace(MODEL, layers=12)


CALM = NodeConfig(
    heartbeat_ms=5000, silence_ms=30_000, suspicion_ms=5000, replicas_max=1, spans=False
)
"""Hours pass quickly."""


def swarm(
    seed: int,
    rooms: list[int],
    config: NodeConfig | None = None,
    model: ModelDemand = SMALL,
    speed: int = 16_000,
) -> World:
    specs = [Spec(model.trunk_bytes + room * model.lot_bytes, speed) for room in rooms]
    world = World(seed, specs, model, config=config)
    checkers.watch(world)
    world.start_all()
    return world


def served(world: World) -> dict[Lot, NodeId]:
    """By whom; replicas are not expected."""
    found = {lot: device.id for device in world.up() for lot in device.serving}
    assert len(found) == len(world.demand.lots()) == sum(len(d.serving) for d in world.up())
    return found


def price_ns(world: World, owners: dict[Lot, NodeId] | None = None) -> int:
    """What a token costs with these owners, or as lots are served now, with what devices say of
    themselves now."""
    records = [d.node.perception.me for d in world.up() if d.node is not None]
    facts = facts_of(world.demand, records, world.config.spans)
    model = facts.model()
    index = {device.node: i for i, device in enumerate(facts.devices)}
    placed = {lot: index[node] for lot, node in (owners or served(world)).items()}
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


@pytest.mark.parametrize("seed", [3, 5, 7, 8])
def test_a_device_that_joins_and_loads_slowly_takes_no_replica_away(seed: int) -> None:
    room = 8 * SMALL.experts
    quick = Spec(SMALL.trunk_bytes + room * SMALL.lot_bytes)
    world = World(seed, [quick, quick, quick, replace(quick, disk_mb_per_s=1)], SMALL)
    checkers.watch(world)
    for number in range(3):
        world.start(world.device(number))
    world.run(8)
    slow = world.device(3)
    world.start(slow)
    busy_s = 0.0
    for _ in range(40):
        world.run(0.5)
        owners = Counter(lot for device in world.up() for lot in device.serving)
        assert min(owners[lot] for lot in SMALL.lots()) == 2
        busy_s += 0.5 * bool(slow.loading)
    assert busy_s > 10
    world.run(20)
    checkers.at_rest(world)


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


class Watch:
    """What is loaded minute by minute, and whether that pays."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.loads = 0
        self.loads_in_all = 0
        world.watchers.append(self._watch)

    def _watch(self, _: World, device: Device, effect: Effect) -> None:
        if isinstance(effect, LoadLots):
            self.loads += len(effect.lots)

    def minute(self, *asked: tuple[int, Used]) -> None:
        """Devices are asked, by their numbers, and a minute passes. What moves meanwhile has to be
        paid back within the horizon, and all that is loaded changes hands."""
        before = served(self.world)
        for number, used in asked:
            self.world.feed(self.world.device(number), used)
        self.world.run(60)
        if not self.loads:
            return
        after = served(self.world)
        kept, fresh = price_ns(self.world, before), price_ns(self.world, after)
        moved = self.loads * self.world.demand.lot_bytes
        assert kept - fresh > 0
        assert moved * kept <= (kept - fresh) * HORIZON_S * MOVE_MB_PER_S * 10**6
        assert self.loads == sum(after[lot] != node for lot, node in before.items())
        self.loads_in_all += self.loads
        self.loads = 0


def same_facts(world: World) -> None:
    """Everybody computes the same from what it has heard."""
    nodes = [device.node for device in world.up() if device.node is not None]
    facts = [facts_of(world.demand, node.perception.present()) for node in nodes]
    assert all(found == facts[0] for found in facts)


def layers_at(world: World, number: int) -> int:
    return len(world.device(number).serving) // world.demand.experts


def test_layers_gather_where_the_requests_are_and_follow_when_others_ask() -> None:
    world = swarm(3, [60, 60, 60], CALM)
    world.run(30)
    least = min(range(3), key=lambda number: layers_at(world, number))
    other = (least + 1) % 3
    watch = Watch(world)
    for number in (least, other):
        for _ in range(120):
            watch.minute((number, Used(2, 200, 600, {})))
        same_facts(world)
        assert layers_at(world, number) == 60 // SMALL.experts, "as many as it has room for"
        assert watch.loads_in_all <= 3 * len(SMALL.lots())
    checkers.at_rest(world)


@pytest.mark.parametrize("seed", range(3))
def test_noise_bursts_and_single_requests_move_nothing(seed: int) -> None:
    world, rng = swarm(seed, [60, 60, 60], CALM), Random(seed)
    world.run(30)
    watch = Watch(world)
    for minute in range(180):  # one is asked all the time, the others now and then
        noisy = Used(2, 200, round(600 * rng.uniform(0.9, 1.1)), {})
        single = [(1, Used(1, 100, 300, {}))] if rng.random() < 1 / 20 else []
        burst = [(2, Used(6, 600, 600, {}))] if minute % 60 == 30 else []
        watch.minute((0, noisy), *single, *burst)
        if minute == 90:
            watch.loads_in_all = 0  # by then it is known who asks
    assert watch.loads_in_all == 0
    same_facts(world)


ROUTED = replace(MODEL, layers=6, experts=16, top_k=2, hidden=576)


def test_experts_follow_popularity_when_it_drifts_and_not_when_it_is_noise() -> None:
    """Whole layers do not fit, so experts are placed one by one; device 0 is asked."""
    world, rng = swarm(1, [38, 34, 30], CALM, ROUTED), Random(1)
    world.run(30)
    watch = Watch(world)

    def hour(hot: range) -> None:
        weights = [30 if expert in hot else 1 for expert in range(16)]
        for _ in range(60):
            drawn = [rng.choices(range(16), weights, k=1200) for _ in range(6)]
            uses = {i: tuple(map(row.count, range(16))) for i, row in enumerate(drawn)}
            watch.minute((0, Used(2, 100, 500, uses)))

    def hot_at_home(hot: range) -> int:
        return sum(lot.expert in hot for lot in world.device(0).serving)

    first, second = range(3), range(8, 11)
    for hot in (first, second):
        hour(hot)
        hour(hot)
        same_facts(world)
        assert hot_at_home(hot) >= 14, "of 18 in 6 layers"
        moved, watch.loads_in_all = watch.loads_in_all, 0
        assert 0 < moved <= 2 * len(ROUTED.lots())
        hour(hot)
        assert watch.loads_in_all == 0
    asked = world.device(0).node.perception.me.asked
    assert len(asked.popularity) == ROUTED.layers
    checkers.at_rest(world)


def test_a_calibrated_model_is_placed_by_what_its_text_used_before_anybody_asks() -> None:
    row = bytes([7 if expert < 3 else 3 for expert in range(16)])
    calibrated = replace(ROUTED, prior=(row,) * ROUTED.layers)
    gains = []
    for seed in range(3):
        plain, known = (swarm(seed, [38, 34, 30], CALM, each) for each in (ROUTED, calibrated))
        for world in (plain, known):
            world.run(30)
        same_facts(known)
        gains.append(price_ns(known, served(plain)) - price_ns(known))
    assert min(gains) >= 0
    assert max(gains) > 0
    uses = {layer: tuple(16 * 2**level for level in row) for layer in range(ROUTED.layers)}
    for _ in range(10):
        known.feed(known.device(0), Used(1, 10, 50, uses))
        known.run(60)
    node = known.device(0).node
    assert node is not None
    assert node.perception.me.asked.rates.tokens > 0
    assert node.perception.me.asked.popularity == (), "everybody takes that for granted"


@pytest.mark.parametrize("spans", [True, False])
def test_whose_link_gets_twenty_times_worse_is_called_no_more_and_is_again_when_it_recovers(
    spans: bool,
) -> None:
    world = swarm(4, [60, 60, 60], NodeConfig(replicas_max=1, spans=spans))
    world.run(6)
    far = world.device(1)
    assert far.serving
    measure_links(world, far, 6000)
    before = price_ns(world)
    world.run(12)
    checkers.at_rest(world)
    assert not far.serving, "the other two have room for everything"
    assert price_ns(world) < before
    measure_links(world, None, 0)
    world.run(12)
    checkers.at_rest(world)


def test_who_is_far_and_needed_is_still_called() -> None:
    world = swarm(4, [40, 40, 40], NodeConfig(replicas_max=1, spans=False))
    world.run(6)
    far = world.device(1)
    measure_links(world, far, 6000)
    world.run(12)
    checkers.at_rest(world)
    assert 16 <= len(far.serving) < 40, "no more of it than the others have no room for"


def loads_until_covered(seed: int, noise: bool) -> Counter[Lot]:
    """Devices with slow disks, how often each lot is read until all are there. With noise, speeds
    and links seem to be a fraction of what they are meanwhile: cores that load are busy."""
    rng, slow = Random(seed), replace(SMALL, lot_bytes=20_000_000)
    specs = [Spec(slow.trunk_bytes + 40 * slow.lot_bytes, disk_mb_per_s=40) for _ in range(3)]
    world = World(seed, specs, slow, config=NodeConfig(replicas_max=1))
    loads: Counter[Lot] = Counter()

    def count(_: World, _device: Device, effect: Effect) -> None:
        if isinstance(effect, LoadLots):
            loads.update(effect.lots)

    world.watchers.append(count)
    world.start_all()
    world.run(4)
    assert not checkers.covered(world)
    while not checkers.covered(world):
        for device in world.up() if noise else ():
            links = (
                MeasuredLink(other.id, us := rng.randrange(300, 90_000), us, 110)
                for other in sorted(world.up(), key=lambda other: other.id)
                if other is not device
            )
            world.feed(device, LinksMeasured(tuple(links)))
        world.run(1)
    return loads


@pytest.mark.parametrize("seed", range(4))
def test_what_is_measured_while_lots_are_loaded_has_none_read_in_vain(seed: int) -> None:
    assert loads_until_covered(seed, noise=True) == loads_until_covered(seed, noise=False)


def test_an_hour_of_noise_on_links_moves_nothing() -> None:
    calm = NodeConfig(heartbeat_ms=5000, silence_ms=30_000, suspicion_ms=5000)  # noise is the point
    world = swarm(3, [60] * 4, calm)
    world.run(20)
    slow, rng = world.device(2), Random(3)
    measure_links(world, slow, 2500, rng)
    world.run(30)
    assert checkers.covered(world)
    moved: list[Effect] = []
    world.watchers.append(
        lambda _, __, effect: moved.append(effect) if isinstance(effect, LoadLots) else None
    )
    for _ in range(360):
        measure_links(world, slow, 2500, rng)
        world.run(10)
    assert moved == []
