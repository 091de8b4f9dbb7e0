"""From 8 bits to 4: a slow search over each block as oracle, error bounds, the same bits always."""

import hashlib
from fractions import Fraction

import numpy as np
import pytest

from coeld.compression.quantize import dequantize, quantize, unpack
from coeld.compression.requantize import CANDIDATES, requantize


def stored(seed: int, block: int, rows: int = 5, columns: int = 256) -> tuple:
    """Weights as an import leaves them: heavy tails, a row of zeros, one of a lone spike."""
    rng = np.random.default_rng(seed)
    weight = (rng.standard_t(4, (rows, columns)) * rng.uniform(0.01, 1, (rows, 1))).astype("f4")
    weight[0] = 0
    weight[1, 1:] = 0
    weight[2] = np.abs(weight[2])  # all on one side
    return quantize(weight, 8, block)


def slow(levels: list[int]) -> tuple[list[int], Fraction]:
    """Steps and what the scale is multiplied by, tried one after the other in exact arithmetic."""
    sign = -1 if max(levels) > -min(levels) else 1
    best: tuple[Fraction, list[int], Fraction] = (Fraction(-1), [], Fraction(0))
    for candidate in CANDIDATES:
        steps = [min(7, max(-8, int(np.rint(sign * x * candidate / 127)))) for x in levels]
        square = max(1, sum(t * t for t in steps))
        along = sum(sign * x * t for x, t in zip(levels, steps, strict=True))
        if Fraction(along * along, square) > best[0]:
            best = Fraction(along * along, square), steps, Fraction(sign * along, square)
    return best[1], best[2]


@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("seed", range(4))
def test_every_block_is_what_a_slow_search_finds(block: int, seed: int) -> None:
    w, scale = stored(seed, block)
    narrow, narrow_scale = requantize(w, scale)
    steps = unpack(narrow, 4).reshape(-1, block).astype(int) - 8
    levels = w.reshape(-1, block).astype(int) - 128
    scales = zip(scale.ravel(), narrow_scale.ravel(), strict=True)
    for found, block_levels, (before, after) in zip(steps, levels, scales, strict=True):
        expected, factor = slow(block_levels.tolist())
        assert found.tolist() == expected, f"seed={seed}"
        assert after == np.float32(before * np.float32(float(factor))), f"seed={seed}"


@pytest.mark.parametrize("seed", range(4))
def test_no_block_is_worse_than_rounded_to_its_largest_value(seed: int) -> None:
    w, scale = stored(seed, 64)
    exact = dequantize(w, scale, 8).astype(np.float64).reshape(-1, 64)
    ours = dequantize(*requantize(w, scale), 4).astype(np.float64).reshape(-1, 64)
    step = np.maximum(np.abs(exact).max(axis=1, keepdims=True) / 7, 1e-300)
    plain = np.rint(exact / step) * step
    error = ((ours - exact) ** 2).sum(axis=1)
    assert (error <= ((plain - exact) ** 2).sum(axis=1) * (1 + 1e-5) + 1e-12).all(), f"{seed=}"


def test_it_errs_about_as_little_as_a_search_over_the_original() -> None:
    rng = np.random.default_rng(7)
    weight = rng.standard_normal((64, 512)).astype(np.float32)

    def error(w: np.ndarray, s: np.ndarray) -> float:
        return float(((dequantize(w, s, 4) - weight) ** 2).mean())

    assert error(*requantize(*quantize(weight, 8, 64))) < 1.05 * error(*quantize(weight, 4, 64))


def test_large_matrices_go_in_pieces_and_give_the_same_bits() -> None:
    rng = np.random.default_rng(3)
    w = rng.integers(1, 256, (1200, 256), np.uint8)
    scale = rng.integers(1, 1000, (1200, 4)).astype(np.float32)
    narrow, narrow_scale = requantize(w, scale)
    for row in (0, 511, 512, 1199):
        alone = requantize(w[row : row + 1], scale[row : row + 1])
        assert (alone[0] == narrow[row]).all()
        assert (alone[1] == narrow_scale[row]).all()
    digest = hashlib.sha256(narrow.tobytes() + narrow_scale.tobytes()).hexdigest()
    assert digest == "6b192351289466cee0d2b3405dd13d8eb1f10b24db375f62f6fda5a791e3767f"
