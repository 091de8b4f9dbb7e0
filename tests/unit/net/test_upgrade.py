"""How a newer version comes onto a disk: from the own store or from others, or not at all."""

import asyncio
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from coeld.events import ReleaseFound
from coeld.ids import Lot, ModelHash
from coeld.model.store import Store
from coeld.net import blobs, upgrade, weights
from coeld.releases import Progress, Release
from coeld.update.disk import Wanted
from tests.unit.net.test_blobs import holding
from tests.unit.net.test_weights import Device

LOTS = {Lot(1, 2), Lot(2, 0)}


@pytest.fixture(autouse=True)
def impatient(monkeypatch) -> None:
    monkeypatch.setattr(blobs, "PAUSE_S", 0.001)
    monkeypatch.setattr(weights, "LOOK_S", 0.02)
    monkeypatch.setattr(upgrade, "RETRY_S", 0.02)


def device_with(store: Store, root: Path, **options: int) -> Device:
    """A device that serves some lots of the first version, which is whole on its disk."""
    first = store.versions("tiny")[0]
    device = Device(root, **options)
    with device.store.lock():
        for ref in first.blobs():
            os.link(store.blob_path(ref), device.store.blob_path(ref))
        device.store.save(first)
    device.open = first.demand()
    device.swarm = Wanted(LOTS, {})
    return device


def told(device: Device) -> list[tuple[int, Progress]]:
    found = [event for event in device.events if isinstance(event, ReleaseFound)]
    return [(event.demand.version, event.progress) for event in found]


def reaches(device: Device, progress: Progress) -> Callable[[], bool]:
    return lambda: bool(told(device)) and told(device)[-1][1] is progress


async def against(device: Device, store: Store, check: Callable[[], object]) -> None:
    """Another device has both versions, and says so."""
    async with holding(store) as (holder, _server):
        newest = store.manifest("tiny")
        device.holders = [(newest.hash, holder.host, holder.port)]
        device.releases = [(newest.release, holder.host, holder.port)]
        await device.until(check)


def test_a_newer_version_of_another_device_is_fetched_and_then_ready(
    tmp_path, two_versions
) -> None:
    device = device_with(two_versions, tmp_path / "d", spare_bytes=0)
    asyncio.run(against(device, two_versions, reaches(device, Progress.READY)))
    assert told(device) == [(2, Progress.FETCHING), (2, Progress.READY)]
    assert [manifest.version for manifest in device.store.versions("tiny")] == [1, 2]
    assert all(device.store.has(ref) for ref in device.store.manifest("tiny").blobs())


def test_where_the_disk_is_short_what_is_served_now_is_enough(tmp_path, two_versions) -> None:
    device = device_with(two_versions, tmp_path / "d")  # nothing to spare
    asyncio.run(against(device, two_versions, reaches(device, Progress.READY)))
    second = device.store.manifest("tiny")
    here = {
        Lot(layer, expert)
        for layer, experts in enumerate(second.experts)
        for expert, ref in enumerate(experts)
        if device.store.has(ref)
    }
    assert here == LOTS


def test_a_disk_that_is_too_small_is_told_and_the_old_version_stays(
    tmp_path, two_versions, caplog
) -> None:
    first = two_versions.versions("tiny")[0]
    size = sum(ref.bytes for ref in first.blobs())
    device = device_with(two_versions, tmp_path / "d", disk_bytes=size + 1000)
    asyncio.run(against(device, two_versions, reaches(device, Progress.FAILED)))
    assert told(device) == [(2, Progress.FETCHING), (2, Progress.FAILED)]
    assert "device.disk_mb" in device.weights.status()["next"]["trouble"]
    assert "stays on version 1" in caplog.text
    assert device.store.versions("tiny") == [first]


def test_a_manifest_that_nobody_hands_out_is_told_until_somebody_does(
    tmp_path, two_versions, caplog, monkeypatch
) -> None:
    monkeypatch.setattr(upgrade, "PATIENCE_S", 0.05)
    device = device_with(two_versions, tmp_path / "d", spare_bytes=0)
    second = two_versions.manifest("tiny")

    async def main() -> None:
        async with holding(two_versions) as (holder, _server):
            pass  # it has gone, and its record is still there
        device.releases = [(second.release, holder.host, holder.port)]
        await device.until(reaches(device, Progress.FAILED))
        failed = device.weights.status()["next"]
        assert (failed["version"], second.hash[:8] in failed["trouble"]) == (2, True)
        await against(device, two_versions, reaches(device, Progress.READY))

    asyncio.run(main())
    assert told(device) == [(2, Progress.FAILED), (2, Progress.READY)]
    assert caplog.text.count("stays on version 1 of tiny") == 1
    demands = [event.demand for event in device.events if isinstance(event, ReleaseFound)]
    assert {demand.model for demand in demands} == {second.hash}
    assert device.weights.status()["next"]["trouble"] == ""


def test_a_version_that_was_added_here_is_ready_at_once(tmp_path, two_versions) -> None:
    device = Device(two_versions.root)
    device.open = two_versions.versions("tiny")[0].demand()
    asyncio.run(device.until(reaches(device, Progress.READY)))
    assert device.weights.fetched_bytes == 0


def test_who_tells_of_a_version_that_it_has_not_is_not_believed(tmp_path, two_versions) -> None:
    device = device_with(two_versions, tmp_path / "d")
    second = two_versions.manifest("tiny")

    async def main() -> None:
        async with holding(two_versions) as (holder, _server):
            device.releases = [
                (Release(9, second.hash), holder.host, holder.port),
                (Release(8, ModelHash("7" * 64)), holder.host, holder.port),
            ]
            await device.until(lambda: "7777" in device.weights.status()["next"]["trouble"])

    asyncio.run(main())
    assert told(device) == []


def test_older_versions_are_removed_once_nobody_has_one_open(tmp_path, two_versions) -> None:
    first, second = two_versions.versions("tiny")
    device = Device(two_versions.root)
    device.open = second.demand()
    device.releases = [(first.release, "127.0.0.1", 1)]
    rounds = 0

    def watched() -> bool:
        nonlocal rounds
        rounds += 1
        if rounds == 20:
            assert two_versions.versions("tiny") == [first, second]
            device.releases = [(second.release, "127.0.0.1", 1)]
        return two_versions.versions("tiny") == [second]

    asyncio.run(device.until(watched))
    assert rounds >= 20
    assert told(device) == []


def test_a_model_that_is_removed_while_it_is_open_is_no_trouble(tmp_path, two_versions) -> None:
    device = Device(two_versions.root)
    device.open = replace(two_versions.manifest("tiny").demand(), name="gone")
    rounds = iter(range(10))
    asyncio.run(device.until(lambda: next(rounds, None) is None))
    assert device.weights.status()["next"]["trouble"] == ""
