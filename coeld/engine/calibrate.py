"""How fast this device computes: the kernels that its bids are made of, and memory.

The kernels that decode and prompts run (coeld.engine.kernels) are measured on weights larger than
most second level caches, each a few times and the best run counts, until `LIMIT_S` are over: what
matters most comes first. What was measured is remembered on disk under everything it depends on
(processor, cores, threads, quota, allowed clock, version of ONNX Runtime), so only the first engine
on a machine takes that time; a machine that was busy measured too little and is not remembered.
"""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime as ort

from coeld.engine.cut_work import cut_us
from coeld.engine.graph import ACCURACY, F32, I32, Graph
from coeld.engine.kernels import KINDS, ROWS, Kernels, Kind, Timing
from coeld.engine.sessions import make_session
from coeld.errors import FrameError
from coeld.host.cgroups import cpu_cores
from coeld.host.clock import allowed_mhz
from coeld.host.remembered import recall, remember
from coeld.model.manifest import Form

LIMIT_S: Final = 1.2
"""For all kernels; nothing is begun after that, so all of it takes less than 2 s."""
REPEATS: Final = 5
RUN_S: Final = 0.08
"""Longest that one kernel with one number of rows is repeated."""
BUSY: Final = 0.5
"""Load per core (1 minute) from which on measurements are not remembered."""
FORM: Final = Form(8, 64)
WIDTH: Final = 1024
ROWS_OUT: Final = 32768
EXPERTS: Final = 16
CHOSEN: Final = 8
EXPERT_WIDTH: Final = 512
LAYERS: Final = 4
CONTEXT: Final = 512
HEADS: Final = (16, 8, 64)
"""Heads, KV heads, values per head."""
SWEEP_BYTES: Final = 128 << 20
"""Per thread, to measure memory: more than last level caches hold."""


def calibrate(cache: Path, threads: int) -> Kernels:
    """What was measured here before, or a measurement that takes less than two seconds."""
    depends_on = conditions(threads)
    try:
        return replace(Kernels.from_json(recall(cache, depends_on)), remembered=True)
    except FrameError:
        kernels = measure(depends_on["clock_mhz"])
    if os.getloadavg()[0] < BUSY * len(os.sched_getaffinity(0)):
        remember(cache, depends_on, kernels.to_json())
    return kernels


