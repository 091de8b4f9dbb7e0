"""A graph under construction: nodes, inputs, outputs and weights; no session.

Its vocabulary is that of the kernels ONNX Runtime runs at memory bandwidth on a CPU (MatMulNBits,
QMoE and GroupQueryAttention, from com.microsoft), with one word for a matrix in any width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, ValueInfoProto, helper

from coeld.engine.weights import Array, Blobs, Made, Stored, Weight
from coeld.model.manifest import BlobRef, Form

F32: Final = TensorProto.FLOAT
I32: Final = TensorProto.INT32
I64: Final = TensorProto.INT64
CONTRIB: Final = "com.microsoft"
CONTRIB_OPS: Final = (
    "FusedMatMul",
    "GroupQueryAttention",
    "MatMulNBits",
    "MoE",
    "QMoE",
    "QuickGelu",
    "SkipSimplifiedLayerNormalization",
)
ACCURACY: Final = 4
"""Activations are quantised to int8 per block: several times faster than float32."""


@dataclass(slots=True)
class Graph:
    """A graph that reads its stored weights, if any, from `store`."""

    store: Blobs | None = None
    nodes: list[NodeProto] = field(default_factory=list)
    inputs: list[ValueInfoProto] = field(default_factory=list)
    outputs: list[ValueInfoProto] = field(default_factory=list)
    weights: dict[str, Weight] = field(default_factory=dict)

    def add(self, op: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> str:
        """One node; the name of its first output."""
        domain = CONTRIB if op in CONTRIB_OPS else ""
        self.nodes.append(helper.make_node(op, inputs, outputs, domain=domain, **attributes))
        return outputs[0]

    def constant(self, name: str, value: NDArray[Any]) -> str:
        self.weights[name] = Made((value,))
        return name

    def integers(self, *values: int) -> str:
        """A constant int64 (len,), shared by all who need the same."""
        name = "i" + "_".join(map(str, values))
        if name not in self.weights:
            self.constant(name, np.array(values, np.int64))
        return name

    @property
    def blobs(self) -> Blobs:
        """The store, of a graph that has one."""
        assert self.store is not None
        return self.store

    def stored(self, name: str, ref: BlobRef, tensor: str) -> str:
        """A tensor of a blob."""
        self.weights[name] = Stored(self.blobs, (ref,), tensor)
        return name

    def take(self, name: str, dtype: int, shape: Sequence[str | int]) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def give(self, name: str, dtype: int, shape: Sequence[str | int]) -> None:
        self.outputs.append(helper.make_tensor_value_info(name, dtype, shape))

    def number(self, value: float) -> str:
        """A constant float32 (1,), shared likewise."""
        name = f"f{value!r}"
        if name not in self.weights:
            self.constant(name, np.array([value], np.float32))
        return name

    def matmul(self, x: str, out: str, tag: str, ref: BlobRef, name: str, form: Form) -> str:
        """out = x @ W.T + b, where W is matrix `name` of a blob, and b its bias if it has one."""
        bias = self.stored(f"{tag}.b", ref, f"{name}.b") if f"{name}.b" in ref.tensors else None
        w = self.stored(f"{tag}.w", ref, f"{name}.w")
        if form.bits == 32:
            return self._matmul_f32(x, out, w, bias)
        s = self.stored(f"{tag}.s", ref, f"{name}.s")
        n, blocks = ref.tensors[f"{name}.s"].shape
        return self._matmul_nbits(x, out, (w, s, bias), n, blocks, form)

    def rows_matmul(
        self, x: str, out: str, tag: str, parts: Sequence[tuple[Array, ...]], form: Form
    ) -> str:
        """out = x @ W.T, where the parts (w, s), or (w,) in float32, are the rows of W."""
        return self._joined_matmul(x, out, tag, parts, 0, form)

    def columns_matmul(
        self, x: str, out: str, tag: str, parts: Sequence[tuple[Array, ...]], form: Form
    ) -> str:
        """out = x @ W.T, where the parts are the columns of W."""
        return self._joined_matmul(x, out, tag, parts, 1, form)

    def _joined_matmul(
        self, x: str, out: str, tag: str, parts: Sequence[tuple[Array, ...]], axis: int, form: Form
    ) -> str:
        names = [tag + ".w", tag + ".s"][: len(parts[0])]
        for name, arrays in zip(names, zip(*parts, strict=True), strict=True):
            self.weights[name] = Made(arrays, axis)
        if form.bits == 32:
            return self._matmul_f32(x, out, names[0], None)
        n, blocks = parts[0][1].shape
        n, blocks = (n * len(parts), blocks) if axis == 0 else (n, blocks * len(parts))
        return self._matmul_nbits(x, out, (*names, None), n, blocks, form)

    def _matmul_nbits(
        self, x: str, out: str, weights: Sequence[str | None], n: int, blocks: int, form: Form
    ) -> str:
        w, s, bias = weights
        return self.add(
            "MatMulNBits",
            [x, str(w), str(s)] + (["", "", bias] if bias else []),
            [out],
            K=blocks * form.block,
            N=n,
            bits=form.bits,
            block_size=form.block,
            accuracy_level=ACCURACY,
        )

    def _matmul_f32(self, x: str, out: str, w: str, bias: str | None) -> str:
        product = out if bias is None else f"{out}.xw"
        self.add("FusedMatMul", [x, w], [product], transB=1)
        return product if bias is None else self.add("Add", [product, bias], [out])
