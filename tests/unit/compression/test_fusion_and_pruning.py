"""Fusion and pruning: budgets are kept, order does not matter, slow versions agree."""

import itertools

import numpy as np
import pytest

from coeld.compression.fusion import fuse, unfuse
from coeld.compression.pruning import error_of, kept, shares


def gates(seed: int, rows: int = 12, experts: int = 8) -> np.ndarray:
    logits = 2 * np.random.default_rng(seed).standard_normal((rows, experts))
    e = np.exp(logits)
    return (e / e.sum(axis=1, keepdims=True)).astype(np.float32)


def clusters(seed: int, rows: int = 40, hidden: int = 24) -> np.ndarray:
    """Rows around few centres, some exactly equal."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((6, hidden))
    noise = rng.standard_normal((rows, hidden)) * rng.choice([0, 0.03, 0.2], (rows, 1))
    return (centres[rng.integers(6, size=rows)] + noise).astype(np.float32)


@pytest.mark.parametrize("seed", range(30))
def test_weights_keep_the_denominator_of_all_that_were_considered(seed: int) -> None:
    g = gates(seed)
    weights = shares(g, 3)
    for row, found in zip(g, weights, strict=True):
        ordered = sorted(row.tolist(), reverse=True)
        assert found.tolist() == pytest.approx([w / sum(ordered) for w in ordered[:3]], rel=1e-5)
    assert (weights.sum(axis=1) <= 1 + 1e-6).all()


@pytest.mark.parametrize("seed", range(30))
def test_pruning_drops_as_much_as_the_budget_allows_and_no_more(seed: int) -> None:
    """Against every subset."""
    weights = shares(gates(seed, rows=4, experts=6), 6)
    error = float(np.random.default_rng(seed).uniform(0, 0.6))
    keep = kept(weights, error)
    for w, k in zip(weights.astype(np.float64), keep, strict=True):
        allowed = error**2 * (w**2).sum()
        assert (w[~k] ** 2).sum() <= allowed * (1 + 1e-9)
        most = max(
            len(places)
            for size in range(6)
            for places in itertools.combinations(range(6), size)
            if (w[list(places)] ** 2).sum() <= allowed
        )
        assert (~k).sum() == most
        assert k[np.argmax(w)]
    assert error_of(weights, keep) <= error + 1e-9


@pytest.mark.parametrize("seed", range(20))
def test_pruning_does_not_depend_on_the_order_of_experts(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = np.round(gates(seed), 1) + np.float32(0.05)  # many ties
    order = rng.permutation(weights.shape[1])
    assert np.array_equal(kept(weights, 0.4)[:, order], kept(weights[:, order], 0.4))


def test_without_a_budget_nothing_is_dropped() -> None:
    weights = shares(gates(1), 8)
    assert kept(weights, 0.0).all()
    assert error_of(weights, kept(weights, 0.0)) == 0


@pytest.mark.parametrize("seed", range(30))
def test_every_row_is_near_its_leader(seed: int) -> None:
    x = clusters(seed)
    error = (0.0, 0.05, 0.3)[seed % 3]
    fused = fuse(x, error)
    leaders = x[fused.leaders][fused.group]
    distance = np.linalg.norm(x - leaders, axis=1) / np.linalg.norm(x, axis=1)
    assert distance.max() <= error + 1e-3
    assert fused.error == pytest.approx(np.sqrt((distance**2).mean()), abs=1e-3)
    assert np.array_equal(fused.group[fused.leaders], np.arange(len(fused.leaders)))


@pytest.mark.parametrize("seed", range(30))
def test_leaders_are_those_of_the_slow_greedy_whatever_the_order(seed: int) -> None:
    x = clusters(seed)
    order = np.random.default_rng(seed + 100).permutation(len(x))
    here, there = fuse(x, 0.3), fuse(x[order], 0.3)
    chosen = {x[i].tobytes() for i in here.leaders}
    assert chosen == {x[order][i].tobytes() for i in there.leaders}
    assert len(here.leaders) == len(there.leaders)
    length = np.linalg.norm(x, axis=1)
    near = np.linalg.norm(x[:, None] - x[None], axis=2) <= 0.3 * length[:, None]
    open_, leaders = set(range(len(x))), 0
    while open_:
        best = max(open_, key=lambda j: sum(near[i, j] for i in open_))
        open_ -= {i for i in open_ if near[i, best]}
        leaders += 1
    assert abs(leaders - len(here.leaders)) <= 1  # ties may be broken otherwise


@pytest.mark.parametrize("seed", range(20))
def test_unfused_results_are_exact_for_leaders_and_better_than_copies_for_the_rest(seed) -> None:
    x = clusters(seed)
    fused = fuse(x, 0.3)
    # A linear block that is near a multiple of its input, as far as the slope can know.
    rng = np.random.default_rng(seed)
    matrix = 0.7 * np.eye(24) + 0.02 * rng.standard_normal((24, 24))
    y = (x @ matrix).astype(np.float32)
    found = unfuse(fused, x, y[fused.leaders])
    assert np.array_equal(found[fused.leaders], y[fused.leaders])
    copied = y[fused.leaders][fused.group]
    assert np.linalg.norm(found - y) <= np.linalg.norm(copied - y) + 1e-6


def test_equal_rows_are_fused_without_error_and_single_rows_are_left_alone() -> None:
    x = np.ones((5, 8), np.float32)
    fused = fuse(x, 0.0)
    assert len(fused.leaders) == 1
    assert fused.error == 0
    alone = fuse(x[:1], 0.5)
    assert (alone.leaders.tolist(), alone.group.tolist()) == ([0], [0])
    y = np.full((1, 8), 3, np.float32)
    assert np.array_equal(unfuse(fused, x, y), np.repeat(y, 5, axis=0))
