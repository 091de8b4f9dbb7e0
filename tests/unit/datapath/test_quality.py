"""What a request may lose: shared out over its transfers, never more than its budget."""

import numpy as np
import pytest

from coeld.compression.transfer import SENSITIVITY_HOP, sensitivity
from coeld.compression.wire import ERROR_MAX
from coeld.datapath.quality import EXACT, Quality, Traffic


def test_transfers_that_err_as_they_may_spend_the_budget() -> None:
    quality, layers, hops = Quality(0.02), range(3, 20), 2
    quality.begin(10, 30, len(layers), hops)
    for layer in layers:
        quality.count(layer, Traffic(1, 1, quality.errors(layer)), 10, 8, 1)
    for _ in range(hops):
        quality.count_hop(Traffic(1, 1, quality.hop_errors()), 10, 160)
    assert quality.kl_estimate == pytest.approx(0.02)
    assert quality.rows_bytes == 2 * (len(layers) + hops)
    assert quality.float32_bytes == 4 * 160 * (len(layers) + hops)


def test_a_more_sensitive_place_may_err_less() -> None:
    quality = Quality(0.02)
    quality.begin(1, 30, 30, 1)
    for layer in (0, 7, 29):
        spent = np.square(quality.errors(layer)) * sensitivity(layer, 30)
        assert spent == pytest.approx([0.02 / 62] * 2)
    assert np.square(quality.hop_errors()) * SENSITIVITY_HOP == pytest.approx([0.02 / 62] * 2)


def test_exact_requests_and_those_wholly_here_may_lose_nothing() -> None:
    for quality, cuts in ((Quality(0.0), 0), (Quality(0.02), 0)):
        assert quality.errors(0) == quality.hop_errors() == EXACT
        quality.begin(1, 30, cuts, 0)
        assert quality.errors(0) == quality.hop_errors() == EXACT


def test_a_large_budget_stays_within_what_a_frame_may_say() -> None:
    quality = Quality(1.0)
    quality.begin(1, 3, 1, 0)
    assert max(quality.errors(1)) == ERROR_MAX


@pytest.mark.parametrize("seed", range(10))
def test_pairs_that_hardly_count_are_left_out_and_the_rest_keep_their_weights(seed: int) -> None:
    rng = np.random.default_rng(seed)
    gates = np.exp(3 * rng.standard_normal((40, 8))).astype(np.float32)
    gates[rng.random(gates.shape) < 0.3] = 0  # not chosen
    quality = Quality(0.02)
    quality.begin(40, 30, 10, 0)
    out, back = quality.errors(7)
    pruned, (left_out, left_back) = quality.prune(7, gates)
    gone = pruned != gates
    assert (pruned[gone] == 0).all()
    assert 0 < quality.pruned_pairs == np.count_nonzero(gone)
    assert pruned.argmax(axis=1).tolist() == gates.argmax(axis=1).tolist()
    lost = np.sqrt(((gates - pruned) ** 2).sum(axis=1) / (gates**2).sum(axis=1).clip(1e-30))
    assert (lost <= back * 0.5 + 1e-6).all()
    made = float(np.sqrt((lost**2).mean()))
    assert (left_out, left_back) == (out, pytest.approx(np.sqrt(back**2 - made**2)))
    # Pruning and a codec that uses what is left spend the layer's part of the budget, no more.
    quality.count(7, Traffic(1, 1, (left_out, left_back)), 40, 8, 1)
    assert quality.kl_estimate == pytest.approx(2 * 0.02 / 20)


def test_weights_that_all_count_are_left_alone() -> None:
    quality, gates = Quality(0.02), np.full((3, 4), 0.25, np.float32)
    quality.begin(3, 30, 10, 0)
    same, errors = quality.prune(7, gates)
    assert same is gates
    assert (errors, quality.pruned_pairs) == (quality.errors(7), 0)
