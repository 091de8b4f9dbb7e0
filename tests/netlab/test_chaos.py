"""Some of scripts/chaos: a swarm of real devices with a tiny model lives through random faults."""

from pathlib import Path

import chaos
import demo
import pytest

from coeld.model.store import Store
from tests.harness.importing import import_file
from tests.netlab import missing
from tests.reference.tiny_gguf import write_tiny_llama

REASON = missing()
pytestmark = [pytest.mark.skipif(REASON is not None, reason=REASON or ""), pytest.mark.swarm]
SEEDS = range(20)
PACE = 0.3
HASTE = "heartbeat_ms = 200\nsilence_ms = 1000\nsuspicion_ms = 300"
"""Disasters are shorter here, so devices are less patient as well."""


def test_random_faults_lose_no_answer_change_no_token_and_leave_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "store")
    path = write_tiny_llama(tmp_path / "tiny.gguf", layers=12, hidden=128, width=2048, context=1024)
    import_file(store, path, "tiny")
    monkeypatch.setenv("COELD_STORE", str(store.root))
    monkeypatch.setattr(demo, "ORGANISE_S_MAX", 60.0)
    outcomes = chaos.torment(tmp_path, SEEDS, "tiny", 3, tokens=60, pace=PACE, swarm=HASTE)
    assert {seed: outcome.broken for seed, outcome in outcomes} == {seed: [] for seed in SEEDS}
    assert sum(outcome.answers for _seed, outcome in outcomes) > 5 * len(SEEDS)
