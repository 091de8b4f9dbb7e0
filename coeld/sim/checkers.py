"""What must hold in every simulated swarm, stated without looking into the nodes' reasoning.

`watch` checks safety at every effect: budgets, and that routes and legs name only devices which
really loaded the lots. `at_rest` checks liveness after faults have ended: all route tables equal,
everything covered if it fits, and if it does not the right number of missing bytes.
`same_knowledge` compares what everybody knows with the truth, `no_storm` what is said at rest with
what has to be said.
"""

from coeld.effects import DropLots, Effect, LoadLots, OpenModel, SwapRoutes
from coeld.ids import Lot, ModelHash, NodeId
from coeld.routes import Leg, RouteTable
from coeld.sim.device import Device
from coeld.sim.world import World

STALE_S = 32.0
"""Longest that anyone may believe in a device that is gone: silence and suspicion, times 8."""


def watch(world: World) -> None:
    """Check safety from now on; violations raise AssertionError where they happen."""
    world.watchers.append(_safety)


def _safety(world: World, device: Device, effect: Effect) -> None:
    demand = device.demand or world.demand
    if isinstance(effect, OpenModel):
        assert not device.loading | device.draining, f"{device.id} lets go of what is on the way"
    if isinstance(effect, LoadLots):
        held, lots = device.serving | device.loading | device.draining, set(effect.lots)
        here = {lot for lot in held & lots if (lot in device.narrow) == effect.narrow}
        assert not here | lots & (device.loading | device.draining | device.changing), (
            f"{device.id} loads what it holds already"
        )
        used = (
            demand.trunk_bytes + bytes_of(world, device) + len(lots) * demand.sizes[effect.narrow]
        )
        assert used <= device.spec.budget_bytes, f"{device.id} loads {used} bytes"
    if isinstance(effect, SwapRoutes):
        before = device.table
        assert before is None or effect.table.epoch >= before.epoch, "the epoch went back"
        for lot, owners in effect.table.owners.items():
            assert len(set(owners)) == len(owners)
            for owner in owners:
                other = world.devices[owner]
                there = _there(world, other, effect.table.model, lot)
                assert there, f"a route names {owner}, which has no {lot}"
                if owner == device.id:
                    assert lot in device.serving, "own route to a lot that is not in memory"
        _safe_ways(world, device, effect.table)


def unbroken(world: World) -> None:
    """From now on nobody lets go of a lot that no other device serves. For swarms without faults
    in which everything fits."""
    world.watchers.append(_kept)


def _kept(world: World, device: Device, effect: Effect) -> None:
    if isinstance(effect, DropLots):
        others = {lot for other in world.up() if other is not device for lot in other.serving}
        lost = set(effect.lots) - others
        assert not lost, f"{device.id} lets go of {len(lost)} lots that nobody else serves"


def bytes_of(world: World, device: Device) -> int:
    """The lots in a device's memory, both forms of what is changing its width."""
    held = [*device.serving, *device.loading, *device.draining]
    sizes = (device.demand or world.demand).sizes
    now = sum(sizes[lot in device.narrow] for lot in held)
    return now + sum(sizes[lot not in device.narrow] for lot in device.changing)


def _there(world: World, device: Device, model: ModelHash, lot: Lot) -> bool:
    """Is a lot of that model in a device's memory, or was it lately?"""
    opened = device.demand is not None and device.demand.model == model
    if opened and (lot in device.serving or lot in device.draining):
        return True
    return world.now - device.left_memory.get(lot, float("-inf")) < STALE_S


def _safe_ways(world: World, device: Device, table: RouteTable) -> None:
    """Legs lead through all layers, and elsewhere only to devices that serve them whole."""
    demand = world.models[table.model]
    for legs in (table.legs, table.spans):
        for node, first, stop in legs:
            other = world.devices[node]
            for lot in (lot for layer in range(first, stop) for lot in demand.lots_of(layer)):
                there = node == device.id or _there(world, other, table.model, lot)
                assert there, f"a leg leads to {node}, which has no {lot}"
    if table.legs:
        edges = [0, *(leg.stop for leg in table.legs)]
        assert [leg.first for leg in table.legs] == edges[:-1], "a way with gaps"
        assert edges[-1] == demand.layers, "a way that ends too early"
        for leg in table.legs:
            assert leg.node == device.id or _spanned(table, leg), f"nobody serves {leg} as a span"


