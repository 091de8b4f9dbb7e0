"""The experts' part of a graph: rows and gate weights in, the experts' weighted sum out.

Routed experts are one QMoE node per width: it skips what has gate weight 0, so one node serves
decode, prefill and any subset. The neuron slices of a dense model, all active, are merged into one
wide block of MatMulNBits instead, which decodes about 5 % faster:
swiglu(x) = sum over slices of swiglu_slice(x), exactly.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from onnx import TensorProto

from coeld.engine.graph import ACCURACY, Graph
from coeld.engine.weights import Array, Stored
from coeld.model.manifest import BlobRef, Form, Manifest, Shape, expert_matrices, matrix_form

MERGEABLE: Final = (4, 8, 32)
"""Widths that MatMulNBits runs fast; slices of others go through QMoE."""

NO_LIMIT: Final = 1e30
"""The kernels clamp at 7 unless told otherwise."""


def expert_form(shape: Shape, ref: BlobRef) -> Form:
    """The width of an expert (both of its matrices)."""
    return matrix_form(ref, *expert_matrices(shape)[0])


def session_order(manifest: Manifest, layer: int, experts: Sequence[int]) -> tuple[int, ...]:
    """These experts by width, then id: the order of the gate columns of a graph that holds them."""
    refs = manifest.experts[layer]
    return tuple(sorted(experts, key=lambda e: (expert_form(manifest.shape, refs[e]).bits, e)))


def experts_sum(
    graph: Graph,
    p: str,
    manifest: Manifest,
    layer: int,
    experts: Sequence[int],
    x: str,
    gates: str | None,
    out: str,
) -> str:
    """out = sum over `experts`, given in session order, of gate * expert(x).

    `x` (n, H) or (1, n, H); `gates` (n, len(experts)), None: all 1.
    """
    shape, refs = manifest.shape, [manifest.experts[layer][e] for e in experts]
    forms = {expert_form(shape, ref) for ref in refs}
    if shape.routing is None and len(forms) == 1 and next(iter(forms)).bits in MERGEABLE:
        return _merged(graph, p, shape, refs, x, gates, out)
    return _routed(graph, p, shape, refs, x, gates or _ones(graph, p, x, len(refs)), out)


def _ones(graph: Graph, p: str, x: str, count: int) -> str:
    """(n, count) of 1, one row for each of x."""
    row = graph.add("ReduceMax", [x, graph.integers(-1)], [p + "one0"], keepdims=1)
    zero = graph.add("Sub", [row, row], [p + "one1"])
    ones = graph.constant(f"ones{count}", np.ones(count, np.float32))
    wide = graph.add("Add", [zero, ones], [p + "one2"])
    return graph.add("Reshape", [wide, graph.integers(-1, count)], [p + "ones"])


def _routed(
    graph: Graph, p: str, shape: Shape, refs: Sequence[BlobRef], x: str, gates: str, out: str
) -> str:
    widths = [expert_form(shape, ref).bits for ref in refs]
    groups = [(bits, widths.count(bits)) for bits in sorted(set(widths))]
    columns = [gates]
    if len(groups) > 1:
        columns = [f"{p}gates{bits}" for bits, _count in groups]
        sizes = graph.integers(*(count for _bits, count in groups))
        graph.add("Split", [gates, sizes], columns, axis=1)
    sums = []
    for (bits, count), some in zip(groups, columns, strict=True):
        name = out if len(groups) == 1 else f"{p}y{bits}"
        sums.append(_one_width(graph, f"{p}e{bits}.", shape, refs[:count], x, some, name))
        refs = refs[count:]
    return sums[0] if len(sums) == 1 else graph.add("Sum", sums, [out])


def _one_width(
    graph: Graph, p: str, shape: Shape, refs: Sequence[BlobRef], x: str, gates: str, out: str
) -> str:
    form, act = expert_form(shape, refs[0]), shape.activation
    names = dict.fromkeys(("fc1.w", "fc1.s", "fc1.b", "fc2.w", "fc2.s", "fc2.b"), "")
    for name in names.keys() & refs[0].tensors.keys():
        names[name] = p + name
        graph.weights[p + name] = Stored(graph.blobs, tuple(refs), name)
    attributes = {
        "k": min(shape.top_k, len(refs)),
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "activation_alpha": act.alpha,
        "activation_beta": act.beta,
        "swiglu_limit": act.limit or NO_LIMIT,
        "normalize_routing_weights": 0,
    }
    if form.bits < 32:
        attributes |= {
            "expert_weight_bits": form.bits,
            "block_size": form.block,
            "accuracy_level": ACCURACY,
            "weights_prepacked": 0,
        }
        inputs = [x, gates, *names.values(), *[""] * 6, gates]
        if form.bits == 3:
            return _in_half_precision(graph, p, inputs, out, attributes)
        return graph.add("QMoE", inputs, [out], **attributes)
    # The float32 node only knows a softmax over router logits: it is given log(gate), which yields
    # gate / sum of gates, and its result is multiplied by that sum.
    logs = graph.add("Log", [gates], [p + "log"])
    inputs = [x, logs, *(names[name] for name in ("fc1.w", "fc1.b", "fc2.w", "fc2.b"))]
    mixed = graph.add("MoE", inputs, [p + "mix"], **attributes)
    total = graph.add("ReduceSum", [gates, graph.integers(1)], [p + "total"], keepdims=1)
    return graph.add("Mul", [mixed, total], [out])


def _in_half_precision(
    graph: Graph, p: str, inputs: Sequence[str], out: str, attributes: Mapping[str, Any]
) -> str:
    """QMoE with rows, gates, scales and biases as float16: it knows 3 bits only so."""
    half = {
        name: graph.add("Cast", [name], [f"{p}half{at}"], to=TensorProto.FLOAT16)
        for at, name in enumerate(dict.fromkeys(inputs))
        if name and not name.endswith(".w")
    }
    y = graph.add("QMoE", [half.get(n, n) for n in inputs], [p + "half"], **attributes)
    return graph.add("Cast", [y], [out], to=TensorProto.FLOAT)


def _merged(
    graph: Graph,
    p: str,
    shape: Shape,
    refs: Sequence[BlobRef],
    x: str,
    gates: str | None,
    out: str,
) -> str:
    """Rows of gate and up of the slices follow each other, so do the columns of down."""
    form, slices = expert_form(shape, refs[0]), [graph.blobs.tensors(ref) for ref in refs]
    graph.rows_matmul(x, p + "g", p + "gate", [_halves(t, "fc1", form, 0) for t in slices], form)
    graph.rows_matmul(x, p + "u", p + "up", [_halves(t, "fc1", form, 1) for t in slices], form)
    graph.add("QuickGelu", [p + "g"], [p + "silu"], alpha=1.0)
    hidden = graph.add("Mul", [p + "silu", p + "u"], [p + "h"])
    if gates is not None:  # 1 or 0 per slice
        count, width = len(refs), shape.expert_width
        graph.add("Reshape", [hidden, graph.integers(-1, count, width)], [p + "h3"])
        graph.add("Reshape", [gates, graph.integers(-1, count, 1)], [p + "g3"])
        graph.add("Mul", [p + "h3", p + "g3"], [p + "hg"])
        hidden = graph.add("Reshape", [p + "hg", graph.integers(-1, count * width)], [p + "hm"])
    downs = [_boxed(t, "fc2", form) for t in slices]
    return graph.columns_matmul(hidden, out, p + "down", downs, form)


def _halves(tensors: Mapping[str, Array], name: str, form: Form, half: int) -> tuple[Array, ...]:
    """Every second row of a matrix: its gate rows (half 0) or its up rows (half 1)."""
    return tuple(part[half::2] for part in _boxed(tensors, name, form))


def _boxed(tensors: Mapping[str, Array], name: str, form: Form) -> tuple[Array, ...]:
    """An expert's matrix in the shape that MatMulNBits reads: (w, s), or (w,) if float32."""
    w = tensors[f"{name}.w"][0]
    if form.bits == 32:
        return (w,)
    s = tensors[f"{name}.s"][0]
    return w.reshape(*s.shape, form.block * form.bits // 8), s
