"""What settling costs: real nodes in virtual time, from their start until no claim changes.

Every device runs `Node.step`; its CPU is that of its own steps, of encoding what it says and of
decoding each message it hears. Messages and bytes are all that is delivered meanwhile, signs of
life as well. Memory is scarce, so that whole layers do not fit and experts are placed one by one.
"""

import gc
import time
from random import Random
from typing import Any, Final

from coeld.events import Event
from coeld.ids import ModelHash, NodeId
from coeld.messages import Message, decode, encode
from coeld.sim.device import Device, Spec
from coeld.sim.world import World
from coeld.view import ModelDemand

PPM: Final = 1_000_000
LOT_BYTES: Final = 2_654_208
SPEEDS: Final = (10000, 10000, 10000, 10000, 6600, 15000, 4400, 10000)
SIZES: Final = (8, 8, 8, 8, 4, 12, 4, 8)
PLENTY: Final = 1.05
REST_S: Final = 1.0
LIMIT_S: Final = 60.0
SHAPES: Final = ((2, 24, 32), (4, 24, 32), (8, 24, 32), (16, 24, 32), (8, 24, 64), (8, 48, 128))
"""Devices, layers, experts per layer."""


class Metered(World):
    """A world that knows what each device's processor did."""

    def __init__(self, seed: int, specs: list[Spec], demand: ModelDemand) -> None:
        super().__init__(seed, specs, demand, codec=False)
        self.cpu_s = dict.fromkeys(self.devices, 0.0)
        self.delivered = self.delivered_bytes = 0
        self.changed_at = self.now
        self._claims: dict[NodeId, object] = {}

    def feed(self, device: Device, event: Event) -> None:
        started = time.process_time()
        super().feed(device, event)
        self.cpu_s[device.id] += time.process_time() - started
        claims = device.node.perception.me.claims if device.node else ()
        if claims != self._claims.get(device.id, ()):
            self._claims[device.id], self.changed_at = claims, self.now

    def _arrive(self, sender: NodeId, to: NodeId, message: Message, size: int) -> None:
        data = encode(message)
        started = time.process_time()
        decode(data)
        self.cpu_s[to] += time.process_time() - started
        self.delivered += 1
        self.delivered_bytes += size
        super()._arrive(sender, to, message, size)


def demand(layers: int, experts: int, used: int = 8) -> ModelDemand:
    """A model whose experts are as unevenly popular as those of real ones (log-normal, 0.7)."""
    rng, rows = Random(1), []
    for _ in range(layers):
        weights = [2.718 ** (0.7 * rng.gauss(0, 1)) for _ in range(experts)]
        rows.append(tuple(min(PPM, int(used * PPM * w / sum(weights))) for w in weights))
    return ModelDemand(
        ModelHash("5e" * 32), f"{layers} x {experts}", layers, experts, LOT_BYTES, 0,
        top_k=used, hidden=2048, popularity=tuple(rows),
    )  # fmt: skip


def settle(devices: int, layers: int, experts: int) -> dict[str, Any]:
    """One swarm from its start until its claims have rested for REST_S."""
    model = demand(layers, experts)
    sizes = [SIZES[i % len(SIZES)] for i in range(devices)]
    lots = [int(PLENTY * layers * experts * size / sum(sizes)) for size in sizes]
    specs = [
        Spec(count * LOT_BYTES, SPEEDS[i % len(SPEEDS)], disk_mb_per_s=1)
        for i, count in enumerate(lots)
    ]  # a disk so slow that nothing is loaded before claims rest
    world = Metered(1, specs, model)
    gc.collect()
    gc.disable()
    world.start_all()
    start = world.now
    while world.now - world.changed_at < REST_S or world.changed_at == start:
        assert world.now - start < LIMIT_S, "claims do not rest"
        world.run(0.05)
    gc.enable()
    claims = [d.node.perception.me.claims for d in world.up() if d.node is not None]
    owned = {claim.lot for mine in claims for claim in mine if claim.copy == 0}
    assert len(owned) == layers * experts, "not every lot has an owner"
    return {
        "devices": devices,
        "lots": layers * experts,
        "rest_s": world.changed_at - start,
        "cpu_s": max(world.cpu_s.values()),
        "messages": world.delivered,
        "bytes": world.delivered_bytes,
    }


def report() -> None:
    """All shapes, as a table."""
    print("devices    lots  at rest after  CPU per device  messages per device      KB in all")
    for shape in SHAPES:
        row = settle(*shape)
        print(
            f"{row['devices']:7} {row['lots']:7} {row['rest_s']:12.2f} s {row['cpu_s']:13.2f} s "
            f"{row['messages'] / row['devices']:20.0f} {row['bytes'] / 1e3:14.0f}",
            flush=True,
        )