def _spanned(table: RouteTable, leg: Leg) -> bool:
    """Does a leg begin with one span of its device and end with one, without a gap?"""
    at = leg.first
    while at < leg.stop:
        stops = [span.stop for span in table.spans if span[:2] == (leg.node, at)]
        if not stops:
            return False
        at = stops[0]
    return at == leg.stop


def same_knowledge(world: World) -> None:
    """Everybody knows everybody who is there, nobody else, and the newest record of each."""
    nodes = [device.node for device in world.up() if device.node is not None]
    truth = {
        (node.node_id, node.perception.me.incarnation, node.perception.me.seq) for node in nodes
    }
    for node in nodes:
        known = {(r.origin, r.incarnation, r.seq) for r in node.perception.present()}
        assert known == truth, f"{node.node_id} differs from the truth in {len(known ^ truth)}"
        assert not node.perception.suspects(), f"{node.node_id} suspects somebody at rest"


def no_storm(world: World, messages_per_device_s: float) -> None:
    """At rest a device sends its beats to its neighbours, and little else."""
    config = world.config
    neighbours = min(len(world.devices) - 1, config.neighbours_max)
    beats = neighbours * 1000 / config.heartbeat_ms
    assert messages_per_device_s <= 1.5 * beats, f"{messages_per_device_s:.1f} messages at rest"


def rooms(world: World) -> list[int]:
    """For how many lots there is room at each device with a running engine."""
    demand = world.demand
    return [
        max(0, device.spec.budget_bytes - demand.trunk_bytes) // demand.lot_bytes
        for device in world.up()
        if device.engine
    ]


def fits_narrow(world: World) -> bool:
    """Would the model fit in whole layers, were all of them held in fewer bits?"""
    demand, allowed = world.demand, world.config.narrow
    layer_bytes = demand.experts * demand.narrow_lot_bytes
    if not layer_bytes or not allowed:
        return False
    spare = [
        device.spec.budget_bytes - demand.trunk_bytes for device in world.up() if device.engine
    ]
    return sum(max(0, room) // layer_bytes for room in spare) >= demand.layers


def covered(world: World) -> bool:
    """Does every device that is up have a route to a living owner for every lot?"""
    lots = world.demand.lots()
    for device in world.up():
        if not device.spec.engine:
            continue
        table = device.table
        if table is None:
            return False
        for lot in lots:
            owners = [world.devices[owner] for owner in table.owners_of(lot)]
            if not any(owner.node is not None and lot in owner.serving for owner in owners):
                return False
    return True


def at_rest(world: World) -> None:
    """The swarm has had time without faults: it must agree, and be as good as it can be."""
    devices = [device for device in world.up() if device.spec.engine]
    tables = [device.table for device in devices]
    assert all(table is not None for table in tables)
    views = {
        (
            table.epoch,
            table.missing_bytes,
            tuple(sorted((lot, tuple(sorted(nodes))) for lot, nodes in table.owners.items())),
            table.spans,
            table.narrow,
        )
        for table in tables
        if table is not None
    }
    assert len(views) == 1, f"{len(views)} different route tables at rest"
    _, missing_bytes, owners, _, narrow = views.pop()
    truly = {lot.layer for device in devices for lot in device.narrow}
    assert set(narrow) == truly, f"{narrow} told to be narrow, {truly} are"
    truth: dict[Lot, list[NodeId]] = {}
    for device in devices:
        for lot in device.serving:
            truth.setdefault(lot, []).append(device.id)
    assert {lot: sorted(nodes) for lot, nodes in owners} == {
        lot: sorted(nodes) for lot, nodes in truth.items()
    }, "routes differ from what is in memory"
    total = len(world.demand.lots())
    short = 0 if fits_narrow(world) else max(0, total - sum(rooms(world)))
    assert missing_bytes == short * world.demand.lot_bytes, f"missing {missing_bytes}"
    experts = world.demand.experts  # what does not fit is held as far as layers are whole
    held = sum(room // experts * experts for room in rooms(world)) if short else total
    assert len(owners) == held, f"{len(owners)} of {total} covered, {short} do not fit"
