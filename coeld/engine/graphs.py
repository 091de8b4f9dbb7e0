"""The graphs of a plan: a span of layers, the experts of a cut layer. No sessions here."""

from collections.abc import Sequence

from coeld.datapath.plan import Span
from coeld.engine.feed_forward import experts_sum, session_order
from coeld.engine.graph import F32, I32, Graph
from coeld.engine.layers import attention, head
from coeld.engine.router import gate_weights
from coeld.engine.weights import Blobs
from coeld.model.manifest import Manifest


def span_graph(manifest: Manifest, store: Blobs, span: Span) -> Graph:
    """The graph of a span.

    Inputs: `residual` (1, n, H); `x` (1, n, H), what the experts before it give (absent at layer
    0); `seqlens_k`, `total` int32 (1,); `cos`, `sin` (context, head_dim/2); and per layer `k0`,
    `v0`, … (1, kv_heads, capacity, head_dim). With the head also `rows` int64 (m,): the rows whose
    logits are wanted.
    Outputs: `k0_out`, …, and, by what the span ends with: at a cut `normed` and `residual_out`
    (1, n, H), and of a routed layer `gates` (n, E); after experts `x_out` and `residual_out`;
    after the head `logits` (1, m, V).
    """
    shape, graph = manifest.shape, Graph(store)
    hidden: list[str | int] = [1, "n", shape.hidden]
    residual = graph.take("residual", F32, hidden)
    x = graph.take("x", F32, hidden) if span.first > 0 else None
    if span.first < span.stop:
        for name in ("seqlens_k", "total"):
            graph.take(name, I32, [1])
        for name in ("cos", "sin"):
            graph.take(name, F32, ["context", shape.head_dim // 2])
    for layer in range(span.first, span.stop):
        last, p = layer == span.stop - 1, f"l{layer}."
        normed, residual = attention(graph, manifest, layer, residual, x)
        cut = last and span.end == "cut"
        gates = None
        if shape.routing is not None:
            name = "gates" if cut else p + "gates"
            gates = gate_weights(graph, shape, p, manifest.trunk[layer], normed, name)
        if cut:
            _end(graph, ("normed", normed), ("residual_out", residual))
            if gates is not None:
                graph.give(gates, F32, ["n", shape.experts])
            return graph
        name = "x_out" if last and span.end == "experts" else p + "y"
        x = _all_experts(graph, manifest, layer, normed, gates, name)
    if span.end == "head":
        assert x is not None, "the head follows at least one layer"
        head(graph, manifest, residual, x)
    else:
        _end(graph, ("x_out", "x_out"), ("residual_out", residual))
    return graph


def expert_graph(manifest: Manifest, store: Blobs, layer: int, experts: Sequence[int]) -> Graph:
    """Experts of one layer, in session order: x (n, H), gates (n, len(experts)) to y (n, H)."""
    shape, graph = manifest.shape, Graph(store)
    x = graph.take("x", F32, ["n", shape.hidden])
    gates = graph.take("gates", F32, ["n", len(experts)])
    experts_sum(graph, "", manifest, layer, experts, x, gates, "y")
    graph.give("y", F32, ["n", shape.hidden])
    return graph


def _all_experts(
    graph: Graph, manifest: Manifest, layer: int, x: str, gates: str | None, out: str
) -> str:
    """The sum over all experts of a layer, with gate columns put into session order."""
    p, everyone = f"l{layer}.", range(manifest.shape.experts)
    order = session_order(manifest, layer, everyone)
    if gates is not None and order != tuple(everyone):
        gates = graph.add("Gather", [gates, graph.integers(*order)], [p + "sorted"], axis=1)
    return experts_sum(graph, p, manifest, layer, order, x, gates, out)


def _end(graph: Graph, *outputs: tuple[str, str]) -> None:
    """Give (name, value) pairs of (1, n, H), renaming the values."""
    names = {value: name for name, value in outputs}
    for node in graph.nodes:
        for values in (node.input, node.output):
            for index, value in enumerate(values):
                values[index] = names.get(value, value)
    hidden = graph.inputs[0].type.tensor_type.shape.dim[2].dim_value
    for name, _value in outputs:
        graph.give(name, F32, [1, "n", hidden])
