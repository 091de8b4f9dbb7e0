"""Which (row, expert) pairs need not be sent at all. Pure.

A router gives a row weights for its k experts; the small ones hardly change the sum. What is
dropped is missing from the sum; the others keep their weights: the denominator stays the gate mass
of k2 >= k experts. Dividing by what is left instead would blow the others up, and was reported to
cost 4.65 points of MMLU where this cost 0.35 (arXiv 2609.04575).

The error budget is the same e as that of codecs: outputs of different experts are close to
orthogonal and similar in length, so leaving out weights d changes a row by about
e = |d| / |w|, relative to the sum.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

Weights = NDArray[np.float32]

SHARE: Final = 0.25
"""Of the squared error that results may make: the most that pruning may use. More would cost the
codec of what comes back more than 0.2 bits a value."""


def shares(gates: Weights, k: int) -> Weights:
    """Weights (n, k) of the k largest of each row's gates (n, k2), k2 >= k, largest first.

    The denominator is the mass of all k2. Gates are probabilities or any numbers >= 0, not all 0.
    """
    assert 1 <= k <= gates.shape[1]
    largest = -np.sort(-gates, axis=1)
    weights: Weights = largest[:, :k] / largest.sum(axis=1, keepdims=True)
    return weights


def kept(weights: Weights, error: float) -> NDArray[np.bool_]:
    """Which of the weights (n, k) to send: as few as |dropped| <= error |weights| allows, per row.

    The largest always stays. Equal weights are dropped together or not at all, so the order of the
    experts does not matter.
    """
    squares = np.square(weights, dtype=np.float64)
    order = np.argsort(squares, axis=1, kind="stable")
    rising = np.take_along_axis(squares, order, axis=1)
    # What would be dropped if everything up to this weight were; ties get that of the last.
    mass = np.cumsum(rising, axis=1)
    mass[:, :-1][rising[:, :-1] == rising[:, 1:]] = np.inf
    mass = np.minimum.accumulate(mass[:, ::-1], axis=1)[:, ::-1]
    droppable = mass <= error**2 * squares.sum(axis=1, keepdims=True)
    droppable &= rising < rising[:, -1:]
    keep = np.empty(weights.shape, np.bool_)
    np.put_along_axis(keep, order, ~droppable, axis=1)
    return keep


def error_of(weights: Weights, keep: NDArray[np.bool_]) -> float:
    """The e that dropping makes: root mean square over rows of |dropped| / |weights|."""
    squares = np.square(weights, dtype=np.float64)
    whole = squares.sum(axis=1)
    lost = (squares * ~keep).sum(axis=1)
    return float(np.sqrt(np.mean(lost / np.where(whole > 0, whole, 1))))