def conditions(threads: int) -> dict[str, Any]:
    """Everything that a measurement depends on."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "quota": cpu_cores(),
        "clock_mhz": allowed_mhz(),
        "onnxruntime": ort.__version__,
    }


def measure(clock_mhz: int = 0, limit_s: float = LIMIT_S) -> Kernels:
    """One row of what bids are made of, then many; the rest while there is time."""
    until = time.monotonic() + limit_s
    made: dict[Kind, Callable[[int], Timing]] = {}
    found: dict[Kind, list[Timing]] = {kind: [] for kind in KINDS}
    one, *_, many = ROWS
    basic: tuple[Kind, ...] = ("experts", "dense")
    order: list[tuple[Kind, int]] = [(kind, rows) for rows in (one, many) for kind in basic]
    order += [("attention", rows) for rows in (one, many)]
    order += [(kind, rows) for rows in ROWS[1:-1] for kind in KINDS]
    for kind, rows in order:
        if found["experts"] and found["dense"] and time.monotonic() >= until:
            break
        if kind not in made:
            made[kind] = MAKERS[kind]()
        found[kind].append(made[kind](rows))
    timings = {kind: tuple(sorted(ran, key=lambda t: t.rows)) for kind, ran in found.items()}
    return Kernels(timings, clock_mhz, cut_us())


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


# ---- the kernels ----------------------------------------------------------------------------


def _dense() -> Callable[[int], Timing]:
    graph = Graph()
    size = _matrix(graph, "x", "y", ROWS_OUT, WIDTH)
    graph.take("x", F32, ["n", WIDTH])
    graph.give("y", F32, ["n", ROWS_OUT])
    session = make_session(graph).ort

    def run(rows: int) -> Timing:
        feeds = {"x": np.ones((rows, WIDTH), np.float32)}
        return Timing(rows, _best_us(lambda turn: session.run(None, feeds)), size, size * rows)

    return run


def _experts() -> Callable[[int], Timing]:
    """A layer of experts as coeld.engine.feed_forward makes it. Rows choose in turn, so that one
    row does not find the experts of the run before in a cache."""
    graph, size = Graph(), 0
    for name, n, k in (("1", 2 * EXPERT_WIDTH, WIDTH), ("2", WIDTH, EXPERT_WIDTH)):
        w = np.full((EXPERTS, n, k), 129, np.uint8)
        s = np.full((EXPERTS, n, k // FORM.block), 1e-3, np.float32)
        graph.constant("w" + name, w)
        graph.constant("s" + name, s)
        size += (w.nbytes + s.nbytes) // EXPERTS
    graph.add(
        "QMoE",
        ["x", "gates", "w1", "s1", "", "w2", "s2", "", *[""] * 6, "gates"],
        ["y"],
        k=CHOSEN,
        activation_type="swiglu",
        swiglu_fusion=1,
        activation_alpha=1.0,
        activation_beta=0.0,
        swiglu_limit=1e30,
        normalize_routing_weights=0,
        expert_weight_bits=FORM.bits,
        block_size=FORM.block,
        accuracy_level=ACCURACY,
        weights_prepacked=0,
    )
    graph.take("x", F32, ["n", WIDTH])
    graph.take("gates", F32, ["n", EXPERTS])
    graph.give("y", F32, ["n", WIDTH])
    session = make_session(graph).ort

    def run(rows: int) -> Timing:
        x, feeds = np.ones((rows, WIDTH), np.float32), []
        for turn in range(EXPERTS // CHOSEN):
            first = (np.arange(rows)[:, None] + turn) * CHOSEN
            chosen = (first + np.arange(CHOSEN)) % EXPERTS
            gates = np.zeros((rows, EXPERTS), np.float32)
            np.put_along_axis(gates, chosen, 1 / CHOSEN, axis=1)
            feeds.append({"x": x, "gates": gates})
        read = min(EXPERTS, rows * CHOSEN) * size
        us = _best_us(lambda turn: session.run(None, feeds[turn % len(feeds)]))
        return Timing(rows, us, read, rows * CHOSEN * size)

    return run


def _attention() -> Callable[[int], Timing]:
    """Projections, rotary embedding and attention of a few layers, one after the other."""
    heads, kv_heads, width = HEADS
    graph, size, x = Graph(), 0, "x"
    for name, kind in (("seqlens_k", I32), ("total", I32)):
        graph.take(name, kind, [1])
    angles = np.outer(np.arange(CONTEXT + ROWS[-1]), np.ones(width // 2))
    graph.constant("cos", np.cos(angles).astype(np.float32))
    graph.constant("sin", np.sin(angles).astype(np.float32))
    cache = [1, kv_heads, CONTEXT + ROWS[-1], width]
    for layer in range(LAYERS):
        qkv, out = f"qkv{layer}", f"out{layer}"
        size += _matrix(graph, x, qkv, (heads + 2 * kv_heads) * width, WIDTH)
        states = [graph.take(f"{name}{layer}", F32, cache) for name in "kv"]
        for state in states:
            graph.give(f"{state}_out", F32, cache)
        graph.add(
            "GroupQueryAttention",
            [qkv, "", "", *states, "seqlens_k", "total", "cos", "sin"],
            [f"a{layer}", f"k{layer}_out", f"v{layer}_out"],
            num_heads=heads,
            kv_num_heads=kv_heads,
            do_rotary=1,
        )
        size += _matrix(graph, f"a{layer}", out, WIDTH, heads * width)
        x = out
    graph.take("x", F32, [1, "n", WIDTH])
    graph.give(x, F32, [1, "n", WIDTH])
    session = make_session(graph).ort
    kv = ort.OrtValue.ortvalue_from_numpy(np.zeros(cache, np.float32))
    read = size + 4 * 2 * LAYERS * kv_heads * width * CONTEXT

    def run(rows: int) -> Timing:
        bound = session.io_binding()
        for item in session.get_inputs():
            if item.name[0] in "kv":
                bound.bind_ortvalue_input(item.name, kv)
                bound.bind_ortvalue_output(f"{item.name}_out", kv)
        bound.bind_cpu_input("x", np.ones((1, rows, WIDTH), np.float32))
        bound.bind_cpu_input("seqlens_k", np.array([CONTEXT + rows - 1], np.int32))
        bound.bind_cpu_input("total", np.array([CONTEXT + rows], np.int32))
        bound.bind_output(x)
        us = _best_us(lambda turn: session.run_with_iobinding(bound))
        return Timing(rows, us, read, rows * read)

    return run


MAKERS: Final[dict[Kind, Callable[[], Callable[[int], Timing]]]] = {
    "dense": _dense,
    "experts": _experts,
    "attention": _attention,
}


def _matrix(graph: Graph, x: str, out: str, n: int, k: int) -> int:
    """out = x @ W.T with a matrix of the usual width; its bytes."""
    w = np.full((n, k // FORM.block, FORM.block), 129, np.uint8)
    s = np.full((n, k // FORM.block), 1e-3, np.float32)
    graph.rows_matmul(x, out, out, [(w, s)], FORM)
    return w.nbytes + s.nbytes


def _best_us(run: Callable[[int], object]) -> int:
    """Microseconds of the quickest of a few runs, which are told their number.

    Where a quota allows fewer cores than are used, a run that fits into what it grants at a time
    says nothing of many in a row: these take their processor time at the rate that is allowed.
    """
    best_s, until, allowed = float("inf"), time.perf_counter() + RUN_S, cpu_cores()
    for turn in range(REPEATS):
        started, started_cpu = time.perf_counter(), time.process_time()
        run(turn)
        ended, used_s = time.perf_counter(), time.process_time() - started_cpu
        took_s = ended - started
        best_s = min(best_s, max(took_s, used_s / allowed) if allowed else took_s)
        if ended > until:
            break
    return max(1, round(best_s * 1e6))


# ---- what it depends on ---------------------------------------------------------------------


def _cpu_name() -> str:
    """As the kernel calls it; on Arm the parts' numbers."""
    names = ("model name", "Model", "Hardware", "CPU part", "CPU implementer")
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return "; ".join(sorted({line for line in lines if line.split("\t")[0].strip() in names}))
