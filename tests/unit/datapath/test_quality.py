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
