"""What channels carry: the weights of rounding errors."""

import numpy as np
import pytest

from coeld.compression.smooth import PRIOR_ROWS, carried


@pytest.mark.parametrize("seed", range(5))
def test_channels_carry_their_mean_square_to_a_quarter_octave(seed: int) -> None:
    rows = np.random.default_rng(seed).standard_normal((40, 64)) * np.exp(np.arange(64) / 16)
    squares = np.square(rows)
    wanted = (squares.sum(axis=0) + PRIOR_ROWS * squares.mean()) / (40 + PRIOR_ROWS)
    assert np.abs(np.log2(carried(rows) / wanted)).max() <= 0.126


def test_few_rows_are_believed_little_and_none_not_at_all() -> None:
    one = np.zeros((1, 8))
    one[0, 0] = 10
    assert carried(one).max() / carried(one).min() < 10
    assert (carried(np.zeros((0, 8))) == carried(np.zeros((0, 8)))[0]).all()


def test_last_bits_of_the_measurement_do_not_change_it() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((50, 4096))
    nudged = rows * (1 + rng.choice([-1, 1], rows.shape) * 1e-14)
    assert np.array_equal(carried(rows), carried(nudged))
