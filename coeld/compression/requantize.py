"""From 8 bits to 4 without the original weights: the narrow form of an expert, made where it runs.

What is stored in 8 bits is integers in blocks with one scale (see `quantize`), so everything that
decides about a block is sums of small integers, which are exact in any order: the same bits on
every machine. A block is turned round if its largest value is positive, since the lowest of 16
steps reaches further than the highest. Then each of STEPS[4] is tried: where the largest value
lies, in steps from zero. For steps t of levels l the scale that errs least is sum(l t) / sum(t t),
and sum(l t)^2 / sum(t t) is how much of the block's squared norm it explains: the largest wins.
A level is one of 256, so steps and products are looked up, five times as fast as computing them.

The error of the 8 bits, and what calibration knew of channels, are lost: see docs/benchmarks.md
for how much worse than an import at 4 bits that is.
"""

from typing import Final

import numpy as np

from coeld.compression.quantize import STEPS, Bytes, Floats, pack

CANDIDATES: Final = (7.0, *STEPS[4])
"""With the first, nothing is clipped: no block is worse than rounded to its largest value."""
BLOCK_MAX: Final = 128
"""Weights in a block: more, and two sums would not fit into 32 bits."""
CHUNK: Final = 1 << 17
"""Weights worked on at a time, so that they stay in a processor's cache."""

_SHIFT: Final = 17
"""Sums of l * t (at most 127 * 8 * 128) below, of t * t above."""
_LEVELS: Final = np.maximum(np.arange(256) - 128, -127)
"""The lowest is never stored."""
_TABLE: Final = np.stack(
    [
        np.clip(np.rint(_LEVELS * candidate / 127), -8, 7).astype(np.int32)
        for candidate in CANDIDATES
    ]
)
"""(candidates, 256): the step of each level."""
_PRODUCTS: Final = (_TABLE * _LEVELS + (_TABLE * _TABLE << _SHIFT)).astype(np.int32)
_NIBBLES: Final = (_TABLE + 8).astype(np.uint8).ravel()


def requantize(w: Bytes, scale: Floats) -> tuple[Bytes, Floats]:
    """8 bits, (N, K) and (N, K/block), to 4: (N, K/2) and (N, K/block)."""
    rows, columns = w.shape
    block = columns // scale.shape[1]
    assert block <= BLOCK_MAX, f"blocks of {block}"
    nibbles = np.empty((rows, columns), np.uint8)
    narrow = np.empty_like(scale)
    height = max(1, CHUNK // columns)
    for start in range(0, rows, height):
        part = slice(start, start + height)
        found, factor = _blocks(w[part].reshape(-1, block))
        nibbles[part] = found.reshape(-1, columns)
        narrow[part] = scale[part] * factor.reshape(-1, scale.shape[1])
    return pack(nibbles, 4), narrow


def _blocks(levels: Bytes) -> tuple[Bytes, Floats]:
    """(M, B) levels of 8 bits to as many of 4, and by what each block's scale is multiplied."""
    low, high = levels.min(axis=1), levels.max(axis=1)
    turned = high > 256 - low.astype(np.int32)
    levels = np.where(turned[:, None], np.negative(levels), levels)  # 256 - level, 128 stays
    best = np.zeros(len(levels), np.int32)
    most = np.full(len(levels), -1.0)
    factor = np.zeros(len(levels))
    for candidate, products in enumerate(_PRODUCTS):
        sums = np.take(products, levels).sum(axis=1, dtype=np.int32)
        square = np.maximum(sums >> _SHIFT, 1)
        along = sums & ((1 << _SHIFT) - 1)
        fitted = along / square
        gain = along * fitted
        better = gain > most
        best[better] = candidate
        most[better] = gain[better]
        factor[better] = fitted[better]
    factor[turned] *= -1
    return np.take(_NIBBLES, levels + (best * 256)[:, None]), factor.astype(np.float32)
