"""Three real daemons, each on a device of its own, on a wired network that is cut and heals."""

import time

import demo
import pytest

from coeld.model.store import Store
from tests.faults.test_swarm import answer, poll
from tests.harness.lab_swarm import swarm_in_lab
from tests.netlab import missing

REASON = missing()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=REASON or ""),
    pytest.mark.model,
    pytest.mark.swarm,
]
TOKENS = 40


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


def test_a_disk_with_a_budget_keeps_to_it_and_no_answer_suffers(tmp_path, store) -> None:
    budget = 110  # of 147 MB; what a device needs itself is about 105
    with swarm_in_lab(tmp_path, [demo.budget_mb(3)] * 3, "lan") as devices:
        small = devices[2]
        small.kill()
        path = small.folder / "agent.toml"
        own = path.read_text().replace(str(store.root), f"{small.folder}/store")
        path.write_text(own.replace("[network]", "[network]\nblob_mb_per_s = 0"))
        small.start()
        demo.wait_settled(devices, 3, time.monotonic())
        undisturbed = answer(devices[0], tokens=TOKENS)[0]
        poll(lambda: (s := small.status()) and s["weights"]["missing_blobs"] == 0)
        blobs = Store(small.folder / "store")
        assert blobs.used_bytes() > budget * 1e6  # a copy of everything, while it may

        small.kill()
        path.write_text(path.read_text().replace("[device]", f"[device]\ndisk_mb = {budget}"))
        small.start()
        demo.wait_settled(devices, 3, time.monotonic())
        poll(lambda: blobs.used_bytes() <= budget * 1e6)
        status = small.status()
        assert status is not None
        assert status["weights"]["deleted_bytes"] > 0
        devices[1].kill()  # what it takes over has to be fetched, and room to be made
        demo.wait_settled([devices[0], small], 2, time.monotonic())
        assert answer(small, tokens=TOKENS)[0] == undisturbed
        assert blobs.used_bytes() <= budget * 1e6
