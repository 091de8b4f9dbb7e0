"""Blobs: each part of a model as a valid ONNX model of its own, its weights aligned in the file.

Anyone can open a blob with onnxruntime and run it alone: an expert's computes that expert, all
others apply their matrices, one input and output each. The engine does not run them: it maps the
file and reads the weights in place, into graphs that span layers. That needs each weight at a
multiple of 64 bytes, and large ones at the beginning of a page. Protobuf offers no alignment, but
two of its rules give it: a message may be written in pieces, to be merged by the reader, and of a
repeated single field the last one counts. So a blob is the serialised graph, then for each weight
one more piece of the model: a `doc_string` of as many spaces as the alignment takes, and a `graph`
with that one initializer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from coeld.compression.quantize import quantize
from coeld.model.manifest import ALIGN, PAGE, Activation, Form, Shape, TensorRef

Weights = Mapping[str, NDArray[Any]]
"""Arrays by their name in the blob, uint8 or float32; a matrix `x` is `x.w` and perhaps `x.s`."""

OPSET: Final = 21
IR_VERSION: Final = 10
ACCURACY: Final = 4
"""Activations are quantised to int8 per block: several times faster than float32."""
FLOAT_BITS: Final = 32

MICROSOFT: Final = "com.microsoft"

# Protobuf tags (field number << 3 | wire type 2) of onnx.proto3.
MODEL_DOC_STRING: Final = b"\x32"
MODEL_GRAPH: Final = b"\x3a"
GRAPH_INITIALIZER: Final = b"\x2a"
TENSOR_RAW_DATA: Final = b"\x4a"


@dataclass(frozen=True, slots=True)
class Blob:
    """A file to be: its bytes in pieces, and where the weights are."""

    pieces: Sequence[bytes | memoryview]
    tensors: dict[str, TensorRef]


def expert_matrix(
    weight: NDArray[np.float32],
    name: str,
    bits: int,
    block: int,
    importance: NDArray[np.float32] | None = None,
) -> Weights:
    """(N, K) as QMoE and MoE read it, for one expert."""
    if bits == FLOAT_BITS:
        return {f"{name}.w": weight[None]}
    w, s = quantize(weight, bits, block, importance)
    return {f"{name}.w": w[None], f"{name}.s": s[None]}


def matrix(weight: NDArray[np.float32], name: str, bits: int, block: int) -> Weights:
    """(N, K) as MatMulNBits reads it."""
    if bits == FLOAT_BITS:
        return {f"{name}.w": weight}
    w, s = quantize(weight, bits, block)
    return {f"{name}.w": w.reshape(*s.shape, -1), f"{name}.s": s}


def expert_blob(weights: Weights, shape: Shape) -> Blob:
    """x (n, H) and gate (n, 1) to y (n, H), the expert's output times the gate."""
    nodes = (
        _quantised_expert(weights, shape) if "fc1.s" in weights else _exact_expert(weights, shape)
    )
    inputs = [_floats("x", "n", shape.hidden), _floats("gate", "n", 1)]
    return _blob("expert", nodes, inputs, [_floats("y", "n", shape.hidden)], weights)


def _quantised_expert(weights: Weights, shape: Shape) -> list[Any]:
    """One QMoE node of one expert. At 3 bits the operator wants everything in half precision."""
    bits = 8 * weights["fc1.w"].shape[-1] // shape.hidden
    inputs = ["x", "gate", "fc1.w", "fc1.s", "fc1.b", "fc2.w", "fc2.s", "fc2.b"]
    inputs = [name if name in weights or name in ("x", "gate") else "" for name in inputs]
    inputs += [""] * 6 + ["gate"]
    options = _moe_attributes(shape.activation) | {
        "expert_weight_bits": bits,
        "block_size": shape.hidden // weights["fc1.s"].shape[-1],
        "accuracy_level": ACCURACY,
    }
    if bits != 3:
        return [helper.make_node("QMoE", inputs, ["y"], domain=MICROSOFT, **options)]
    floats = sorted({name for name in inputs if name and not name.endswith(".w")})
    options["weights_prepacked"] = 0  # also wanted at 3 bits only
    half = [f"{name}.half" if name in floats else name for name in inputs]
    return [
        *(helper.make_node("Cast", [x], [f"{x}.half"], to=TensorProto.FLOAT16) for x in floats),
        helper.make_node("QMoE", half, ["y.half"], domain=MICROSOFT, **options),
        helper.make_node("Cast", ["y.half"], ["y"], to=TensorProto.FLOAT),
    ]


