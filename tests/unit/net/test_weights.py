"""What an agent fetches and when: orders of the node first, a model for who has none, the rest."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from coeld.events import Event, LoadFailed
from coeld.ids import Lot, ModelHash, NodeId
from coeld.model.store import Store
from coeld.net import blobs, weights
from coeld.net.weights import DiskBudget, Weights
from coeld.releases import Release
from coeld.update.disk import Wanted
from coeld.view import ModelDemand
from tests.unit.net.test_blobs import complete, holding

ME = NodeId("a" * 16)
LOTS = (Lot(0, 0), Lot(2, 1))


@pytest.fixture(autouse=True)
def impatient(monkeypatch) -> None:
    monkeypatch.setattr(blobs, "PAUSE_S", 0.001)
    monkeypatch.setattr(weights, "LOOK_S", 0.02)


class Device:
    """A Weights over a store of its own, with what it tells engine and node."""

    def __init__(
        self, root: Path, wanted: str = "", spare_bytes: int = 1 << 60, disk_bytes: int = 0
    ) -> None:
        self.store = Store(root)
        self.holders: list[tuple[ModelHash, str, int]] = []
        self.releases: list[tuple[Release, str, int]] = []
        self.loaded: list[tuple[Lot, ...]] = []
        self.events: list[Event] = []
        self.open: ModelDemand | None = None
        self.swarm = Wanted(frozenset(), {})
        self.weights = Weights(
            self.store,
            wanted,
            ME,
            0,
            DiskBudget(disk_bytes, spare_bytes),
            lambda: self.holders,
            lambda _name: self.releases,
            lambda: self.swarm,
            lambda lots, _narrow: self.loaded.append(tuple(lots)),
            self.events.append,
        )

    async def until(self, check: Callable[[], object]) -> None:
        """Run it until something is so."""
        task = asyncio.create_task(self.weights.run(lambda: self.open), name="weights")
        async with asyncio.timeout(20):
            while not check():  # noqa: ASYNC110  # the things that change are not ours to signal
                await asyncio.sleep(0.005)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def test_a_device_without_a_model_takes_the_swarms(tmp_path, tiny_store, tiny) -> None:
    device = Device(tmp_path)

    async def main() -> None:
        async with holding(tiny_store) as (holder, _server):
            device.holders = [(tiny.hash, holder.host, holder.port)]
            await device.until(lambda: device.store.names() == ["tiny"])

    asyncio.run(main())
    assert device.store.manifest("tiny").hash == tiny.hash
    assert all(device.store.has(ref) for ref in tiny.trunk_blobs() + tiny.text_blobs())
    assert not device.store.has(tiny.experts[0][0])


def test_a_device_that_is_to_serve_another_model_takes_none(tmp_path, tiny_store, tiny) -> None:
    device = Device(tmp_path, wanted="another")

    async def main() -> None:
        async with holding(tiny_store) as (holder, server):
            device.holders = [(tiny.hash, holder.host, holder.port)]
            await device.until(lambda: device.weights._other_names)
            assert server.sent_bytes == 0

    asyncio.run(main())
    assert device.store.names() == []


def with_trunk(device: Device, store: Store, model) -> None:
    """As after the model was found."""
    with device.store.lock():
        for ref in model.trunk_blobs() + model.text_blobs():
            device.store.put(store.blob_path(ref).read_bytes())
        device.store.save(model, model.trunk_blobs())
    device.open = model.demand()


def test_lots_that_were_won_are_fetched_before_they_are_loaded(tmp_path, tiny_store, tiny) -> None:
    device = Device(tmp_path)
    with_trunk(device, tiny_store, tiny)

    async def main() -> None:
        async with holding(tiny_store) as (holder, _server):
            device.holders = [(tiny.hash, holder.host, holder.port)]
            device.weights.load(tiny.demand(), LOTS)
            assert device.loaded == []
            await device.until(lambda: device.loaded)
            device.weights.load(tiny.demand(), LOTS[:1])  # it is here now: at once

    asyncio.run(main())
    assert device.loaded == [LOTS, LOTS[:1]]
    assert all(device.store.has(tiny.experts[lot.layer][lot.expert]) for lot in LOTS)
    assert not device.store.has(tiny.experts[1][0])  # no room was to spare


def test_what_a_model_cannot_be_opened_without_is_fetched_again(tmp_path, tiny_store, tiny) -> None:
    device = Device(tmp_path)
    with_trunk(device, tiny_store, tiny)
    device.open = None  # for the engine found a damaged blob, and removed it
    device.store.delete([tiny.trunk[1].sha256])

    async def main() -> None:
        async with holding(tiny_store) as (holder, _server):
            device.holders = [(tiny.hash, holder.host, holder.port)]
            await device.until(lambda: device.store.has(tiny.trunk[1]))

    asyncio.run(main())
    device.store.verify(tiny.trunk_blobs())


def test_a_copy_that_was_damaged_and_removed_follows_again(
    tmp_path, tiny_store, tiny, monkeypatch
) -> None:
    monkeypatch.setattr(weights, "COLLECT_S", 0.02)
    device, lost = Device(tmp_path, spare_bytes=0), tiny.experts[1][5]
    with_trunk(device, tiny_store, tiny)

    async def main() -> None:
        async with holding(tiny_store) as (holder, _server):
            device.holders = [(tiny.hash, holder.host, holder.port)]
            await device.until(lambda: all(map(device.store.has, tiny.blobs())))
            device.store.delete([lost.sha256])
            await device.until(lambda: device.store.has(lost))

    asyncio.run(main())


def test_lots_that_nobody_has_have_failed(tmp_path, tiny_store, tiny) -> None:
    device = Device(tmp_path)
    with_trunk(device, tiny_store, tiny)
    device.weights.load(tiny.demand(), LOTS)
    asyncio.run(device.until(lambda: device.events))
    (event,) = device.events
    assert isinstance(event, LoadFailed)
    assert event.lots == LOTS
    assert "no device is known" in event.why
    assert "coeld model add" in event.why
    assert device.loaded == []
    device.weights.load(replace(tiny.demand(), name="gone"), LOTS)
    assert isinstance(device.events[-1], LoadFailed)


def test_orders_of_an_engine_that_has_gone_are_forgotten(tmp_path, tiny_store, tiny) -> None:
    device = Device(tmp_path)
    with_trunk(device, tiny_store, tiny)
    device.weights.load(tiny.demand(), LOTS)
    device.weights.forget()

    async def main() -> None:
        async with holding(tiny_store) as (holder, _server):
            device.holders = [(tiny.hash, holder.host, holder.port)]
            device.weights.load(tiny.demand(), LOTS[1:])
            await device.until(lambda: device.loaded)

    asyncio.run(main())
    assert device.loaded == [LOTS[1:]]
    assert device.events == []


def test_with_room_to_spare_everything_follows(tmp_path, tiny_store, tiny) -> None:
    device = Device(tmp_path, spare_bytes=0)
    with_trunk(device, tiny_store, tiny)

    async def main() -> None:
        async with holding(tiny_store) as (holder, server):
            device.holders = [(tiny.hash, holder.host, holder.port)]
            await device.until(lambda: all(device.store.has(ref) for ref in tiny.blobs()))
            assert device.weights.fetched_bytes == server.sent_bytes

    asyncio.run(main())
    assert complete(device.store, tiny)
    assert device.weights.status()["missing_blobs"] == 0


def expert_bytes(model) -> int:
    return sum({ref.sha256: ref.bytes for layer in model.experts for ref in layer}.values())


def test_a_store_beyond_its_budget_lets_copies_go_and_keeps_what_is_needed(
    tmp_path, tiny_store, tiny
) -> None:
    sizes = sum(ref.bytes for ref in tiny.blobs())
    device = Device(tmp_path, disk_bytes=sizes - expert_bytes(tiny) // 2)
    with device.store.lock():
        for ref in tiny.blobs():
            device.store.put(tiny_store.blob_path(ref).read_bytes())
        device.store.save(tiny)
    device.open = tiny.demand()
    lots = tiny.demand().lots()
    kept, alone = set(lots[:8]), set(lots[8:12])
    served = {lot: 1 + lot.expert % 2 for lot in lots if lot not in alone}
    device.swarm = Wanted(frozenset(kept), served)
    asyncio.run(device.until(lambda: device.weights.deleted_bytes))
    gone = {lot for lot in lots if not device.store.has(tiny.experts[lot.layer][lot.expert])}
    assert gone
    assert not gone & (kept | alone)
    assert device.store.used_bytes() <= sizes - expert_bytes(tiny) // 2
    twice = {lot for lot in served if served[lot] == 2 and lot not in kept}
    assert twice <= gone or gone <= twice
    assert device.weights.status()["missing_blobs"] == len(gone)
    assert all(device.store.has(ref) for ref in tiny.trunk_blobs() + tiny.text_blobs())


def test_room_for_what_was_won_is_made_of_copies_or_the_load_fails(
    tmp_path, tiny_store, tiny
) -> None:
    needed = sum(ref.bytes for ref in tiny.trunk_blobs() + tiny.text_blobs())
    layer = sum(ref.bytes for ref in tiny.experts[0])
    device = Device(tmp_path, disk_bytes=needed + layer + 1000)
    with_trunk(device, tiny_store, tiny)
    lots = tiny.demand().lots()
    first, second = tuple(lots[:8]), tuple(lots[8:16])
    device.swarm = Wanted(frozenset(second), dict.fromkeys(first, 1))

    async def main() -> None:
        async with holding(tiny_store) as (holder, _server):
            device.holders = [(tiny.hash, holder.host, holder.port)]
            for order in (first, second):
                device.weights.load(tiny.demand(), order)
                await device.until(lambda order=order: order in device.loaded)
            device.swarm = Wanted(frozenset(second), {})
            device.weights.load(tiny.demand(), first)
            await device.until(lambda: device.events)

    asyncio.run(main())
    assert device.loaded == [first, second]
    assert device.store.used_bytes() <= needed + layer + 1000
    (event,) = device.events
    assert isinstance(event, LoadFailed)
    assert "device.disk_mb" in event.why


def test_what_only_one_other_device_serves_is_copied_first_and_the_budget_is_kept(
    tmp_path, tiny_store, tiny
) -> None:
    needed = sum(ref.bytes for ref in tiny.trunk_blobs() + tiny.text_blobs())
    layer = sum(ref.bytes for ref in tiny.experts[0])
    device = Device(tmp_path, spare_bytes=0, disk_bytes=needed + layer + 1000)
    with_trunk(device, tiny_store, tiny)
    lots = tiny.demand().lots()
    device.swarm = Wanted(frozenset(), {lot: 1 if lot.layer == 1 else 2 for lot in lots})

    async def main() -> None:
        async with holding(tiny_store) as (holder, _server):
            device.holders = [(tiny.hash, holder.host, holder.port)]
            await device.until(lambda: all(device.store.has(ref) for ref in tiny.experts[1]))

    asyncio.run(main())
    here = [lot for lot in lots if device.store.has(tiny.experts[lot.layer][lot.expert])]
    assert {lot.layer for lot in here} == {1}
    assert device.weights.deleted_bytes == 0
