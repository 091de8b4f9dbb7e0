"""What a cut costs is measured with the real data path, at both of its ends."""

import pytest

from coeld.engine import cut_work


def test_both_ends_are_measured_and_a_quota_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    worked_s: list[float] = []
    measured_s = cut_work._measured_s

    def noted_s() -> float:
        worked_s.append(measured_s())
        return worked_s[-1]

    monkeypatch.setattr(cut_work, "_measured_s", noted_s)
    monkeypatch.setattr(cut_work, "cpu_cores", lambda: 0.0)
    free_us = cut_work.cut_us()
    assert free_us == round(worked_s[0] * 1e6) > 20  # two system calls at each end alone take that
    monkeypatch.setattr(cut_work, "cpu_cores", lambda: 0.25)
    assert cut_work.cut_us() == round(worked_s[1] * 4e6)
    monkeypatch.setattr(cut_work, "cpu_cores", lambda: 4.0)
    assert cut_work.cut_us() == round(worked_s[2] * 1e6)


def test_without_loopback_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(cut_work, "PeerServer", refused)
    assert cut_work.cut_us() == 0
