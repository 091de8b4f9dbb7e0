"""A rotation that spreads outliers over many values: signs, then Walsh-Hadamard. Pure.

A row with one value 50 times the others wastes most of an int8 scale on that one. After the
rotation every value is a sum of many, hence of similar size, and the error of rounding is rotated
back into white noise (QuaRot, arXiv 2404.00456). It is orthonormal: it changes no length.

Sizes that are no power of two: let b be the largest power of two that divides H; the row is cut
into H / b blocks and each is rotated by itself (576 = 9 blocks of 64, 1536 = 3 of 512). An odd H
has b = 1: nothing is rotated, and the codec that uses it degrades to plain int8.

The signs are the Rudin-Shapiro sequence: without them a constant row would end in a single value,
which is as bad as the outlier.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float32]


def block_of(hidden: int) -> int:
    """The largest power of two that divides `hidden`."""
    return hidden & -hidden


@cache
def signs(block: int) -> Rows:
    """Rudin-Shapiro: +1 or -1 by the parity of adjacent ones in the index's binary digits."""
    index = np.arange(block)
    pairs = index & (index >> 1)
    parity = np.zeros(block, np.int64)
    while pairs.any():
        parity ^= pairs & 1
        pairs >>= 1
    return (1 - 2 * parity).astype(np.float32)


def rotate(x: Rows) -> Rows:
    """Rows (n, H), each block multiplied by its signs and transformed; a new array."""
    block = block_of(x.shape[1])
    return _transform(x.reshape(-1, block) * signs(block)).reshape(x.shape)


def rotate_back(x: Rows, out: Rows) -> None:
    """The inverse of `rotate` into `out` (n, H). `x` is overwritten."""
    block = block_of(x.shape[1])
    np.multiply(_transform(x.reshape(-1, block)), signs(block), out=out.reshape(-1, block))


def _transform(x: Rows) -> Rows:
    """Orthonormal Walsh-Hadamard, in Sylvester's order, of each row (m, b); its own inverse.

    The fast transform in its constant geometry: every pass puts sums of neighbours into the first
    half and differences into the second. No BLAS: its threads would fight those of the engine, and
    a product of 256 x 1024 took 0.1 ms alone and 8 ms beside another process. Overwrites x.
    """
    block = x.shape[1]
    half, other = block // 2, np.empty_like(x)
    for _ in range(block.bit_length() - 1):
        np.add(x[:, 0::2], x[:, 1::2], out=other[:, :half])
        np.subtract(x[:, 0::2], x[:, 1::2], out=other[:, half:])
        x, other = other, x
    x *= np.float32(block**-0.5)
    return x
