"""The graphs: a span of layers, the experts of one layer. Nodes and weights, no sessions.

The nodes are those ONNX Runtime runs at memory bandwidth on a CPU: MatMulNBits (int8 weights in
blocks, accuracy_level 4: activations quantised to int8 per block) and GroupQueryAttention with
the KV cache bound in place. Neuron slices of a dense layer that are in the same graph are merged
into one wide feed-forward block: swiglu(x) = sum over slices of swiglu_slice(x), exactly.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, ValueInfoProto, helper

from coeld.datapath.plan import Span
from coeld.engine.sessions import Weight
from coeld.model.manifest import HEAD_BLOCK, BlobRef, Manifest, Shape

F32: Final = TensorProto.FLOAT
I32: Final = TensorProto.INT32
I64: Final = TensorProto.INT64
CONTRIB: Final = "com.microsoft"
CONTRIB_OPS: Final = (
    "GroupQueryAttention",
    "MatMulNBits",
    "QuickGelu",
    "SkipSimplifiedLayerNormalization",
)

Arrays = Mapping[str, NDArray[Any]]


class Tensors(Protocol):
    """Where weights come from: the store's memory-mapped views."""

    def tensors(self, ref: BlobRef) -> Arrays: ...


@dataclass(slots=True)
class Graph:
    """A graph under construction."""

    nodes: list[NodeProto] = field(default_factory=list)
    inputs: list[ValueInfoProto] = field(default_factory=list)
    outputs: list[ValueInfoProto] = field(default_factory=list)
    weights: dict[str, Weight] = field(default_factory=dict)

    def add(self, op: str, inputs: list[str], outputs: list[str], **attributes: Any) -> str:
        domain = CONTRIB if op in CONTRIB_OPS else ""
        self.nodes.append(helper.make_node(op, inputs, outputs, domain=domain, **attributes))
        return outputs[0]

    def constant(self, name: str, value: NDArray[Any]) -> str:
        self.weights[name] = Weight((value,))
        return name

    def take(self, name: str, dtype: int, shape: Sequence[str | int]) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def give(self, name: str, dtype: int, shape: Sequence[str | int]) -> None:
        self.outputs.append(helper.make_tensor_value_info(name, dtype, shape))

    def matmul(
        self, x: str, out: str, tag: str, blobs: Sequence[Arrays], name: str, axis: int = 0
    ) -> str:
        """out = x @ dequantised(W).T, where W joins weight `name` of the blobs.

        Along axis 0 outputs follow each other, along axis 1 inputs do. Each part is `name.w`
        (N, K/B, B) uint8 with scales `name.s` (N, K/B) float32.
        """
        n, blocks, block = blobs[0][f"{name}.w"].shape
        n, blocks = (n * len(blobs), blocks) if axis == 0 else (n, blocks * len(blobs))
        for half in (".w", ".s"):
            parts = tuple(blob[name + half] for blob in blobs)
            self.weights[tag + half] = Weight(parts, axis)
        return self.add(
            "MatMulNBits",
            [x, f"{tag}.w", f"{tag}.s"],
            [out],
            K=blocks * block,
            N=n,
            bits=8,
            block_size=block,
            accuracy_level=4,
        )


