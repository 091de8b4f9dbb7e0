"""Rows that are almost equal and go to the same experts are sent once. Pure.

In prompts the same token at another place often gives nearly the same row, above all in the first
layers. Every row is represented by itself or by a leader no further away than the error allowed
(relative to the row's length); only leaders travel, in both directions. A decoding step with one
row has nothing to fuse.

Leaders are rows, not means: a mean would be nearer, but a leader's own result stays exact, and the
bound holds without checking. All pairs are compared, as one matrix product (512 rows of 1024: 0.5
GFLOP); hashing (LSH-MoE, arXiv 2411.08446) pays only for far more rows than a frame may carry.

What comes back for a leader is compensated for every row that it stood for (LSH-MoE adds the
residual; here it is scaled): y ≈ y_leader + a (x - x_leader), where a is the least-squares slope of
results against rows over the leaders themselves; where that explains nothing it is near 0.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Fused:
    """How n rows became fewer."""

    leaders: NDArray[np.intp]
    """(m,) rows that are sent, rising."""
    group: NDArray[np.intp]
    """(n,) for each row the place of its leader in `leaders`."""
    error: float
    """e of replacing rows by their leaders: root mean square over rows of distance / length."""


def fuse(x: Rows, error: float) -> Fused:
    """Choose leaders so that every row of x (n, H) is within `error` times its length of one.

    Greedy: the row that could stand for most of those that are left leads them, and so on. The
    choice depends on the rows, not on their order. float32 makes distances uncertain by 0.001.
    """
    count = len(x)
    lengths = np.einsum("ij,ij->i", x, x, dtype=np.float64)
    apart = lengths[:, None] + lengths - 2 * (x @ x.T).astype(np.float64)
    far = np.maximum(apart, 0) / np.where(lengths > 0, lengths, 1)[:, None]
    np.fill_diagonal(far, 0)
    near = far <= error**2  # near[i, j]: j may stand for i
    # Ties are broken by the rows' content, not by their place.
    content = x @ np.cos(np.arange(x.shape[1], dtype=np.float32))
    leader = np.full(count, -1)
    left = near.sum(axis=0)
    if (left == 1).all():
        return Fused(np.arange(count), np.arange(count), 0.0)
    for _ in range(count):
        candidates = np.flatnonzero(left == left.max())
        best = candidates[np.argmax(content[candidates])]
        if not left[best]:
            break
        led = near[:, best] & (leader < 0)
        leader[led] = best
        left -= near[led].sum(axis=0)
        left[led] = 0  # who is led does not lead
    leaders, group = np.unique(leader, return_inverse=True)
    made = far[np.arange(count), leader]
    return Fused(leaders, group, float(np.sqrt(made.mean())))


def unfuse(fused: Fused, x: Rows, results: Rows) -> Rows:
    """Results (m, H) of the leaders to results (n, H) of all rows; leaders keep theirs exactly."""
    spread = results[fused.group]
    if len(fused.leaders) == len(x):
        return spread
    rest = x - x[fused.leaders][fused.group]
    return spread + slope(x[fused.leaders], results) * rest


def slope(x: Rows, y: Rows) -> np.float32:
    """The a that makes a (x - mean) nearest to y - mean, over rows (m, H)."""
    dx, dy = x - x.mean(axis=0), y - y.mean(axis=0)
    below = float(np.vdot(dx, dx))
    return np.float32(float(np.vdot(dx, dy)) / below if below > 0 else 0.0)
