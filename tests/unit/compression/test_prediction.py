"""Rows predicted from the call before: the fit against an obvious one, and what it saves."""

import numpy as np
import pytest

from coeld.compression.bfloat16 import to_float32
from coeld.compression.prediction import Past, forecast, predict
from coeld.compression.wire import Codec, decode, encode, loudness, relative_error


def a_stream(seed: int, layers: int, rows: int = 40, hidden: int = 96):
    """Rows that enter each layer, and what the layer adds, as in a transformer: the residual
    stream grows by attention and experts; each layer reads it divided by its length and scaled."""
    rng = np.random.default_rng(seed)
    h = 3 * rng.standard_normal((rows, hidden))
    for _ in range(layers):
        h = h + 0.3 * rng.standard_normal((rows, hidden))  # attention
        norm = np.exp(rng.standard_normal(hidden))
        x = h / np.sqrt((h * h).mean(axis=1, keepdims=True)) * norm
        y = rng.standard_normal((rows, hidden))
        h = h + y
        yield x.astype(np.float32), y.astype(np.float32)


@pytest.mark.parametrize("seed", range(20))
def test_gains_and_weights_are_those_of_least_squares(seed: int) -> None:
    (x, y), (following, _) = a_stream(seed, 2)
    past, loud = Past(x, y), loudness(following)
    told = forecast(past, following, loud)
    assert told is not None
    for channel in range(0, 96, 7):
        known = np.stack([x[:, channel], y[:, channel]], axis=1) / loud[:, None]
        best, *_ = np.linalg.lstsq(known, following[:, channel] / loud, rcond=None)
        assert to_float32(told.gains)[:, channel] == pytest.approx(best, rel=0.01, abs=1e-3)
    gain = to_float32(told.gains)
    for row in range(0, 40, 7):
        known = np.stack([x[row] * gain[0], y[row] * gain[1]], axis=1)
        best, *_ = np.linalg.lstsq(known, following[row], rcond=None)
        assert to_float32(told.weights)[row] == pytest.approx(best, rel=0.01, abs=1e-3)
    assert np.array_equal(told.rows, predict(past, told.gains, told.weights))


@pytest.mark.parametrize("seed", range(10))
def test_what_is_saved_is_about_what_was_told(seed: int) -> None:
    (x, y), (following, _) = a_stream(seed, 2, rows=200)
    told = forecast(Past(x, y), following, loudness(following))
    assert told is not None
    plain = encode(Codec.STEPS_ZLIB, following, 0.03)
    ahead = encode(Codec.STEPS_AHEAD, following, 0.03, told)
    saved_bits = 8 * (plain.size - ahead.size) / following.size
    assert told.saved_bits > 1
    # Loud and quiet channels share a code, which their rows gain from more than the difference.
    assert 0.6 * told.saved_bits < saved_bits < 1.1 * told.saved_bits


def test_errors_do_not_add_up_over_the_layers() -> None:
    past: Past | None = None
    for x, y in a_stream(3, 30):
        told = forecast(past, x, loudness(x)) if past is not None else None
        codec = Codec.STEPS_ZLIB if told is None else Codec.STEPS_AHEAD
        encoded = encode(codec, x, 0.04, told)
        out = np.empty_like(x)
        decode(codec, b"".join(encoded.pieces), out, past)
        assert relative_error(x, out) == pytest.approx(encoded.error, rel=1e-3)
        assert encoded.error < 0.044
        past = Past(out, y)


@pytest.mark.parametrize("seed", range(10))
def test_rows_that_have_nothing_to_do_with_those_before_are_not_predicted(seed: int) -> None:
    ((x, y),), ((other, _),) = a_stream(seed, 1), a_stream(seed + 100, 1)
    assert forecast(Past(x, y), other, loudness(other)) is None


@pytest.mark.parametrize(
    "x",
    [
        np.zeros((4, 8), np.float32),
        np.full((4, 8), 1e30, np.float32),
        np.full((4, 8), 1e-30, np.float32),
        np.eye(4, 8, dtype=np.float32) * 1e19,
    ],
    ids=["zeros", "huge", "tiny", "sparse"],
)
def test_extreme_rows_are_predicted_in_finite_numbers_or_not_at_all(x) -> None:
    zeros, huge = np.zeros_like(x), np.full_like(x, 3e38)
    for past in (Past(x, x), Past(zeros, x), Past(x, zeros), Past(huge, huge)):
        told = forecast(past, x, loudness(x))
        assert told is None or np.isfinite(told.rows).all()


def test_another_number_of_rows_tells_nothing() -> None:
    ((x, y),) = a_stream(1, 1)
    assert forecast(Past(x[1:], y[1:]), x, loudness(x)) is None