def span_graph(manifest: Manifest, store: Tensors, span: Span) -> Graph:
    """The graph of a span.

    Inputs: `residual` (1, n, H); `x` (1, n, H), what the previous experts add to it (absent at
    layer 0); `seqlens_k`, `total` int32 (1,); `cos`, `sin` (context, head_dim/2); and per layer
    `k0`, `v0`, … (1, kv_heads, capacity, head_dim). With the head also `rows` int64 (m,): the
    rows whose logits are wanted.
    Outputs: `normed`, `residual_out` (1, n, H), or `logits` (1, m, V); and `k0_out`, ….
    """
    shape, graph = manifest.shape, Graph()
    residual = graph.take("residual", F32, [1, "n", shape.hidden])
    x = graph.take("x", F32, [1, "n", shape.hidden]) if span.first > 0 else None
    if span.first < span.stop:
        for name in ("seqlens_k", "total"):
            graph.take(name, I32, [1])
        for name in ("cos", "sin"):
            graph.take(name, F32, ["context", shape.head_dim // 2])
    for layer in range(span.first, span.stop):
        normed, residual = _attention(graph, shape, store, manifest, layer, residual, x)
        if layer in span.fused():
            blobs = [store.tensors(ref) for ref in manifest.experts[layer]]
            x = _feed_forward(graph, f"l{layer}.", normed, f"l{layer}.y", blobs, None)
    if span.head:
        _head(graph, manifest, store, residual, x)
    else:
        graph.nodes[-1].output[0], graph.nodes[-1].output[3] = "normed", "residual_out"
        graph.give("normed", F32, [1, "n", shape.hidden])
        graph.give("residual_out", F32, [1, "n", shape.hidden])
    return graph


def expert_graph(manifest: Manifest, store: Tensors, layer: int, experts: Sequence[int]) -> Graph:
    """Experts of one layer, merged: `x` (n, H), `mask` (1, len(experts) * I) -> `y` (n, H).

    The mask (1 or 0 per neuron) selects among the experts that are here, so that a caller who
    needs only some of them gets exactly their sum.
    """
    shape, graph = manifest.shape, Graph()
    x = graph.take("x", F32, ["n", shape.hidden])
    mask = graph.take("mask", F32, [1, len(experts) * shape.expert_width])
    blobs = [store.tensors(manifest.experts[layer][expert]) for expert in experts]
    _feed_forward(graph, "", x, "y", blobs, mask)
    graph.give("y", F32, ["n", shape.hidden])
    return graph


def _attention(
    graph: Graph,
    shape: Shape,
    store: Tensors,
    manifest: Manifest,
    layer: int,
    residual: str,
    x: str | None,
) -> tuple[str, str]:
    """residual + x -> norm -> attention -> added and normed again: (normed, residual)."""
    t, p, eps = store.tensors(manifest.attention[layer]), f"l{layer}.", shape.norm_epsilon
    norm1 = graph.constant(p + "norm1", t["attention_norm"])
    if x is None:
        names = [p + "n"]
        graph.add("SimplifiedLayerNormalization", [residual, norm1], names, axis=-1, epsilon=eps)
    else:
        names = [p + "n", "", "", p + "r"]
        graph.add("SkipSimplifiedLayerNormalization", [residual, x, norm1], names, epsilon=eps)
        residual = p + "r"
    graph.matmul(p + "n", p + "qkv", p + "qkv", [t], "qkv")
    cache: list[str | int] = [1, shape.kv_heads, "capacity", shape.head_dim]
    k, v = f"k{layer}", f"v{layer}"
    for name in (k, v):
        graph.take(name, F32, cache)
        graph.give(name + "_out", F32, cache)
    graph.add(
        "GroupQueryAttention",
        [p + "qkv", "", "", k, v, "seqlens_k", "total", "cos", "sin"],
        [p + "a", k + "_out", v + "_out"],
        num_heads=shape.heads,
        kv_num_heads=shape.kv_heads,
        do_rotary=1,
        scale=float(shape.head_dim**-0.5),
    )
    graph.matmul(p + "a", p + "o", p + "o", [t], "o")
    norm2 = graph.constant(p + "norm2", t["ffn_norm"])
    names = [p + "n2", "", "", p + "r2"]
    graph.add("SkipSimplifiedLayerNormalization", [residual, p + "o", norm2], names, epsilon=eps)
    return names[0], names[3]


def _feed_forward(
    graph: Graph, p: str, x: str, out: str, blobs: Sequence[Arrays], mask: str | None
) -> str:
    """Merged SwiGLU slices: rows of gate and up follow each other, so do the columns of down."""

    graph.matmul(x, p + "g", p + "gate", blobs, "gate")
    graph.matmul(x, p + "u", p + "up", blobs, "up")
    graph.add("QuickGelu", [p + "g"], [p + "silu"], alpha=1.0)
    hidden = graph.add("Mul", [p + "silu", p + "u"], [p + "h"])
    if mask is not None:
        hidden = graph.add("Mul", [hidden, mask], [p + "hm"])
    return graph.matmul(hidden, out, p + "down", blobs, "down", axis=1)


def _head(graph: Graph, manifest: Manifest, store: Tensors, residual: str, x: str | None) -> None:
    shape, t = manifest.shape, store.tensors(manifest.head)
    norm = graph.constant("norm", t["norm"])
    assert x is not None, "the head follows at least one layer"
    inputs, eps = [residual, x, norm], shape.norm_epsilon
    graph.add("SkipSimplifiedLayerNormalization", inputs, ["final"], epsilon=eps)
    rows = graph.take("rows", I64, ["m"])
    picked = graph.add("Gather", ["final", rows], ["picked"], axis=1)
    both = _with_remainder(graph, picked, shape.hidden, HEAD_BLOCK)
    graph.matmul(both, "parts", "head", [t], "head")
    graph.constant("halves", np.array([2, -1, shape.vocab], np.int64))
    graph.constant("first", np.array([0], np.int64))
    graph.add("Reshape", ["parts", "halves"], ["stacked"])
    graph.add("ReduceSum", ["stacked", "first"], ["logits"], keepdims=1)
    graph.give("logits", F32, [1, "m", shape.vocab])


def _with_remainder(graph: Graph, x: str, width: int, block: int) -> str:
    """x (1, m, width), and below it what rounding x to int8 in blocks will lose: (2m, width).

    The head multiplies both and adds the results: activations of about 15 bits for the price of a
    second row, which is nothing while memory is the limit. It halves the error of the logits.
    """
    graph.constant("blocks", np.array([-1, width // block, block], np.int64))
    graph.constant("flat", np.array([-1, width], np.int64))
    graph.constant("last", np.array([-1], np.int64))
    graph.constant("step", np.array([1 / 127], np.float32))
    graph.constant("tiny", np.array([1e-30], np.float32))
    graph.add("Reshape", [x, "blocks"], ["b"])
    graph.add("Abs", ["b"], ["size"])
    graph.add("ReduceMax", ["size", "last"], ["loudest"], keepdims=1)
    graph.add("Mul", ["loudest", "step"], ["scale0"])
    graph.add("Max", ["scale0", "tiny"], ["scale"])
    graph.add("Div", ["b", "scale"], ["steps"])
    graph.add("Round", ["steps"], ["rounded"])
    graph.add("Mul", ["rounded", "scale"], ["kept"])
    graph.add("Sub", ["b", "kept"], ["lost"])
    graph.add("Concat", ["b", "lost"], ["rows2"], axis=0)
    return graph.add("Reshape", ["rows2", "flat"], ["rows2_flat"])
