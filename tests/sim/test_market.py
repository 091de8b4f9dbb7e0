"""The market in whole swarms, in virtual time: layers stay whole, and moves have a reason."""

from dataclasses import replace
from random import Random

import pytest

from coeld.effects import DropLots, Effect, LoadLots
from coeld.events import ResourcesSampled
from coeld.ids import Lot
from coeld.node import NodeConfig
from coeld.sim import checkers
from coeld.sim.device import Device, Spec
from coeld.sim.world import MODEL, World
from coeld.view import Resources
from tests.harness.simulated import measure_links

SMALL = replace(MODEL, layers=12)


FAST = 16_000
"""MB/s with which a layer takes less time than a call: whole layers are best."""


def swarm(
    seed: int, rooms: list[int], speeds: list[int] | None = None, config: NodeConfig | None = None
) -> World:
    speeds = speeds or [FAST] * len(rooms)
    specs = [
        Spec(MODEL.trunk_bytes + room * MODEL.lot_bytes, speed)
        for room, speed in zip(rooms, speeds, strict=True)
    ]
    world = World(seed, specs, SMALL, config)
    checkers.watch(world)
    world.start_all()
    return world


def moves(world: World) -> list[tuple[str, str, int]]:
    """From now on: (device, what, how many lots) of every load and drop."""
    found: list[tuple[str, str, int]] = []

    def watch(_: World, device: Device, effect: Effect) -> None:
        if isinstance(effect, LoadLots | DropLots):
            found.append((device.id, type(effect).__name__, len(effect.lots)))

    world.watchers.append(watch)
    return found


def torn(world: World) -> list[int]:
    """Layers that no device serves whole."""
    return [
        layer
        for layer in range(world.demand.layers)
        if not any(
            all(Lot(layer, e) in device.serving for e in range(world.demand.experts))
            for device in world.up()
        )
    ]


@pytest.mark.parametrize("seed", range(8))
def test_survivors_with_exactly_enough_room_serve_whole_layers_at_once(seed: int) -> None:
    world = swarm(seed, [49, 49, 49])
    world.run_until(lambda: len(world.up()) == 3 and checkers.covered(world), 20)
    world.run(6)
    assert torn(world) == []
    world.crash(max(world.up(), key=lambda device: len(device.serving)))
    world.run_until(lambda: checkers.covered(world), 20)
    for _ in range(60):
        assert torn(world) == [], f"seed={seed}"
        world.run(0.05)
    checkers.at_rest(world)


def test_an_hour_of_noise_moves_nothing() -> None:
    calm = NodeConfig(heartbeat_ms=5000, silence_ms=30_000, suspicion_ms=5000)  # noise is the point
    world = swarm(3, [60] * 4, config=calm)
    world.run(20)
    assert checkers.covered(world)
    found = moves(world)
    rng = Random(3)
    for _ in range(360):
        for device in world.up():
            noise = [rng.uniform(0.9, 1.1) for _ in range(3)]
            budget, load, speed = device.spec.budget_bytes, 50, FAST
            sample = Resources(
                min(budget, int(budget * noise[0])),
                10**9,
                int(load * noise[1]),
                int(speed * noise[2]),
            )
            world.feed(device, ResourcesSampled(sample))
        world.run(10)
    assert found == []


