"""The trunk: embedding, attention and head of one model, run span by span.

One thread, the decoder's, owns it. A pass is `begin`, then `run` for every span of the plan with
`add` between them for what the experts of a cut layer gave, then the logits come out of the last
span. Buffers for one row are bound once per request, so that a decoded token costs one session
call per span and no allocation.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from coeld.compression.quantize import dequantize
from coeld.datapath.plan import Span, Step
from coeld.datapath.ports import Cache, Gates, Rows
from coeld.engine.graphs import span_graph
from coeld.engine.kvcache import KVCache
from coeld.engine.sessions import Session, make_session
from coeld.engine.side_by_side import side_by_side
from coeld.model.manifest import Manifest
from coeld.model.store import Store

F32: Final = np.float32


class Activations:
    """Buffers of one pass over n rows. What a span reads and writes come in pairs: (1, n, H)."""

    def __init__(self, rows: int, hidden: int, experts: int) -> None:
        self.residual = [np.zeros((1, rows, hidden), F32) for _ in range(2)]
        self.x = [np.zeros((1, rows, hidden), F32) for _ in range(2)]
        self.normed = np.zeros((1, rows, hidden), F32)
        self.gates = np.zeros((rows, experts), F32)
        self.rows = rows


class Trunk:
    """The trunk of one model on this device."""

    def __init__(self, manifest: Manifest, store: Store, context_tokens: int) -> None:
        self.manifest = manifest
        self.shape = manifest.shape
        self.context_tokens = context_tokens
        self.steps: Sequence[Step] = ()
        self._store = store
        self._sessions: Mapping[Span, Session] = {}
        table = store.tensors(manifest.embedding)
        name = "head" if manifest.tied else "embedding"
        self._embedding = table[f"{name}.w"], table.get(f"{name}.s")
        self._cos_sin = tuple(map(ort.OrtValue.ortvalue_from_numpy, self._rope()))
        self._seqlens_k, self._total = np.zeros(1, np.int32), np.zeros(1, np.int32)
        self._one = Activations(1, self.shape.hidden, self.shape.experts)
        self._many = self._one
        self._logits = np.zeros((1, 1, self.shape.vocab), F32)
        self._pass: _Pass | None = None
        self._passes: weakref.WeakSet[_Pass] = weakref.WeakSet()

    def new_cache(self) -> KVCache:
        return KVCache(self.shape, self.context_tokens)

    def compile(
        self, steps: Sequence[Step], check: Callable[[Span], None] | None = None
    ) -> dict[Span, Session]:
        """Sessions for the spans of a plan: those that are here, and new ones. Any thread.

        `check` is called before a span is built; what it raises is raised here.
        """

        def built(span: Span) -> Session:
            return make_session(span_graph(self.manifest, self._store, span))

        ready = dict(self._sessions)
        spans = [step for step in steps if isinstance(step, Span)]
        new = [span for span in spans if span not in ready]
        sessions = side_by_side(check or (lambda _span: None), built, new)
        ready.update(zip(new, sessions, strict=True))
        return {span: ready[span] for span in spans}

    def adopt(self, steps: Sequence[Step], sessions: Mapping[Span, Session]) -> list[Session]:
        """Run this plan from the next pass on. Returns what only the caller holds now."""
        retired = [old for span, old in self._sessions.items() if span not in sessions]
        self.steps, self._sessions = steps, sessions
        self._pass = None
        for bound in list(self._passes):
            bound.release()
        return retired

    def begin(self, cache: Cache, tokens: Sequence[int], rows: Sequence[int]) -> None:
        """Start a pass over `tokens`, which follow what the cache holds.

        `rows`: indices into `tokens` whose logits are wanted (at least one).
        """
        assert isinstance(cache, KVCache)
        count = len(tokens)
        cache.reserve(cache.length + count)
        if self._many.rows != count:
            hidden, experts = self.shape.hidden, self.shape.experts
            self._many = self._one if count == 1 else Activations(count, hidden, experts)
        self._seqlens_k[0] = cache.length + count - 1
        self._total[0] = cache.length + count
        self._many.residual[0][0] = self._embed(tokens)
        bound = cache.bound if isinstance(cache.bound, _Pass) else None
        if bound is None or not bound.reusable(self._sessions, self._many, rows):
            bound = cache.bound = _Pass(self, cache, self._many, np.asarray(rows, np.int64))
        self._pass = bound
        bound.position = 0

    def run(self, span: Span) -> tuple[Rows, Gates | None]:
        """One span. At a cut: the normed rows (n, H) and, of a routed layer, the gate weights
        (n, E); after the head: the logits (m, V).

        The results are views that the next pass overwrites.
        """
        assert self._pass is not None, "begin comes first"
        return self._pass.run(span)

    def add(self, y: NDArray[np.float32]) -> None:
        """Hand over the experts' sum (n, H) of the cut layer just passed."""
        assert self._pass is not None
        self._many.x[self._pass.position % 2][0] = y

    def _embed(self, tokens: Sequence[int]) -> NDArray[np.float32]:
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


