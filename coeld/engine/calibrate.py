"""How fast this device reads: int8 weights in decode, which its bids are made of, and memory.

The former is measured with the kernel that decode runs (MatMulNBits, one row) on weights larger
than most last level caches, in about a quarter of a second.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np

from coeld.engine.graph import F32, Graph
from coeld.engine.sessions import make_session
from coeld.model.manifest import Form

ROWS_OUT: Final = 32768
WIDTH: Final = 1024
BLOCK: Final = 64
REPEATS: Final = 7
SWEEP_BYTES: Final = 128 << 20
"""Per thread, to measure memory: more than last level caches hold."""


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


def memory_mb_per_s(threads: int) -> int:
    """Bytes per second that `threads` threads read at once in plain sums, in MB/s: the best of a
    few runs. What decode can reach at most, where nothing is reused from a cache."""
    arrays = [np.ones(SWEEP_BYTES // 4, np.float32) for _ in range(threads)]
    best_s = float("inf")
    with ThreadPoolExecutor(threads, "calibrate.memory") as pool:
        for _ in range(REPEATS):
            started = time.perf_counter()
            list(pool.map(np.sum, arrays))
            best_s = min(best_s, time.perf_counter() - started)
    return int(threads * SWEEP_BYTES / best_s / 1e6)
