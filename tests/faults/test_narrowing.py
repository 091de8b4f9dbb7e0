"""A plug is pulled and what is left is too small: the answer goes on in fewer bits, and says so."""

import time
from pathlib import Path

import demo
import pytest
from demo import Device

from coeld.model.store import Store
from tests.conftest import REAL_MODEL
from tests.faults.test_swarm import PROMPT, largest, poll

pytestmark = [pytest.mark.model, pytest.mark.swarm]
TOKENS = 120


@pytest.fixture(autouse=True)
def store(real_store: Store, monkeypatch) -> Store:
    monkeypatch.setenv("COELD_STORE", str(real_store.root))
    monkeypatch.setattr(demo, "ORGANISE_S_MAX", 60.0)
    return real_store


def narrow(device: Device) -> int:
    status = device.status()
    return status["node"]["routes"]["narrow"] if status else -1


def test_a_swarm_that_became_too_small_answers_on_in_fewer_bits_and_gets_them_back(
    tmp_path: Path, store: Store
) -> None:
    manifest = store.manifest(REAL_MODEL)
    experts = manifest.shape.layers * manifest.shape.experts
    layer_bytes = manifest.shape.experts * manifest.demand().lot_bytes
    # Three devices hold 33 layers of 30, two 22: they lack the room of 8.
    budget_mb = (manifest.trunk_bytes + int(11.2 * layer_bytes)) // 10**6 + 1
    devices = [Device(n, tmp_path / f"d{n}", narrow=True) for n in (1, 2, 3)]
    ports = demo.free_ports(3)
    for device, port in zip(devices, ports, strict=True):
        device.configure(port, ports[0], budget_mb, threads=1)
    try:
        for device in devices:
            device.start()
        demo.wait_settled(devices, 3, time.monotonic())
        victim = largest(devices)
        asker, other = (device for device in devices if device is not victim)
        pieces, reason, usage, last, silence_s = 0, "", {}, time.monotonic(), 0.0
        for chunk in demo.stream(asker.socket, PROMPT, TOKENS):
            silence_s, last = max(silence_s, time.monotonic() - last), time.monotonic()
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                reason = choice["finish_reason"] or reason
                pieces += 1
            if pieces == 15:
                assert narrow(asker) == 0
                victim.kill()
                pieces += 1
        print(f"longest silence {silence_s:.1f} s")
        assert reason in ("stop", "length")
        told = usage["x_coeld"]["narrow"]
        assert (told["of"], told["bits"]) == (experts, 4)
        assert 0 < told["experts"] <= experts
        # The answer tells the most that were; what had to be only on the way is wide again.
        left = poll(lambda: narrow(asker) == narrow(other) and narrow(asker))
        assert 0 < left <= told["experts"]
        assert poll(asker.status)["node"]["routes"]["missing_bytes"] == 0
        for device in (asker, other):  # what the engines hold is what the budget allows
            held = poll(device.status)["engine"]["stats"]["weights_bytes"]
            assert held <= budget_mb * 10**6
        print(f"{told['experts']} of {experts} experts in 4 bits")

        victim.start()
        poll(lambda: all(narrow(device) == 0 for device in devices), timeout_s=100)
        demo.wait_settled(devices, 3, time.monotonic())
    finally:
        demo.stop(devices)
