"""The trunk: embedding, attention and head of one model, run span by span.

One thread, the decoder's, owns it. A pass is `begin`, then `run` for every span of the plan with
`add` between them for what the experts of a cut layer gave, then the logits come out of the last
span. Buffers for one row are bound once per request, so that a decoded token costs one session
call per span and no allocation.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from coeld.datapath.plan import Span, Step
from coeld.datapath.ports import Cache, Rows
from coeld.engine.graphs import span_graph
from coeld.engine.kvcache import KVCache
from coeld.engine.sessions import give_memory_back, make_session
from coeld.model.manifest import Manifest
from coeld.model.store import Store

F32: Final = np.float32


class Activations:
    """Buffers of one pass over n rows: float32 (1, n, H), residual twice (in and out)."""

    def __init__(self, rows: int, hidden: int) -> None:
        self.residual = [np.zeros((1, rows, hidden), F32) for _ in range(2)]
        self.x = np.zeros((1, rows, hidden), F32)
        self.normed = np.zeros((1, rows, hidden), F32)
        self.rows = rows


class Trunk:
    """The trunk of one model on this device."""

    def __init__(self, manifest: Manifest, store: Store, context_tokens: int) -> None:
        self.manifest = manifest
        self.shape = manifest.shape
        self.context_tokens = context_tokens
        self._store = store
        self._sessions: dict[Span, ort.InferenceSession] = {}
        table = store.tensors(manifest.embedding)
        name = "head" if manifest.tied else "embedding"
        self._embedding = table[f"{name}.w"], table[f"{name}.s"]
        self._cos_sin = tuple(map(ort.OrtValue.ortvalue_from_numpy, self._rope()))
        self._seqlens_k, self._total = np.zeros(1, np.int32), np.zeros(1, np.int32)
        self._one = Activations(1, self.shape.hidden)
        self._many = self._one
        self._logits = np.zeros((1, 1, self.shape.vocab), F32)
        self._pass: _Pass | None = None

    def new_cache(self) -> KVCache:
        return KVCache(self.shape, self.context_tokens)

    def prepare(self, steps: Sequence[Step]) -> None:
        """Compile the spans of a plan and let go of all others (first, to bound memory)."""
        wanted = [step for step in steps if isinstance(step, Span)]
        for span in set(self._sessions) - set(wanted):
            del self._sessions[span]
        self._pass = None
        for span in wanted:
            if span not in self._sessions:
                graph = span_graph(self.manifest, self._store, span)
                self._sessions[span] = make_session(
                    graph.nodes, graph.inputs, graph.outputs, graph.weights
                )
        give_memory_back()

    def begin(self, cache: Cache, tokens: Sequence[int], rows: Sequence[int]) -> None:
        """Start a pass over `tokens`, which follow what the cache holds.

        `rows`: indices into `tokens` whose logits are wanted (at least one).
        """
        assert isinstance(cache, KVCache)
        count = len(tokens)
        cache.reserve(cache.length + count)
        if self._many.rows != count:
            self._many = self._one if count == 1 else Activations(count, self.shape.hidden)
        self._seqlens_k[0] = cache.length + count - 1
        self._total[0] = cache.length + count
        self._many.residual[0][0] = self._embed(tokens)
        if self._pass is None or not self._pass.reusable(cache, self._many, rows):
            self._pass = _Pass(self, cache, self._many, np.asarray(rows, np.int64))
        self._pass.position = 0

    def run(self, span: Span) -> Rows:
        """The next span. Returns its normed rows (n, H), or the logits (m, V) if it has the head.

        The result is a view that the next pass overwrites.
        """
        assert self._pass is not None, "begin comes first"
        return self._pass.run(span, self._sessions[span])

    def add(self, y: NDArray[np.float32]) -> None:
        """Hand over the experts' sum (n, H) of the cut layer just passed."""
        self._many.x[0] = y

    def _embed(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        w, s = self._embedding
        ids = np.asarray(tokens, np.int64)
        rows: Rows = (w[ids].astype(F32) - 128) * s[ids][..., None]
        return rows.reshape(len(ids), -1)

    def _rope(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """cos and sin (context, head_dim / 2) of rotary position embedding (Su et al., 2021)."""
        d = self.shape.head_dim
        inverse = self.shape.rope_base ** (-np.arange(0, d, 2, dtype=np.float64) / d)
        angles = np.outer(np.arange(self.context_tokens), inverse)
        return np.cos(angles).astype(F32), np.sin(angles).astype(F32)


class _Pass:
    """The bindings of one cache and one set of buffers to the spans, reused token after token."""

    def __init__(
        self, trunk: Trunk, cache: KVCache, buffers: Activations, rows: NDArray[np.int64]
    ) -> None:
        self.position = 0
        self._trunk, self._cache, self._buffers, self._rows = trunk, cache, buffers, rows
        self._generation = cache.generation
        single = len(rows) == 1
        self._logits = trunk._logits if single else np.empty((1, len(rows), trunk.shape.vocab), F32)
        self._bindings = cache.bindings = {}

    def reusable(self, cache: KVCache, buffers: Activations, rows: Sequence[int]) -> bool:
        return (
            self._cache is cache
            and self._generation == cache.generation
            and self._buffers is buffers
            and list(rows) == self._rows.tolist()
        )

    def run(self, span: Span, session: ort.InferenceSession) -> NDArray[np.float32]:
        binding = self._bindings.get(span)
        if binding is None:
            binding = self._bindings[span] = self._bind(span, session, self.position % 2)
        session.run_with_iobinding(binding)
        self.position += 1
        out: Rows = self._logits[0] if span.head else self._buffers.normed[0]
        return out

    def _bind(self, span: Span, session: ort.InferenceSession, parity: int) -> Any:
        trunk, buffers, io = self._trunk, self._buffers, session.io_binding()
        _bind(io.bind_input, "residual", buffers.residual[parity])
        if span.first > 0:
            _bind(io.bind_input, "x", buffers.x)
        if span.first < span.stop:
            _bind(io.bind_input, "seqlens_k", trunk._seqlens_k)
            _bind(io.bind_input, "total", trunk._total)
            for name, value in zip(("cos", "sin"), trunk._cos_sin, strict=True):
                io.bind_ortvalue_input(name, value)
        for layer in range(span.first, span.stop):
            for offset, name in enumerate((f"k{layer}", f"v{layer}")):
                io.bind_ortvalue_input(name, self._cache.values[2 * layer + offset])
                io.bind_ortvalue_output(name + "_out", self._cache.values[2 * layer + offset])
        if span.head:
            _bind(io.bind_input, "rows", self._rows)
            _bind(io.bind_output, "logits", self._logits)
        else:
            _bind(io.bind_output, "normed", buffers.normed)
            _bind(io.bind_output, "residual_out", buffers.residual[1 - parity])
        return io


def _bind(bind: Any, name: str, array: NDArray[Any]) -> None:
    bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
