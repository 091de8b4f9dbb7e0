"""Symmetric int8 in blocks along the input dimension, as com.microsoft::MatMulNBits reads it.

A block of B weights shares one float32 scale = max|w| / 127; each weight is the nearest of the
255 multiples of it. Symmetric, because kernels with a fixed zero point (128) are the fast ones, and
at 8 bits a zero point of its own would gain next to nothing.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

ZERO_POINT: Final = 128
LEVELS: Final = 127
"""Steps on each side of zero."""


def quantize(
    weight: NDArray[np.float32], bits: int, block: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """(N, K) to w (N, K*bits/8) uint8 and scale (N, K/block) float32.

    K must be a multiple of `block` and all values finite. Error bound, per weight:
    |dequantize(w, scale) - weight| <= max|weight in its block| / 254 (half a step), up to float32
    rounding. Deterministic: the same input gives the same bytes on every machine.
    """
    rows, columns = weight.shape
    assert bits == 8, f"{bits} bits"
    assert columns % block == 0, f"{columns} is no multiple of the block {block}"
    blocks = weight.reshape(rows, columns // block, block)
    scale = np.abs(blocks).max(axis=2) / np.float32(LEVELS)
    # A block of (nearly) zeros has scale 0; dividing by 1 instead stores zeros.
    steps = blocks / np.where(scale > 0, scale, np.float32(1))[..., None]
    np.rint(steps, out=steps)
    np.clip(steps, -LEVELS, LEVELS, out=steps)
    steps += ZERO_POINT
    return steps.astype(np.uint8).reshape(rows, columns), scale


def dequantize(w: NDArray[np.uint8], scale: NDArray[np.float32], bits: int) -> NDArray[np.float32]:
    """The inverse: (N, K*bits/8) and (N, K/block) to (N, K) float32."""
    assert bits == 8, f"{bits} bits"
    blocks = w.reshape(*scale.shape, -1).astype(np.float32) - np.float32(ZERO_POINT)
    return (blocks * scale[..., None]).reshape(w.shape)
