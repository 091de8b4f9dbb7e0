"""How fast this device reads int8 weights in decode: the one figure its bids are made of.

Measured with the kernel that decode runs (MatMulNBits, one row) on weights larger than most last
level caches, in about a quarter of a second.
"""

import time
from typing import Final

import numpy as np

from coeld.engine.graph import F32, Graph
from coeld.engine.sessions import make_session
from coeld.model.manifest import Form

ROWS_OUT: Final = 32768
WIDTH: Final = 1024
BLOCK: Final = 64
REPEATS: Final = 7


def kernel_mb_per_s() -> int:
    """Weight bytes per second in decode, in MB/s: the best of a few runs."""
    w = np.full((ROWS_OUT, WIDTH // BLOCK, BLOCK), 129, np.uint8)
    s = np.full((ROWS_OUT, WIDTH // BLOCK), 1e-3, np.float32)
    graph = Graph()
    graph.take("x", F32, [1, WIDTH])
    graph.rows_matmul("x", "y", "", [(w, s)], Form(8, BLOCK))
    graph.give("y", F32, [1, ROWS_OUT])
    session = make_session(graph).ort
    feeds, best_s = {"x": np.ones((1, WIDTH), np.float32)}, float("inf")
    for _ in range(REPEATS):
        started = time.perf_counter()
        session.run(None, feeds)
        best_s = min(best_s, time.perf_counter() - started)
    return int((w.nbytes + s.nbytes) / best_s / 1e6)
