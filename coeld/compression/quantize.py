"""Symmetric quantisation to 8, 4, 3 or 2 bits in blocks along the input dimension.

A block of B weights shares one float32 scale; a weight is (w - 2**(bits-1)) * scale. The zero point
is fixed, because the kernels that read such weights (com.microsoft::QMoE and MatMulNBits) are fast
only then. At 8 bits the scale is max|w| / 127: the nearest of 255 multiples is close enough. Below,
where a block has 16, 8 or 4 values, the scale is searched for: candidates around max|w| over the
lowest level, with either sign, since the lowest level -2**(bits-1) reaches further than the highest
and may serve the larger side; the best one's scale is then fitted to its levels by least squares.
The error may be weighted per input channel, by the mean square of what the channel carries: to
first order that is the squared error of the output (the diagonal of the Hessian in Frantar et al.,
"GPTQ", arXiv 2210.17323).

A row's levels are packed as a stream of bits, lowest first: 4 bits are low nibble, high nibble; 3
bits are eight weights in three bytes.

Everything is deterministic, on every machine: only operations that IEEE 754 rounds exactly, and
sums in a fixed order (the rows of an array added to each other, never a dot product).
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

WIDTHS: Final = (2, 3, 4, 8)

STEPS: Final = {
    4: (7.2, 7.7, 8.2, 9.0, 10.0, 11.5),
    3: (3.0, 3.4, 3.8, 4.2, 4.8, 5.5),
    2: (1.2, 1.5, 1.8, 2.1, 2.5, 3.0),
}
"""The candidates: max|w| lies this many steps from zero. Beyond 2**(bits-1) it is clipped."""

FITS: Final = 2
"""Rounds of fitting the scale to the levels and the levels to the scale."""

CHUNK: Final = 1 << 18
"""Weights worked on at a time, so that they stay in a processor's cache."""


