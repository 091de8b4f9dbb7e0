"""Blobs: each part of a model as a valid ONNX model of its own, its weights aligned in the file.

Anyone can open a blob with onnxruntime and run it alone. The engine does not: it maps the file and
reads the weights in place, which needs each weight at a multiple of 64 bytes. Protobuf offers no
alignment, but two of its rules give it: a message may be written in pieces, to be merged by the
reader, and of a repeated single field the last one counts. So a blob is the serialised graph, then
for each weight one more piece of the model: a `doc_string` of as many spaces as the alignment
takes, and a `graph` with that one initializer.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from coeld.model.manifest import ALIGN, HEAD_BLOCK, Shape, TensorRef

Weights = Mapping[str, NDArray[Any]]
"""Arrays by their name in the blob, uint8 or float32; a matrix `x` is `x.w` and `x.s`."""

OPSET: Final = 21
IR_VERSION: Final = 10
BITS: Final = 8
ACCURACY: Final = 4
"""Activations are quantised to int8 per block: several times faster than float32."""

MICROSOFT: Final = "com.microsoft"

# Protobuf tags (field number << 3 | wire type 2) of onnx.proto3.
MODEL_DOC_STRING: Final = b"\x32"
MODEL_GRAPH: Final = b"\x3a"
GRAPH_INITIALIZER: Final = b"\x2a"
TENSOR_RAW_DATA: Final = b"\x4a"


def expert_blob(weights: Weights, shape: Shape) -> tuple[bytes, dict[str, TensorRef]]:
    """x (n, H) to y (n, H) = down(silu(gate(x)) * up(x))."""
    h, i = shape.hidden, shape.expert_width
    nodes = [
        _matmul("x", "gate", "g", i, h, shape.block),
        _matmul("x", "up", "u", i, h, shape.block),
        helper.make_node("QuickGelu", ["g"], ["silu"], domain=MICROSOFT, alpha=1.0),
        helper.make_node("Mul", ["silu", "u"], ["hidden"]),
        _matmul("hidden", "down", "y", h, i, shape.block),
    ]
    return _blob("expert", nodes, [_floats("x", "n", h)], [_floats("y", "n", h)], weights)


def attention_blob(weights: Weights, shape: Shape) -> tuple[bytes, dict[str, TensorRef]]:
    """Adds the previous block's output to the residual, then attention, then the next norm.

    residual, x (1, n, H), past key and value (1, kv_heads, max, head_dim), seqlens_k and
    total_sequence_length int32, cos and sin (max, head_dim/2) of the rotary embedding, to
    normed, residual_out (1, n, H) and the present key and value.
    """
    h, heads, kv_heads, dim = shape.hidden, shape.heads, shape.kv_heads, shape.head_dim
    nodes = [
        _skip_norm("residual", "x", "attention_norm", "n1", "r1", shape),
        _matmul("n1", "qkv", "qkv", (heads + 2 * kv_heads) * dim, h, shape.block),
        helper.make_node(
            "GroupQueryAttention",
            [
                *("qkv", "", "", "past_key", "past_value"),
                *("seqlens_k", "total_sequence_length", "cos", "sin"),
            ],
            ["attended", "present_key", "present_value"],
            domain=MICROSOFT,
            num_heads=heads,
            kv_num_heads=kv_heads,
            do_rotary=1,
            rotary_interleaved=0,
            scale=dim**-0.5,
        ),
        _matmul("attended", "o", "out", h, heads * dim, shape.block),
        _skip_norm("r1", "out", "ffn_norm", "normed", "residual_out", shape),
    ]
    inputs = [_floats(name, 1, "n", h) for name in ("residual", "x")]
    inputs += [_floats(name, 1, kv_heads, "past", dim) for name in ("past_key", "past_value")]
    inputs += [
        helper.make_tensor_value_info("seqlens_k", TensorProto.INT32, [1]),
        helper.make_tensor_value_info("total_sequence_length", TensorProto.INT32, [1]),
        *(_floats(name, "max", dim // 2) for name in ("cos", "sin")),
    ]
    outputs = [_floats(name, 1, "n", h) for name in ("normed", "residual_out")]
    outputs += [
        _floats(name, 1, kv_heads, "total", dim) for name in ("present_key", "present_value")
    ]
    return _blob("attention", nodes, inputs, outputs, weights)


def head_blob(weights: Weights, shape: Shape) -> tuple[bytes, dict[str, TensorRef]]:
    """hidden (m, H) to logits (m, V): the last norm and the vocabulary matrix."""
    h, v = shape.hidden, shape.vocab
    constants: Weights = {
        "epsilon": np.array(shape.norm_epsilon, np.float32),
        "last_axis": np.array([-1], np.int64),
    }
    nodes = [
        helper.make_node("Mul", ["hidden", "hidden"], ["squares"]),
        helper.make_node("ReduceMean", ["squares", "last_axis"], ["mean_square"], keepdims=1),
        helper.make_node("Add", ["mean_square", "epsilon"], ["above_zero"]),
        helper.make_node("Sqrt", ["above_zero"], ["root"]),
        helper.make_node("Div", ["hidden", "root"], ["scaled"]),
        helper.make_node("Mul", ["scaled", "norm"], ["normed"]),
        _matmul("normed", "head", "logits", v, h, HEAD_BLOCK),
    ]
    hidden, logits = _floats("hidden", "m", h), _floats("logits", "m", v)
    return _blob("head", nodes, [hidden], [logits], weights, constants)


def embedding_blob(weights: Weights, shape: Shape) -> tuple[bytes, dict[str, TensorRef]]:
    """ids (m,) int64 to rows (m, H) float32. Untied models only; tied ones use the head's."""
    constants: Weights = {
        "zero_point": np.array(128, np.float32),
        "scale_axis": np.array([2], np.int64),
        "row_shape": np.array([-1, shape.hidden], np.int64),
    }
    nodes = [
        helper.make_node("Gather", ["embedding.w", "ids"], ["w"]),
        helper.make_node("Gather", ["embedding.s", "ids"], ["s"]),
        helper.make_node("Cast", ["w"], ["steps"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["steps", "zero_point"], ["signed"]),
        helper.make_node("Unsqueeze", ["s", "scale_axis"], ["scale"]),
        helper.make_node("Mul", ["signed", "scale"], ["blocks"]),
        helper.make_node("Reshape", ["blocks", "row_shape"], ["rows"]),
    ]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["m"])
    rows = _floats("rows", "m", shape.hidden)
    return _blob("embedding", nodes, [ids], [rows], weights, constants)