class _Pass:
    """The bindings of one cache and one set of buffers to the spans, reused token after token."""

    def __init__(
        self, trunk: Trunk, cache: KVCache, buffers: Activations, rows: NDArray[np.int64]
    ) -> None:
        self.position = 0
        self._trunk, self._cache, self._buffers, self._rows = trunk, cache, buffers, rows
        self._sessions = trunk._sessions
        self._generation = cache.generation
        single = len(rows) == 1
        self._logits = trunk._logits if single else np.empty((1, len(rows), trunk.shape.vocab), F32)
        self._bindings: dict[Span, Any] = {}
        trunk._passes.add(self)

    def reusable(
        self, sessions: Mapping[Span, Session], buffers: Activations, rows: Sequence[int]
    ) -> bool:
        return (
            self._sessions is sessions
            and self._generation == self._cache.generation
            and self._buffers is buffers
            and list(rows) == self._rows.tolist()
        )

    def release(self) -> None:
        self._bindings.clear()
        self._sessions = {}

    def run(self, span: Span) -> tuple[Rows, Gates | None]:
        session = self._sessions[span].ort
        binding = self._bindings.get(span)
        if binding is None:
            binding = self._bindings[span] = self._bind(span, session, self.position % 2)
        session.run_with_iobinding(binding)
        self.position += 1
        if span.end == "head":
            return self._logits[0], None
        routed = self._trunk.shape.routing is not None
        return self._buffers.normed[0], self._buffers.gates if routed else None

    def _bind(self, span: Span, session: ort.InferenceSession, parity: int) -> Any:
        trunk, buffers, io = self._trunk, self._buffers, session.io_binding()
        _bind(io.bind_input, "residual", buffers.residual[parity])
        if span.first > 0:
            _bind(io.bind_input, "x", buffers.x[parity])
        if span.first < span.stop:
            _bind(io.bind_input, "seqlens_k", trunk._seqlens_k)
            _bind(io.bind_input, "total", trunk._total)
            for name, value in zip(("cos", "sin"), trunk._cos_sin, strict=True):
                io.bind_ortvalue_input(name, value)
        for layer in range(span.first, span.stop):
            for offset, name in enumerate((f"k{layer}", f"v{layer}")):
                io.bind_ortvalue_input(name, self._cache.values[2 * layer + offset])
                io.bind_ortvalue_output(name + "_out", self._cache.values[2 * layer + offset])
        if span.end == "head":
            _bind(io.bind_input, "rows", self._rows)
            _bind(io.bind_output, "logits", self._logits)
            return io
        _bind(io.bind_output, "residual_out", buffers.residual[1 - parity])
        if span.end == "experts":
            _bind(io.bind_output, "x_out", buffers.x[1 - parity])
        else:
            _bind(io.bind_output, "normed", buffers.normed)
            if trunk.shape.routing is not None:
                _bind(io.bind_output, "gates", buffers.gates)
        return io


def _bind(bind: Any, name: str, array: NDArray[Any]) -> None:
    bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
