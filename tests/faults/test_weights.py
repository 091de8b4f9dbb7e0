"""Only one device has the model: the others get from it what they need, and answer the same."""

import time
from pathlib import Path

import demo
import pytest
from demo import Device

from coeld.model.store import Store
from tests.conftest import REAL_MODEL
from tests.faults.test_swarm import answer, poll

pytestmark = [pytest.mark.model, pytest.mark.swarm]
TOKENS = 40


@pytest.fixture(autouse=True)
def store(real_store: Store, monkeypatch) -> Store:
    monkeypatch.setenv("COELD_STORE", str(real_store.root))
    monkeypatch.setattr(demo, "ORGANISE_S_MAX", 60.0)
    return real_store


def on_disk(device: Device) -> int:
    return sum(path.stat().st_size for path in (device.folder / "store" / "blobs").iterdir())


def test_devices_without_the_model_fetch_it_and_outlive_who_had_it(
    tmp_path: Path, store: Store
) -> None:
    devices = [Device(n, tmp_path / f"d{n}") for n in (1, 2, 3)]
    ports = demo.free_ports(3)
    size = demo.budget_mb(3)
    for device, port in zip(devices, ports, strict=True):
        device.configure(port, ports[0], size, threads=1)
        if device is not devices[0]:
            path = device.folder / "agent.toml"
            own = path.read_text().replace(str(store.root), f"{device.folder}/store")
            path.write_text(own.replace(f'name = "{REAL_MODEL}"', 'name = ""'))
        path = device.folder / "agent.toml"
        path.write_text(path.read_text().replace("[network]", "[network]\nblob_mb_per_s = 0"))
    try:
        for device in devices:
            device.start()
        demo.wait_settled(devices, 3, time.monotonic())
        undisturbed = answer(devices[1], tokens=TOKENS)[0]
        assert answer(devices[0], tokens=TOKENS)[0] == undisturbed
        whole = sum(ref.bytes for ref in store.manifest(REAL_MODEL).blobs())
        for device in devices[1:]:  # what it serves came first, the rest follows
            status = poll(
                lambda d=device: (now := d.status()["weights"])["missing_blobs"] == 0 and now
            )
            assert status["fetched_bytes"] == on_disk(device) == whole
        sent = [device.status()["weights"]["sent_bytes"] for device in devices]
        assert sum(sent) >= 2 * whole
        assert sent[0] >= whole

        devices[0].kill()  # the only one that has ever imported the model
        demo.wait_settled(devices[1:], 2, time.monotonic())
        assert answer(devices[2], tokens=TOKENS)[0] == undisturbed
    finally:
        demo.stop(devices)