def _matmul(x: str, name: str, y: str, n: int, k: int, block: int) -> Any:
    return helper.make_node(
        "MatMulNBits",
        [x, f"{name}.w", f"{name}.s"],
        [y],
        domain=MICROSOFT,
        K=k,
        N=n,
        bits=BITS,
        block_size=block,
        accuracy_level=ACCURACY,
    )


def _skip_norm(a: str, b: str, norm: str, out: str, total: str, shape: Shape) -> Any:
    return helper.make_node(
        "SkipSimplifiedLayerNormalization",
        [a, b, norm],
        [out, "", "", total],
        domain=MICROSOFT,
        epsilon=shape.norm_epsilon,
    )


def _floats(name: str, *dims: int | str) -> Any:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(dims))


def _blob(
    name: str,
    nodes: Sequence[Any],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    weights: Weights,
    constants: Weights | None = None,
) -> tuple[bytes, dict[str, TensorRef]]:
    small = [_tensor(key, value) for key, value in (constants or {}).items()]
    for tensor, value in zip(small, (constants or {}).values(), strict=True):
        tensor.raw_data = value.tobytes()
    model = helper.make_model(
        helper.make_graph(nodes, name, inputs, outputs, small),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)],
        ir_version=IR_VERSION,
        producer_name="coeld",
    )
    return append_weights(model.SerializeToString(deterministic=True), weights)


def append_weights(model: bytes, weights: Weights) -> tuple[bytes, dict[str, TensorRef]]:
    """The serialised model with the weights as initializers, and where each of them lies."""
    pieces: list[bytes | memoryview] = [model]
    at = len(model)
    refs = {}
    for name, value in weights.items():
        raw = np.ascontiguousarray(value, value.dtype.newbyteorder("<"))
        tensor = _tensor(name, raw).SerializeToString(deterministic=True)
        tensor += TENSOR_RAW_DATA + _varint(raw.nbytes)
        initializer = GRAPH_INITIALIZER + _varint(len(tensor) + raw.nbytes) + tensor
        head = MODEL_GRAPH + _varint(len(initializer) + raw.nbytes) + initializer
        spaces = -(at + len(MODEL_DOC_STRING) + 1 + len(head)) % ALIGN  # its length takes 1 byte
        pad = MODEL_DOC_STRING + _varint(spaces) + b" " * spaces
        at += len(pad) + len(head)
        refs[name] = TensorRef("uint8" if raw.dtype == np.uint8 else "float32", raw.shape, at)
        pieces += [pad, head, raw.reshape(-1).view(np.uint8).data]
        at += raw.nbytes
    return b"".join(pieces), refs


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
