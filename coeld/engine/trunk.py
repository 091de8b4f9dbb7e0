"""The trunk: embedding, attention and head of one model, run part by part.

A *part* is a pass of some rows through consecutive layers: `run` for every span of its steps, with
`add` between them for what the experts of a cut layer gave, and what comes `out`. Each thread that
runs parts has a *lane*: its own buffers. Lanes share graphs and weights, and ONNX Runtime's one
pool of threads, so parts of several requests run side by side without a lock, as their threads are
scheduled. Buffers for one row are bound once per cache, so that a decoded token costs one session
call per span and no allocation.

A part runs to its end on the plan that it began with. A new plan is adopted by exchanging one
reference; `left` says when no lane runs the old one any more.
"""

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from coeld.compression.quantize import dequantize
from coeld.datapath.plan import Span, Step, part_of
from coeld.datapath.ports import Cache, Gates, Rows
from coeld.engine.graphs import span_graph
from coeld.engine.kvcache import KVCache
from coeld.engine.sessions import Session, make_session
from coeld.engine.side_by_side import never, side_by_side
from coeld.errors import PeerRefused
from coeld.model.manifest import Manifest
from coeld.model.store import Store

F32: Final = np.float32


class Plan(NamedTuple):
    """Steps through all layers, and the graphs of their spans."""

    steps: Sequence[Step]
    sessions: Mapping[Span, Session]


