"""Measuring the kernels: it ends in time, says what is true of any machine, and is remembered."""

import json
import time
from pathlib import Path

import pytest

from coeld.engine import calibrate
from coeld.engine.kernels import KINDS, Kernels, Timing
from coeld.errors import FrameError


def kernels(us: int = 1000) -> Kernels:
    return Kernels({kind: (Timing(1, us, 9_000_000, 9_000_000),) for kind in KINDS}, 1800)


def test_every_kernel_runs_with_every_number_of_rows_and_travels_as_json() -> None:
    found = calibrate.measure(limit_s=60)
    assert {kind: [t.rows for t in runs] for kind, runs in found.timings.items()} == {
        kind: [1, 8, 64] for kind in KINDS
    }
    for routed in (False, True):
        decode, rows = found.speeds(routed)
        assert 0 < decode <= rows
    assert Kernels.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_when_time_is_over_only_what_bids_need_is_measured() -> None:
    began = time.monotonic()
    found = calibrate.measure(limit_s=0)
    assert time.monotonic() - began < 10
    sizes = {kind: len(runs) for kind, runs in found.timings.items()}
    assert sizes == {"dense": 1, "experts": 1, "attention": 0}
    assert Kernels.from_json(found.to_json()) == found


def test_what_a_quota_grants_at_once_is_not_told_as_what_it_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(_turn: int) -> None:
        until_s = time.process_time() + 0.002
        while time.process_time() < until_s:
            pass

    monkeypatch.setattr(calibrate, "cpu_cores", lambda: 0.1)
    assert calibrate._best_us(run) >= 20_000


def test_a_measurement_is_remembered_for_the_same_machine_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = iter([1000, 2000, 3000])
    monkeypatch.setattr(calibrate, "measure", lambda clock_mhz: kernels(next(runs)))
    monkeypatch.setattr(calibrate.os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    cache = tmp_path / "calibration.json"
    first = calibrate.calibrate(cache, threads=2)
    again = calibrate.calibrate(cache, threads=2)
    assert (first.remembered, again.remembered) == (False, True)
    assert again.timings == first.timings
    assert calibrate.calibrate(cache, threads=3).timings == kernels(2000).timings
    cache.write_text(cache.read_text().replace('"threads": 3', '"threads": 3, "more": 1'))
    assert calibrate.calibrate(cache, threads=3).timings == kernels(3000).timings
    assert list(tmp_path.iterdir()) == [cache]


def test_a_busy_machine_and_a_disk_that_cannot_be_written_are_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "measure", lambda clock_mhz: kernels())
    monkeypatch.setattr(calibrate.os, "getloadavg", lambda: (999.0, 0.0, 0.0))
    assert not calibrate.calibrate(tmp_path / "c.json", 2).remembered
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(calibrate.os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    assert not calibrate.calibrate(tmp_path / "missing" / "c.json", 2).remembered


WHOLE = kernels().to_json()


@pytest.mark.parametrize(
    "damaged",
    [
        None,
        [],
        {},
        WHOLE | {"runs": {}},
        WHOLE | {"runs": {kind: [[1, 0, 1, 1]] for kind in KINDS}},
        WHOLE | {"runs": {kind: [[1, 1, 1]] for kind in KINDS}},
        WHOLE | {"runs": {kind: [[2, 1, 1, 1]] for kind in KINDS}},
        WHOLE | {"runs": {kind: [[True, 1, 1, 1]] for kind in KINDS}},
        WHOLE | {"runs": dict.fromkeys(KINDS, 7)},
        WHOLE | {"clock_mhz": 1.5},
        WHOLE | {"cut_us": -1},
    ],
)
def test_damaged_measurements_are_refused_and_measured_anew(
    damaged: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FrameError):
        Kernels.from_json(damaged)
    monkeypatch.setattr(calibrate, "measure", lambda clock_mhz: kernels())
    monkeypatch.setattr(calibrate.os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    cache = tmp_path / "c.json"
    calibrate.calibrate(cache, 2)
    text = json.loads(cache.read_text())
    cache.write_text(json.dumps(text | {"value": damaged}))
    assert not calibrate.calibrate(cache, 2).remembered
