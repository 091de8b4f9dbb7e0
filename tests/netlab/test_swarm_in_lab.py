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