def quantize(
    weight: Floats, bits: int, block: int, importance: Floats | None = None
) -> tuple[Bytes, Floats]:
    """(N, K) to w (N, K*bits/8) uint8 and scale (N, K/block) float32.

    `importance`, (K,), finite and not negative: weights of the squared error, per input channel.
    K must be a multiple of `block`, that one of 8, and all values finite. Error bounds, per weight
    and up to float32 rounding: at 8 bits max|weight in its block| / 254 (half a step). Below, for
    the whole block and weighted: never more than with scale max|w| / (2**(bits-1) - 1).
    """
    rows, columns = weight.shape
    assert bits in WIDTHS, f"{bits} bits"
    assert columns % block == 0, f"{columns} is no multiple of the block {block}"
    if bits == 8:
        steps, scale = _nearest(weight.reshape(rows, -1, block))
        return steps.reshape(rows, columns), scale
    levels = np.empty((rows, columns), np.uint8)
    scale = np.empty((rows, columns // block), np.float32)
    weights = np.ones(columns, np.float32) if importance is None else _normalised(importance)
    height = max(1, CHUNK // columns)
    for start in range(0, rows, height):
        part = slice(start, start + height)
        blocks = weight[part].reshape(-1, columns // block, block)
        # Blocks along the first axis, so that sums over a block add whole rows, in order.
        stood = np.ascontiguousarray(blocks.transpose(2, 0, 1))
        found, scale[part] = _search(stood, weights.reshape(-1, block).T[:, None, :], bits)
        levels[part] = found.transpose(1, 2, 0).reshape(-1, columns)
    return pack(levels, bits), scale


def dequantize(w: Bytes, scale: Floats, bits: int) -> Floats:
    """The inverse: (N, K*bits/8) and (N, K/block) to (N, K) float32."""
    levels = unpack(w, bits)
    values = levels.astype(np.float32) - np.float32(1 << (bits - 1))
    blocks = values.reshape(*scale.shape, -1)
    blocks *= scale[..., None]
    return blocks.reshape(levels.shape)


def pack(levels: Bytes, bits: int) -> Bytes:
    """(N, K) levels below 2**bits to (N, K*bits/8); K a multiple of 8."""
    if bits == 8:
        return levels
    groups = levels.reshape(len(levels), -1, 8)
    words = np.zeros(groups.shape[:2], "<u4")
    for index in range(8):
        words |= groups[..., index].astype("<u4") << np.uint32(bits * index)
    packed = words[..., None].view(np.uint8)[..., :bits]
    return np.ascontiguousarray(packed).reshape(len(levels), -1)


def unpack(w: Bytes, bits: int) -> Bytes:
    """(N, K*bits/8) to (N, K) levels."""
    if bits == 8:
        return w
    groups = w.reshape(len(w), -1, bits)
    words = np.zeros(groups.shape[:2], np.uint32)
    for index in range(bits):
        words |= groups[..., index].astype(np.uint32) << np.uint32(8 * index)
    levels = np.empty((*words.shape, 8), np.uint8)
    for index in range(8):
        levels[..., index] = (words >> np.uint32(bits * index)) & np.uint32((1 << bits) - 1)
    return levels.reshape(len(w), -1)


def _nearest(blocks: Floats) -> tuple[Bytes, Floats]:
    """8 bits: blocks (N, K/B, B) to steps of that shape and scales (N, K/B)."""
    scale = np.abs(blocks).max(axis=2) / np.float32(127)
    # A block of (nearly) zeros has scale 0; dividing by 1 instead stores zeros.
    steps = blocks / np.where(scale > 0, scale, np.float32(1))[..., None]
    np.rint(steps, out=steps)
    np.clip(steps, -127, 127, out=steps)
    steps += 128
    return steps.astype(np.uint8), scale


def _normalised(importance: Floats) -> Floats:
    """Scaled to at most 1; channels that carry nothing count a millionth of the loudest."""
    top = np.float32(importance.max())
    if not top > 0:
        return np.ones_like(importance)
    scaled: Floats = np.maximum(importance / top, np.float32(1e-6)).astype(np.float32)
    return scaled


def _sum(values: Floats) -> Floats:
    """Over the first axis, in order: numpy's own sum has an order that depends on the shape."""
    total: Floats = values[0].copy()
    for row in values[1:]:
        total += row
    return total


def _search(blocks: Floats, weights: Floats, bits: int) -> tuple[Bytes, Floats]:
    """Levels (B, N, M) and scales (N, M) for blocks (B, N, M), weights (B, 1, M)."""
    lowest, highest = np.float32(-(1 << (bits - 1))), np.float32((1 << (bits - 1)) - 1)
    largest = np.abs(blocks).max(axis=0)
    unit: Floats = np.divide(blocks, np.where(largest > 0, largest, np.float32(1)))
    weighted: Floats = np.multiply(unit, weights)

    def round_to(inverse: Floats | np.float32) -> Floats:
        steps: Floats = np.rint(np.multiply(unit, inverse))
        np.clip(steps, lowest, highest, out=steps)
        return steps

    def judge(steps: Floats) -> tuple[Floats, Floats]:
        """The best scale for these levels, and how much of the squared norm it explains."""
        along = _sum(np.multiply(weighted, steps))
        square = np.maximum(_sum(np.multiply(steps * steps, weights)), np.float32(1e-30))
        fitted: Floats = np.divide(along, square)
        return fitted, np.multiply(along, fitted)

    best_scale, best_gain = np.zeros_like(largest), np.full_like(largest, -1)

    def inverse() -> Floats:
        safe = np.where(np.abs(best_scale) > 1e-6, best_scale, np.float32(1))
        inverted: Floats = np.divide(np.float32(1), safe)
        return inverted

    candidates = [np.float32(sign * c) for c in (*STEPS[bits], highest) for sign in (1, -1)]
    for candidate in (*candidates, *[None] * FITS):
        scale, gain = judge(round_to(inverse() if candidate is None else candidate))
        better = gain > best_gain
        best_gain = np.where(better, gain, best_gain)
        best_scale = np.where(better, scale, best_scale)
    steps = round_to(inverse())
    steps -= lowest
    return steps.astype(np.uint8), best_scale * largest