class Trunk:
    """The trunk of one model on this device: graphs and constants, which all lanes share."""

    def __init__(
        self,
        manifest: Manifest,
        store: Store,
        context_tokens: int,
        gently: Callable[[], bool] = never,
    ) -> None:
        self.manifest = manifest
        self.shape = manifest.shape
        self.gently = gently
        self.context_tokens = context_tokens
        self.plan = Plan((), {})
        self.cos_sin = tuple(map(ort.OrtValue.ortvalue_from_numpy, self._rope()))
        self._store = store
        table = store.tensors(manifest.embedding)
        name = "head" if manifest.tied else "embedding"
        self._embedding = table[f"{name}.w"], table.get(f"{name}.s")
        self._lanes: weakref.WeakSet[Lane] = weakref.WeakSet()
        self._lanes_lock = threading.Lock()

    @property
    def steps(self) -> Sequence[Step]:
        return self.plan.steps

    def new_cache(self, layers: Iterable[int] | None = None) -> KVCache:
        """For the layers that run here; None: all."""
        layers = range(self.shape.layers) if layers is None else layers
        return KVCache(self.shape, self.context_tokens, layers)

    def lane(self) -> "Lane":
        made = Lane(self)
        with self._lanes_lock:
            self._lanes.add(made)
        return made

    def compile(
        self, steps: Sequence[Step], check: Callable[[Span], None] | None = None
    ) -> dict[Span, Session]:
        """Sessions for the spans of a plan: those that are here, and new ones. Any thread.

        `check` is called before a span is built; what it raises is raised here.
        """

        def built(span: Span) -> Session:
            return make_session(span_graph(self.manifest, self._store, span))

        ready = dict(self.plan.sessions)
        spans = [step for step in steps if isinstance(step, Span)]
        new = [span for span in spans if span not in ready]
        sessions = side_by_side(check or (lambda _span: None), built, new, self.gently)
        ready.update(zip(new, sessions, strict=True))
        return {span: ready[span] for span in spans}

    def adopt(self, steps: Sequence[Step], sessions: Mapping[Span, Session]) -> list[Session]:
        """Parts that begin from now on run this plan. Returns what only the caller holds once
        `left` is true. Any thread."""
        old = self.plan.sessions
        self.plan = Plan(steps, sessions)
        return [session for span, session in old.items() if span not in sessions]

    def left(self) -> bool:
        """Whether no part runs a former plan; lanes that do nothing let go of it here."""
        with self._lanes_lock:
            lanes = list(self._lanes)
        busy = [lane for lane in lanes if not lane.leave(self.plan)]
        return not busy

    def embed(self, tokens: Sequence[int]) -> Rows:
        """Rows (n, H)."""
        w, s = self._embedding
        ids = np.asarray(tokens, np.int64)
        if s is None:
            rows: Rows = w[ids]
        else:
            block = self.shape.hidden // s.shape[1]
            bits = 8 * w.shape[2] // block
            rows = dequantize(w[ids].reshape(len(ids), -1), s[ids], bits)
        if self.shape.embedding_scale != 1:
            rows = rows * F32(self.shape.embedding_scale)
        return rows

    def _rope(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """cos and sin (context, head_dim / 2) of rotary position embedding (Su et al., 2021)."""
        rope = self.shape.rope
        angles = np.outer(np.arange(self.context_tokens), rope.inverse_frequencies)
        cos, sin = np.cos(angles) * rope.scale, np.sin(angles) * rope.scale
        return cos.astype(F32), sin.astype(F32)


class Activations:
    """Buffers of one pass over n rows. What a span reads and writes come in pairs: (1, n, H)."""

    def __init__(self, rows: int, hidden: int, experts: int) -> None:
        self.residual = [np.zeros((1, rows, hidden), F32) for _ in range(2)]
        self.x = [np.zeros((1, rows, hidden), F32) for _ in range(2)]
        self.normed = np.zeros((1, rows, hidden), F32)
        self.gates = np.zeros((rows, experts), F32)
        self.rows = rows


class Lane:
    """What one thread needs to run parts of the trunk."""

    def __init__(self, trunk: Trunk) -> None:
        shape = trunk.shape
        self.trunk = trunk
        self.seqlens_k, self.total = np.zeros(1, np.int32), np.zeros(1, np.int32)
        self.parts: weakref.WeakSet[Part] = weakref.WeakSet()
        self._one = Activations(1, shape.hidden, shape.experts)
        self._many = self._one
        self._logits: NDArray[np.float32] | None = None
        self._plan = trunk.plan
        self._running = threading.Lock()

    def embed(self, tokens: Sequence[int]) -> Rows:
        return self.trunk.embed(tokens)

    def can_run(self, first: int, stop: int, head: bool) -> bool:
        """Whether graphs begin and end at these layers."""
        return bool(part_of(self.trunk.plan.steps, first, stop, head))

    @contextmanager
    def part(
        self, cache: Cache, x: Rows, first: int, stop: int, rows: Sequence[int]
    ) -> Iterator["Part"]:
        """A pass of x (n, H) through layers first..stop-1, after what the cache holds; with the
        head if `rows`, indices whose logits are wanted, are named.

        Raises PeerRefused when no graph begins and ends there.
        """
        assert isinstance(cache, KVCache)
        with self._running:
            self._move_on(self.trunk.plan)
            steps = part_of(self._plan.steps, first, stop, bool(rows))
            if not steps:
                raise PeerRefused(f"no graph runs layers {first} to {stop} here (any more)")
            part = self._prepared(cache, len(x), rows)
            part.begin(steps, x)
            yield part

    def leave(self, plan: Plan) -> bool:
        """Let go of every other plan, unless a part is running on it now. Any thread."""
        if self._plan is plan:
            return True
        if not self._running.acquire(blocking=False):
            return False
        try:
            self._move_on(plan)
        finally:
            self._running.release()
        return True

    def trim(self) -> None:
        """Give back the buffers for many rows."""
        self._many = self._one

    def logits(self, rows: int) -> NDArray[np.float32]:
        if rows > 1:
            return np.empty((1, rows, self.trunk.shape.vocab), F32)
        if self._logits is None:
            self._logits = np.zeros((1, 1, self.trunk.shape.vocab), F32)
        return self._logits

    def _move_on(self, plan: Plan) -> None:
        if self._plan is not plan:
            self._plan = plan
            for part in list(self.parts):
                part.release()

    def _prepared(self, cache: KVCache, count: int, rows: Sequence[int]) -> "Part":
        cache.reserve(cache.length + count)
        if self._many.rows != count:
            shape = self.trunk.shape
            one = count == 1
            self._many = self._one if one else Activations(count, shape.hidden, shape.experts)
        self.seqlens_k[0] = cache.length + count - 1
        self.total[0] = cache.length + count
        if count == 1:
            rows = (0,)  # one binding for all parts of a token
        part = cache.bound
        if not isinstance(part, Part) or not part.reusable(self._plan, self._many, rows):
            part = cache.bound = Part(
                self, self._plan, cache, self._many, np.asarray(rows, np.int64)
            )
        return part


class Part:
    """The bindings of one cache and one set of buffers to spans, reused token after token."""

    def __init__(
        self,
        lane: Lane,
        plan: Plan,
        cache: KVCache,
        buffers: Activations,
        rows: NDArray[np.int64],
    ) -> None:
        self.steps: Sequence[Step] = ()
        self._lane, self._plan, self._cache = lane, plan, cache
        self._buffers, self._rows = buffers, rows
        self._generation = cache.generation
        self._position = 0
        self._logits: NDArray[np.float32] | None = None
        self._bindings: dict[tuple[Span, int], tuple[ort.InferenceSession, Any]] = {}
        self._routed = lane.trunk.shape.routing is not None
        lane.parts.add(self)

    def reusable(self, plan: Plan, buffers: Activations, rows: Sequence[int]) -> bool:
        return (
            self._plan is plan
            and self._generation == self._cache.generation
            and self._buffers is buffers
            and list(rows) == self._rows.tolist()
        )

    def release(self) -> None:
        self._bindings.clear()
        self._plan = Plan((), {})

    def begin(self, steps: Sequence[Step], x: Rows) -> None:
        self.steps, self._position = steps, 0
        self._buffers.residual[0][0] = x
        self._buffers.x[0].fill(0)

    def run(self, span: Span) -> tuple[Rows, Gates | None]:
        """One span. At a cut: the normed rows (n, H) and, of a routed layer, the gate weights
        (n, E). The results are views that the lane's next part overwrites."""
        key = span, self._position % 2
        bound = self._bindings.get(key)
        if bound is None:
            session = self._plan.sessions[span].ort
            bound = self._bindings[key] = session, self._bind(span, session, key[1])
        session, binding = bound
        session.run_with_iobinding(binding)
        self._position += 1
        return self._buffers.normed[0], self._buffers.gates if self._routed else None

    def add(self, y: NDArray[np.float32]) -> None:
        """Hand over the experts' sum (n, H) of the cut layer just passed."""
        self._buffers.x[self._position % 2][0] = y

    def out(self) -> Rows:
        """The logits (len(rows), V), or the residual stream (n, H) with the last experts' sum."""
        last = self.steps[-1]
        if isinstance(last, Span) and last.end == "head":
            assert self._logits is not None
            logits: Rows = self._logits[0]
            return logits
        parity = self._position % 2
        whole: Rows = self._buffers.residual[parity][0] + self._buffers.x[parity][0]
        return whole

    def _bind(self, span: Span, session: ort.InferenceSession, parity: int) -> Any:
        lane, buffers, io = self._lane, self._buffers, session.io_binding()
        _bind(io.bind_input, "residual", buffers.residual[parity])
        if span.first > 0:
            _bind(io.bind_input, "x", buffers.x[parity])
        if span.first < span.stop:
            _bind(io.bind_input, "seqlens_k", lane.seqlens_k)
            _bind(io.bind_input, "total", lane.total)
            for name, value in zip(("cos", "sin"), lane.trunk.cos_sin, strict=True):
                io.bind_ortvalue_input(name, value)
        for layer in range(span.first, span.stop):
            for name, value in zip(
                (f"k{layer}", f"v{layer}"), self._cache.values(layer), strict=True
            ):
                io.bind_ortvalue_input(name, value)
                io.bind_ortvalue_output(name + "_out", value)
        if span.end == "head":
            self._logits = lane.logits(len(self._rows))
            _bind(io.bind_input, "rows", self._rows)
            _bind(io.bind_output, "logits", self._logits)
            return io
        _bind(io.bind_output, "residual_out", buffers.residual[1 - parity])
        if span.end == "experts":
            _bind(io.bind_output, "x_out", buffers.x[1 - parity])
        else:
            _bind(io.bind_output, "normed", buffers.normed)
            if lane.trunk.shape.routing is not None:
                _bind(io.bind_output, "gates", buffers.gates)
        return io


def _bind(bind: Any, name: str, array: NDArray[Any]) -> None:
    bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
