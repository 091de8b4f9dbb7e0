"""Smoothing changes how a layer is written, never what it computes."""

from pathlib import Path

import numpy as np
import pytest

from coeld.compression.quantize import dequantize, quantize
from coeld.compression.smooth import smoothing
from coeld.model.calibration import TOKENS_MAX, Calibration, calibration_tokens
from coeld.model.families import llama
from coeld.model.gguf_file import GgufFile
from coeld.model.tokenizer import read_vocabulary


@pytest.fixture
def opened(tiny_gguf: Path):
    with GgufFile(tiny_gguf) as file:
        yield file, llama.read_shape(file)


def calibration(file, shape, tokens) -> Calibration:
    rows = [file.read(llama.EMBEDDING, token, token + 1) for token in tokens]
    return Calibration(shape, np.concatenate(rows))


def test_a_smoothed_layer_is_the_same_function(opened) -> None:
    """Fed to the same states, the original and the smoothed layer give the same next states."""
    file, shape = opened
    layer = llama.read_layer(file, shape, 0)
    tokens = list(range(20, 60))
    one, two = calibration(file, shape, tokens), calibration(file, shape, tokens)
    smoothed = one.smooth(layer)
    two.smooth(smoothed)
    assert np.allclose(one._x, two._x, rtol=1e-5, atol=1e-6)
    assert not np.array_equal(smoothed.qkv, layer.qkv)


def test_smoothing_again_has_almost_nothing_left_to_do(opened) -> None:
    file, shape = opened
    tokens = list(range(20, 60))
    smoothed = calibration(file, shape, tokens).smooth(llama.read_layer(file, shape, 0))
    spread = np.ptp(np.log2(np.abs(smoothed.ffn_norm)))
    assert spread <= np.ptp(np.log2(np.abs(llama.read_layer(file, shape, 0).ffn_norm))) + 4


def test_smoothed_channels_survive_int8_better() -> None:
    """Few loud channels among quiet ones: the case SmoothQuant is for."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 256)) * np.where(rng.random(256) < 0.03, 60.0, 1.0)
    w = rng.standard_normal((32, 256)).astype(np.float32)

    def error(s: np.ndarray) -> float:
        rounded = [dequantize(*quantize((m).astype(np.float32), 64)) for m in (x / s, w * s)]
        return float(np.abs(rounded[0] @ rounded[1].T - x @ w.T).mean())

    assert error(smoothing(np.abs(x).max(0))) < 0.6 * error(np.ones(256, np.float32))


@pytest.mark.parametrize("seed", range(20))
def test_last_bits_of_the_measurement_do_not_change_the_factors(seed: int) -> None:
    rng = np.random.default_rng(seed)
    loudest = np.exp(rng.standard_normal(4096))
    nudged = loudest * (1 + rng.choice([-1, 1], 4096) * 1e-13)
    assert np.array_equal(smoothing(loudest), smoothing(nudged))


def test_silent_channels_get_a_finite_factor() -> None:
    for loudest in (np.zeros(8), np.array([0.0, 5.0])):
        assert np.isfinite(smoothing(loudest)).all()
        assert (smoothing(loudest) > 0).all()


def test_the_text_is_the_same_tokens_every_time(opened) -> None:
    file, shape = opened
    vocabulary = read_vocabulary(file, shape.vocab)
    tokens = calibration_tokens(vocabulary.json)
    assert len(tokens) == TOKENS_MAX
    assert tokens == calibration_tokens(vocabulary.json)
