"""The auction's outcome against the exact optimum and other placements, on a few instances.

`scripts/market` does the same on hundreds; the figures are in docs/benchmarks.md.
"""

from statistics import mean

import market
import pytest
from market_baselines import BASELINES

SEEDS = [seed for seed in range(60) if len(market.instance(seed).devices) <= 5][:20]


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return [market.measure(seed, 10) for seed in SEEDS]


def test_the_outcome_is_close_to_the_optimum(rows) -> None:
    assert mean(row["saving"] for row in rows) >= 0.95
    assert min(row["saving"] for row in rows) >= 0.85
    assert mean(row["latency"] for row in rows) >= 0.97
    assert min(row["latency"] for row in rows) >= 0.85
    assert max(row["latency"] for row in rows) <= 1.0001, "nothing is better than the optimum"


@pytest.mark.parametrize("name", BASELINES)
def test_no_other_placement_is_faster(rows, name) -> None:
    assert all(row["ahead"][name] for row in rows)


def test_the_auction_settles_in_few_rounds_whatever_the_order_of_messages(rows) -> None:
    assert max(row["rounds"] for row in rows) <= 12
    for seed in SEEDS[:3]:
        facts = market.instance(seed)
        outcomes = [market.auction(facts, order)[0] for order in range(3)]
        assert outcomes[0] == outcomes[1] == outcomes[2]
