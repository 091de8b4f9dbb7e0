"""Three real daemons, each on a device of its own, on a wired network that is cut and heals."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import demo
import pytest
from demo import COELD, Device

from coeld.model.store import Store
from tests.faults.test_swarm import answer, poll
from tests.netlab import PROFILES, Lab, missing

REASON = missing()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=REASON or ""),
    pytest.mark.model,
    pytest.mark.swarm,
]
MQTT_PORT = 1884
TOKENS = 40


class LabDevice(Device):
    """The demo's device, moved into a lab: only its address and how it is started differ."""

    lab: Lab

    def configure_in(self, lab: Lab, budget_mb: int) -> None:
        self.lab = lab
        self.configure(MQTT_PORT, MQTT_PORT, budget_mb, threads=1)
        path = self.folder / "agent.toml"
        neighbours = [
            f"{ip}:{MQTT_PORT}" for name, ip in lab.addresses.items() if name != self.name
        ]
        lines = path.read_text().replace(
            "neighbours = []", f"neighbours = {json.dumps(neighbours)}"
        )
        host = f'[network]\nhost = "{lab.addresses[self.name]}"\nallow_unencrypted = true\n'
        path.write_text(lines.replace("[network]\n", host))

    def start(self) -> None:
        with (self.folder / "log.txt").open("ab") as log:
            argv = [COELD, "up", "--config", self.folder / "agent.toml"]
            self.process = self.lab.start(self.name, argv, stdout=log, stderr=log)


@contextmanager
def swarm_in_lab(folder: Path, budgets_mb: list[int], profile: str) -> Iterator[list[LabDevice]]:
    """Devices device-1, device-2, ... started in a lab of their own."""
    devices = [LabDevice(n, folder / f"d{n}") for n in range(1, len(budgets_mb) + 1)]
    with Lab([device.name for device in devices], PROFILES[profile]) as lab:
        for device, budget_mb in zip(devices, budgets_mb, strict=True):
            device.configure_in(lab, budget_mb)
            device.start()
        yield devices
        for device in devices:
            device.stop()


@pytest.fixture(autouse=True)
def store(real_store: Store, monkeypatch) -> Store:
    monkeypatch.setenv("COELD_STORE", str(real_store.root))
    monkeypatch.setattr(demo, "ORGANISE_S_MAX", 60.0)
    return real_store


def test_a_swarm_answers_through_a_partition_and_is_whole_again_when_it_heals(tmp_path) -> None:
    with swarm_in_lab(tmp_path, [demo.budget_mb(3)] * 3, "lan") as devices:
        demo.wait_settled(devices, 3, time.monotonic())
        lab = devices[0].lab
        undisturbed = answer(devices[0], tokens=TOKENS)[0]
        assert len(undisturbed) > 20
        lonely = max(devices[1:], key=demo.lots_served)
        others = [device for device in devices if device is not lonely]
        text, reason, silence_s = answer(
            devices[0], 10, lambda: lab.partition([d.name for d in others], [lonely.name]), TOKENS
        )
        print(f"longest silence {silence_s:.2f} s")
        assert reason in ("stop", "length")
        assert text == undisturbed
        demo.wait_settled(others, 2, time.monotonic())
        poll(lambda: not demo.covered(lonely.status()))  # alone, it cannot hold the model
        lab.heal()
        demo.wait_settled(devices, 3, time.monotonic())
        for device in devices:
            assert answer(device, tokens=TOKENS)[0] == undisturbed
