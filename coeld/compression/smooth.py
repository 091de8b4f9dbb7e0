"""Smoothing: move outliers from activations, which int8 rounds badly, into weights. Pure.

SmoothQuant (Xiao et al., ICML 2023, arXiv 2211.10438): x @ W.T = (x / s) @ (W * s).T for any
positive s per input channel. Dividing by the root of what a channel carries at most evens out the
channels of a block, so that the block's one scale fits them all. The division is folded into what
produces x (a norm's weight, the rows of the matrix before), so that it costs nothing at run time.

s goes in steps of a quarter octave: the small differences that float sums show between machines
then do not reach the weights, which must have the same hash on every device.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

QUIET: Final = 1e-3
"""Channels below this part of the loudest are treated as if they carried this much."""

PRIOR_ROWS: Final = 16
"""Few rows say little: a channel's mean square is mixed with this many rows of the average."""


def smoothing(loudest: NDArray[np.float64]) -> NDArray[np.float32]:
    """Per channel, about the root of the loudest absolute value it carries: 2 ** (k / 4)."""
    floor = max(float(loudest.max()) * QUIET, 1e-30)
    return np.exp2(np.round(2 * np.log2(np.maximum(loudest, floor))) / 4).astype(np.float32)


def carried(rows: NDArray[np.float64]) -> NDArray[np.float32]:
    """(n, K) to the mean square of each channel, (K,): what its weights' errors are weighted by."""
    squares = np.square(rows).sum(axis=0)
    average = float(squares.mean()) / max(1, len(rows))
    mean = (squares + PRIOR_ROWS * average) / (len(rows) + PRIOR_ROWS)
    floor = max(average * QUIET**2, 1e-30)
    found: NDArray[np.float32] = np.exp2(np.round(4 * np.log2(np.maximum(mean, floor))) / 4).astype(
        "f4"
    )
    return found
