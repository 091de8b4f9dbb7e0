"""Block quantisation: the error bound of its docstring, on ordinary and awkward weights."""

import numpy as np
import pytest

from coeld.compression.quantize import dequantize, quantize


def awkward(seed: int) -> np.ndarray:
    """Weights of very different sizes, with zeros, lone spikes and denormal numbers."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((24, 256)).astype(np.float32)
    weight *= np.float32(10.0) ** rng.integers(-30, 30, (24, 1)).astype(np.float32)
    weight[0] = 0
    weight[1, 1:] = 0
    weight[2] = np.float32(1e-44)
    weight[3, :64] = np.float32(3.4e38)
    return weight


@pytest.mark.parametrize("block", [32, 64])
@pytest.mark.parametrize("seed", range(10))
def test_no_weight_is_off_by_more_than_half_a_step(block: int, seed: int) -> None:
    weight = awkward(seed)
    with np.errstate(all="raise", under="ignore"):
        w, scale = quantize(weight, block)
        back = dequantize(w, scale)
    largest = np.abs(weight.reshape(24, -1, block)).max(axis=2).repeat(block, axis=1)
    rounding = np.float32(1e-6) * largest + np.float32(1e-43)
    assert (np.abs(back - weight) <= largest / 254 + rounding).all()


def test_shapes_and_types_are_what_the_kernel_reads() -> None:
    w, scale = quantize(np.ones((3, 128), np.float32), 64)
    assert (w.shape, w.dtype) == ((3, 2, 64), np.uint8)
    assert (scale.shape, scale.dtype) == ((3, 2), np.float32)


def test_steps_stay_symmetric_around_the_zero_point() -> None:
    w, _ = quantize(awkward(0), 32)
    assert w.min() >= 1
    assert w.max() == 255


def test_weights_on_the_grid_survive_exactly() -> None:
    steps = np.arange(-127, 128, dtype=np.float32)[:224].reshape(1, 224)
    steps[0, ::32] = 127
    w, scale = quantize(steps, 32)
    assert (dequantize(w, scale) == steps).all()


def test_a_width_that_is_no_multiple_of_the_block_is_a_programming_mistake() -> None:
    with pytest.raises(AssertionError, match="no multiple"):
        quantize(np.zeros((1, 48), np.float32), 32)