def test_a_device_that_joins_ten_times_slower_takes_nothing_that_answers_wait_for() -> None:
    world = swarm(4, [49, 49, 97], [FAST, FAST, FAST // 10])
    slow = world.device(2)
    world.run(8)
    owned = {lot for device in world.up() if device is not slow for lot in device.serving}
    assert owned == set(SMALL.lots())
    claims = slow.node.perception.me.claims if slow.node else ()
    assert all(claim.copy > 0 for claim in claims)


@pytest.mark.parametrize("rooms", [[49, 49], [44, 54]])
def test_a_device_that_joins_later_and_is_ten_times_slower_moves_nothing(rooms: list[int]) -> None:
    world = swarm(6, [*rooms, 97], [4000, 4000, 400])
    slow = world.device(2)
    world.run(0.4)
    if slow.node is not None:
        world.crash(slow)
    world.run(8)
    found = moves(world)
    world.start(slow)
    world.run(10)
    assert slow.node is not None
    assert slow.node.perception.me.model == MODEL.model
    assert {device for device, *_ in found} <= {slow.id}, "the others keep what they have"


@pytest.mark.parametrize("change", ["leave", "crash", "return", "join", "slow", "squeeze"])
def test_every_change_leads_to_a_plan_that_all_agree_on(change: str) -> None:
    world = swarm(5, [57, 57, 57, 57])
    late = world.device(3)
    world.run(3)
    if change == "join":
        world.crash(late)
    world.run(8)
    device = world.device(1)
    match change:
        case "leave":
            world.leave(device)
        case "crash":
            world.crash(device)
        case "return":
            world.crash(device)
            world.run(5)
            world.start(device)
        case "join":
            world.start(late)
        case "slow":
            world.feed(
                device, ResourcesSampled(Resources(device.spec.budget_bytes, 1, 5, FAST // 10))
            )
        case "squeeze":
            budget = MODEL.trunk_bytes + 20 * MODEL.lot_bytes
            device.spec = replace(device.spec, budget_bytes=budget)
            world.feed(device, ResourcesSampled(Resources(budget, 1, 5, FAST)))
    world.run(12)
    checkers.at_rest(world)
    assert torn(world) == []
    if change == "slow":
        node = device.node
        assert node is not None
        assert all(claim.copy > 0 for claim in node.perception.me.claims), "others are faster"


def test_a_device_on_a_low_battery_gives_away_what_others_can_hold_and_takes_the_rest() -> None:
    world = swarm(5, [60, 60, 60])
    world.run(8)
    tired = max(world.up(), key=lambda device: len(device.serving))
    charged = Resources(tired.spec.budget_bytes, 10**9, 5, FAST)
    world.feed(tired, ResourcesSampled(replace(charged, sparing=True)))
    world.run_until(lambda: not tired.serving, 30)
    world.run(8)
    checkers.at_rest(world)
    world.crash(next(device for device in world.up() if device is not tired))
    world.run_until(lambda: checkers.covered(world), 30)  # now nobody else has the room
    assert tired.serving
    world.feed(tired, ResourcesSampled(charged))
    world.run(14)
    checkers.at_rest(world)


def test_once_quiet_all_know_the_same_spans_and_every_device_has_a_way_through_them() -> None:
    """Each device serves its block whole; legs lead through all layers (checked at every table)."""
    world = swarm(6, [33, 33, 33, 33])
    world.run(12)
    checkers.at_rest(world)
    table = world.device(0).table
    assert table is not None
    spanned = {layer for span in table.spans for layer in range(span.first, span.stop)}
    assert spanned == set(range(SMALL.layers))
    for device in world.up():
        assert device.table is not None
        assert any(span.node == device.id for span in device.table.spans), "closed: all know it"
        assert len(device.table.legs) <= len(world.up()) + 1, "few hops"
        assert any(leg.node != device.id for leg in device.table.legs)


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_where_a_hop_is_dear_each_device_runs_its_layers_in_one_go(seed: int, count: int) -> None:
    """Each has room for its share and a layer more, whose KV caches would not fit too."""
    layer_bytes = SMALL.experts * SMALL.lot_bytes
    demand = replace(SMALL, kv_bytes_per_token=12 * layer_bytes // 6 // 2048)
    room_bytes = (12 // count + 1) * layer_bytes
    world = World(seed, [Spec(demand.trunk_bytes + room_bytes, FAST)] * count, demand)
    world.start_all()
    world.run(8)
    measure_links(world, None, 0, others_us=20_000)
    world.run(40)
    checkers.at_rest(world)
    assert torn(world) == []
    for device in world.up():
        assert device.table is not None
        assert len(device.table.legs) == count, f"{device.table.legs}"


def test_nobody_serves_spans_with_a_shorter_context_than_somebody_who_may_ask() -> None:
    world = swarm(6, [33, 33, 33, 33], config=NodeConfig(context_tokens=4096))
    world.run(12)
    assert len(spanning(world)) == 4, "all alike"
    long = world.device(2)
    world.crash(long)
    world.run(8)
    world.start(long)
    assert long.node is not None
    long.node.perception.tell(context_tokens=8192)
    world.run(20)
    checkers.at_rest(world)
    assert spanning(world) <= {long.id}, "the longest requests are its own"
    assert all(leg.node == d.id for d in world.up() if d is long for leg in d.table.legs)


def spanning(world: World) -> set[str]:
    """Who announces spans, and no table disagrees."""
    tables = [device.table for device in world.up() if device.table is not None]
    (found,) = {frozenset(span.node for span in table.spans) for table in tables}
    return set(found)


def test_slow_devices_on_a_fast_network_share_each_layer() -> None:
    world = swarm(7, [49, 49, 49, 49], [700] * 4)
    world.run(12)
    assert torn(world) == [], "nobody knows yet how fast the network is"
    checkers.unbroken(world)
    measure_links(world, None, 0)
    world.run(30)
    checkers.at_rest(world)
    owners: dict[int, set[str]] = {}
    for device in world.up():
        assert device.node is not None
        for claim in device.node.perception.me.claims:
            if claim.copy == 0:
                owners.setdefault(claim.lot.layer, set()).add(device.id)
    assert sum(len(found) > 1 for found in owners.values()) > SMALL.layers // 2


@pytest.mark.parametrize("seed", range(3))
def test_a_device_that_dies_is_in_nobodys_way_any_more(seed: int) -> None:
    world = swarm(seed, [49, 49, 49, 49])
    world.run(10)
    lost = world.device(1)
    world.crash(lost)
    world.run(10)
    checkers.at_rest(world)
    for device in world.up():
        assert device.table is not None
        assert all(leg.node != lost.id for leg in (*device.table.legs, *device.table.spans))


def test_without_spans_layers_are_whole_and_nobody_announces_any() -> None:
    specs = [Spec(MODEL.trunk_bytes + 49 * MODEL.lot_bytes, 700) for _ in range(4)]
    world = World(7, specs, SMALL, NodeConfig(spans=False))
    checkers.watch(world)
    world.start_all()
    world.run(12)
    checkers.at_rest(world)
    assert torn(world) == []
    assert all(not d.table.legs and not d.table.spans for d in world.up() if d.table is not None)


@pytest.mark.parametrize("rooms", [[7000], [5000, 3000]])
def test_a_device_with_room_for_thousands_of_lots_takes_them_all(rooms: list[int]) -> None:
    """48 layers of 128 experts."""
    demand = replace(MODEL, layers=48, experts=128, top_k=8)
    specs = [Spec(demand.trunk_bytes + room * demand.lot_bytes, FAST) for room in rooms]
    world = World(1, specs, demand)
    world.start_all()
    world.run(30)
    for device in world.up():
        assert (len(device.table.owners), device.table.missing_bytes) == (6144, 0)
