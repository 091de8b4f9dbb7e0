"""The trunk's parts of a graph: attention, the shared expert, the head."""

import numpy as np

from coeld.engine.graph import F32, I64, Graph
from coeld.model.manifest import BlobRef, Form, Manifest, Shape, matrix_form, trunk_matrices


def attention(
    graph: Graph, manifest: Manifest, layer: int, residual: str, x: str | None
) -> tuple[str, str]:
    """residual + x -> norm -> attention -> added and normed again: (normed, residual).

    `x` is what the experts of the layer before gave, None at layer 0. All (1, n, H).
    """
    shape, ref, p = manifest.shape, manifest.trunk[layer], f"l{layer}."
    eps, forms = shape.norm_epsilon, _forms(shape, ref)
    norm1 = graph.stored(p + "norm1", ref, "attention_norm")
    if x is None:
        names = [p + "n"]
        graph.add("SimplifiedLayerNormalization", [residual, norm1], names, axis=-1, epsilon=eps)
    else:
        names = [p + "n", "", "", p + "r"]
        graph.add("SkipSimplifiedLayerNormalization", [residual, x, norm1], names, epsilon=eps)
        residual = p + "r"
    graph.matmul(p + "n", p + "qkv", p + "qkv", ref, "qkv", forms["qkv"])
    qkv = [p + "qkv", "", ""] if shape.qk_norm == "none" else _normed_qkv(graph, shape, ref, p)
    k, v = f"k{layer}", f"v{layer}"
    cache: list[str | int] = [1, shape.kv_heads, "capacity", shape.head_dim]
    for name in (k, v):
        graph.take(name, F32, cache)
        graph.give(name + "_out", F32, cache)
    sinks = ["", "", graph.stored(p + "sinks", ref, "sinks")] if "sinks" in ref.tensors else []
    window = shape.windows[layer] if shape.windows else 0
    graph.add(
        "GroupQueryAttention",
        [*qkv, k, v, "seqlens_k", "total", "cos", "sin", *sinks],
        [p + "a", k + "_out", v + "_out"],
        num_heads=shape.heads,
        kv_num_heads=shape.kv_heads,
        do_rotary=1,
        scale=shape.attention_scale,
        local_window_size=window or -1,
    )
    graph.matmul(p + "a", p + "o", p + "o", ref, "o", forms["o"])
    norm2 = graph.stored(p + "norm2", ref, "ffn_norm")
    names = [p + "n2", "", "", p + "r2"]
    graph.add("SkipSimplifiedLayerNormalization", [residual, p + "o", norm2], names, epsilon=eps)
    normed, residual = names[0], names[3]
    if shape.shared_width:
        residual = _shared_expert(graph, shape, ref, p, normed, residual)
    return normed, residual


def _forms(shape: Shape, ref: BlobRef) -> dict[str, Form]:
    return {name: matrix_form(ref, name, n, k) for name, n, k in trunk_matrices(shape)}


def _normed_qkv(graph: Graph, shape: Shape, ref: BlobRef, p: str) -> list[str]:
    """Splits q, k and v, and norms q and k per head, or over all heads together."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    parts = [p + "q", p + "k", p + "v"]
    graph.add("Split", [p + "qkv", graph.integers(q, kv, kv)], parts, axis=-1)
    for part, name, heads in (
        (parts[0], "q_norm", shape.heads),
        (parts[1], "k_norm", shape.kv_heads),
    ):
        weight = graph.stored(p + name, ref, name)
        inside, width = part, heads * shape.head_dim
        if shape.qk_norm == "head":
            rows = graph.integers(1, -1, heads, shape.head_dim)
            inside = graph.add("Reshape", [part, rows], [part + "h"])
        attributes = {"axis": -1, "epsilon": shape.norm_epsilon}
        graph.add("SimplifiedLayerNormalization", [inside, weight], [part + "n"], **attributes)
        graph.add("Reshape", [part + "n", graph.integers(1, -1, width)], [part + "f"])
    return [parts[0] + "f", parts[1] + "f", parts[2]]


def _shared_expert(
    graph: Graph, shape: Shape, ref: BlobRef, p: str, normed: str, residual: str
) -> str:
    """residual + shared expert of the normed rows, gated by its own score if it has one."""
    forms = _forms(shape, ref)
    for name in ("shared_gate", "shared_up"):
        graph.matmul(normed, p + name, p + name, ref, name, forms[name])
    graph.add("QuickGelu", [p + "shared_gate"], [p + "shared_silu"], alpha=1.0)
    graph.add("Mul", [p + "shared_silu", p + "shared_up"], [p + "shared_h"])
    name = "shared_down"
    out = graph.matmul(p + "shared_h", p + name, p + name, ref, name, forms[name])
    if "shared_score" in ref.tensors:
        score = graph.stored(p + "shared_score", ref, "shared_score")
        graph.add("FusedMatMul", [normed, score], [p + "score"], transB=1)
        graph.add("Sigmoid", [p + "score"], [p + "open"])
        out = graph.add("Mul", [out, p + "open"], [p + "shared_y"])
    return graph.add("Add", [residual, out], [p + "r3"])


def head(graph: Graph, manifest: Manifest, residual: str, x: str) -> None:
    """residual + x -> norm -> the wanted `rows` int64 (m,) -> `logits` (1, m, V)."""
    shape, ref = manifest.shape, manifest.head
    form = matrix_form(ref, "head", shape.vocab, shape.hidden)
    norm = graph.stored("norm", ref, "norm")
    inputs, eps = [residual, x, norm], shape.norm_epsilon
    graph.add("SkipSimplifiedLayerNormalization", inputs, ["final"], epsilon=eps)
    rows = graph.take("rows", I64, ["m"])
    picked = graph.add("Gather", ["final", rows], ["picked"], axis=1)
    if form.bits == 32:
        graph.matmul(picked, "logits", "head", ref, "head", form)
    else:
        both = _with_remainder(graph, picked, shape.hidden, form.block)
        graph.matmul(both, "parts", "head", ref, "head", form)
        graph.add("Reshape", ["parts", graph.integers(2, -1, shape.vocab)], ["stacked"])
        graph.add("ReduceSum", ["stacked", graph.integers(0)], ["logits"], keepdims=1)
    graph.give("logits", F32, [1, "m", shape.vocab])


def _with_remainder(graph: Graph, x: str, width: int, block: int) -> str:
    """x (1, m, width), and below it what rounding x to int8 in blocks will lose: (2m, width).

    The head multiplies both and adds the results: activations of about 15 bits for the price of a
    second row, which is nothing while memory is the limit. It halves the error of the logits.
    """
    graph.constant("step", np.array([1 / 127], np.float32))
    graph.constant("tiny", np.array([1e-30], np.float32))
    graph.add("Reshape", [x, graph.integers(-1, width // block, block)], ["b"])
    graph.add("Abs", ["b"], ["size"])
    graph.add("ReduceMax", ["size", graph.integers(-1)], ["loudest"], keepdims=1)
    graph.add("Mul", ["loudest", "step"], ["scale0"])
    graph.add("Max", ["scale0", "tiny"], ["scale"])
    graph.add("Div", ["b", "scale"], ["steps"])
    graph.add("Round", ["steps"], ["rounded"])
    graph.add("Mul", ["rounded", "scale"], ["kept"])
    graph.add("Sub", ["b", "kept"], ["lost"])
    graph.add("Concat", ["b", "lost"], ["rows2"], axis=0)
    return graph.add("Reshape", ["rows2", graph.integers(-1, width)], ["rows2_flat"])
