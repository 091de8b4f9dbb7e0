"""How popular experts are, as all devices tell of it: the same integers everywhere."""

from dataclasses import replace
from random import Random

import pytest

from coeld.asked import LEVELS, Asked, Rates
from coeld.deployment.cost import PPM
from coeld.deployment.popularity import STRANGER, observed
from coeld.ids import ModelHash, NodeId
from coeld.messages import Record
from coeld.view import ModelDemand

DEMAND = ModelDemand(ModelHash("5e" * 32), "m", 2, 8, 1000, 0, top_k=2, hidden=64)
EVENLY = (2 * PPM // 8,) * 8


def record(number: int, *rows: list[int], tokens: int = 0) -> Record:
    asked = Asked(Rates(0, 0, tokens), tuple(map(bytes, rows)))
    return Record(NodeId(f"{number:016x}"), 1, 1, asked=asked)


def test_without_news_everything_is_as_the_manifest_says() -> None:
    assert observed(DEMAND, [record(1), record(2, tokens=10**6)]) is DEMAND
    dense = replace(DEMAND, top_k=0)
    assert observed(dense, [record(1, [7] + [0] * 7)]) is dense, "all are used, whatever is told"


def test_levels_are_factors_of_two_and_layers_of_which_nothing_is_known_are_even() -> None:
    first, second = observed(DEMAND, [record(1, [], [5, 5, 4, 4, 4, 4, 3, 3])]).popularity
    assert first == EVENLY
    assert second[0] == second[1] == 2 * second[2]
    assert second[2] == second[5] == pytest.approx(2 * second[6], abs=1)
    assert 2 * PPM - 8 <= sum(second) <= 2 * PPM


def test_what_a_calibration_told_counts_for_layers_that_nobody_tells_of() -> None:
    hot, cold = bytes([6, 5, 4, 4, 4, 4, 3, 3]), bytes([2] + [4] * 7)
    calibrated = replace(DEMAND, prior=(hot, cold))
    before = observed(calibrated, [record(1), record(2)]).popularity
    assert before == observed(DEMAND, [record(1, list(hot), list(cold))]).popularity
    told = list(bytes([4] * 7 + [7]))
    after = observed(calibrated, [record(1), record(2, [], told)]).popularity
    assert after[0] == before[0]
    assert after[1] == observed(DEMAND, [record(2, [], told)]).popularity[1]
    partly = replace(DEMAND, prior=(hot, b""))
    assert observed(partly, []).popularity == (before[0], EVENLY)
    assert observed(replace(DEMAND, prior=(b"", b"")), []).popularity == ()


def test_no_expert_is_used_more_than_always() -> None:
    ((row, _),) = [observed(DEMAND, [record(1, [7, 7, 7, 0, 0, 0, 0, 0])]).popularity]
    assert max(row) < PPM
    ((row, _),) = [observed(DEMAND, [record(1, [7, 1, 0, 0, 0, 0, 0, 0])]).popularity]
    assert row[0] == PPM
    assert 2 * PPM - 8 <= sum(row) <= 2 * PPM
    assert row[1] == pytest.approx(2 * row[2], abs=1)


def test_devices_count_as_much_as_they_are_asked_for() -> None:
    hot, cold = [6, 2, 4, 4, 4, 4, 4, 4], [2, 6, 4, 4, 4, 4, 4, 4]
    same = observed(DEMAND, [record(1, hot, hot), record(2, cold, cold)]).popularity[0]
    assert same[0] == same[1]
    busy = record(1, hot, hot, tokens=4 * STRANGER)
    found = observed(DEMAND, [busy, record(2, cold, cold)]).popularity[0]
    alone = [observed(DEMAND, [r]).popularity[0] for r in (busy, record(2, cold, cold))]
    assert found[0] == (5 * alone[0][0] + alone[1][0]) // 6
    assert found[0] > found[1]


def test_what_does_not_fit_the_model_is_ignored() -> None:
    wrong = record(1, [7] * 4, [7, 0, 0, 0], [7] * 4)
    right = record(2, [], [5, 5, 4, 4, 4, 4, 3, 3])
    assert observed(DEMAND, [wrong, right]).popularity == observed(DEMAND, [right]).popularity


@pytest.mark.parametrize("seed", range(20))
def test_the_order_of_news_does_not_matter_and_probabilities_are_some(seed: int) -> None:
    rng = Random(seed)
    records = [
        record(i, *([rng.randrange(LEVELS) for _ in range(8)] for _ in range(2)),
               tokens=rng.randrange(10**6))
        for i in range(4)
    ]  # fmt: skip
    found = observed(DEMAND, records).popularity
    assert observed(DEMAND, rng.sample(records, 4)).popularity == found
    for row in found:
        assert all(0 <= uses <= PPM for uses in row)
        assert 2 * PPM - 16 <= sum(row) <= 2 * PPM