def _exact_expert(weights: Weights, shape: Shape) -> list[Any]:
    """One MoE node of one expert, which knows no gate, and a multiplication."""
    inputs = ["x", "gate", "fc1.w", "fc1.b", "fc2.w", "fc2.b"]
    inputs = [name if name in weights or name in ("x", "gate") else "" for name in inputs]
    options = _moe_attributes(shape.activation)
    return [
        helper.make_node("MoE", inputs, ["plain"], domain=MICROSOFT, **options),
        helper.make_node("Mul", ["plain", "gate"], ["y"]),
    ]


def _moe_attributes(activation: Activation) -> dict[str, Any]:
    """Alpha and beta always explicit; without a limit there is none, as the operators define it."""
    found = {
        "k": 1,
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "normalize_routing_weights": 0,
        "activation_alpha": activation.alpha,
        "activation_beta": activation.beta,
    }
    return found | ({"swiglu_limit": activation.limit} if activation.limit else {})


def linear_blob(name: str, weights: Weights, form: Form) -> Blob:
    """For every matrix `m`: m.in (n, K) to m.out (n, N), with its bias; other weights as they are.

    `form`: of those that are quantised.
    """
    nodes, inputs, outputs = [], [], []
    for key, value in weights.items():
        matrix, _, end = key.rpartition(".")
        if end == "w":
            scale = weights.get(f"{matrix}.s")
            n = value.shape[0]
            k = value.shape[1] if scale is None else scale.shape[1] * form.block
            inputs.append(_floats(f"{matrix}.in", "n", k))
            outputs.append(_floats(f"{matrix}.out", "n", n))
            nodes += _linear(matrix, n, k, form if scale is not None else None, weights)
        elif end not in ("s", "b"):
            outputs.append(_floats(f"{key}.out", *value.shape))
            nodes.append(helper.make_node("Identity", [key], [f"{key}.out"]))
    return _blob(name, nodes, inputs, outputs, weights)


def _linear(name: str, n: int, k: int, form: Form | None, weights: Weights) -> list[Any]:
    x, product, out = f"{name}.in", f"{name}.product", f"{name}.out"
    biased = f"{name}.b" in weights
    y = product if biased else out
    if form is None:
        node = helper.make_node("Gemm", [x, f"{name}.w"], [y], transB=1)
    else:
        node = helper.make_node(
            "MatMulNBits",
            [x, f"{name}.w", f"{name}.s"],
            [y],
            domain=MICROSOFT,
            K=k,
            N=n,
            bits=form.bits,
            block_size=form.block,
            accuracy_level=ACCURACY,
        )
    return [node, helper.make_node("Add", [y, f"{name}.b"], [out])] if biased else [node]


def _floats(name: str, *dims: int | str) -> Any:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(dims))


def _blob(
    name: str, nodes: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any], weights: Weights
) -> Blob:
    model = helper.make_model(
        helper.make_graph(nodes, name, inputs, outputs),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)],
        ir_version=IR_VERSION,
        producer_name="coeld",
    )
    return append_weights(model.SerializeToString(deterministic=True), weights)


def append_weights(model: bytes, weights: Weights) -> Blob:
    """The serialised model with the weights as initializers."""
    pieces: list[bytes | memoryview] = [model]
    at = len(model)
    refs = {}
    for name, value in weights.items():
        raw = np.ascontiguousarray(value, value.dtype.newbyteorder("<"))
        tensor = _tensor(name, raw).SerializeToString(deterministic=True)
        tensor += TENSOR_RAW_DATA + _varint(raw.nbytes)
        initializer = GRAPH_INITIALIZER + _varint(len(tensor) + raw.nbytes) + tensor
        head = MODEL_GRAPH + _varint(len(initializer) + raw.nbytes) + initializer
        paged = raw.nbytes >= PAGE and raw.nbytes % PAGE == 0
        pad = _padding(at + len(head), PAGE if paged else ALIGN)
        at += len(pad) + len(head)
        refs[name] = TensorRef("uint8" if raw.dtype == np.uint8 else "float32", raw.shape, at)
        pieces += [pad, head, raw.reshape(-1).view(np.uint8).data]
        at += raw.nbytes
    return Blob(pieces, refs)


def _padding(at: int, align: int) -> bytes:
    """A doc_string as long as takes `at` to a multiple of `align`."""
    for width in (1, 2, 3):  # of the varint that says how many spaces follow
        spaces = -(at + len(MODEL_DOC_STRING) + width) % align
        for count in (spaces, spaces + align):
            length = _varint(count)
            if len(length) == width:
                return MODEL_DOC_STRING + length + b" " * count
    raise AssertionError(f"no padding for {at} to {align}")


def _tensor(name: str, value: NDArray[Any]) -> TensorProto:
    """Name, type and shape; the data comes separately."""
    kind = helper.np_dtype_to_tensor_dtype(value.dtype)
    return TensorProto(name=name, data_type=kind, dims=value.shape)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
