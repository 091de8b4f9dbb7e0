"""The llama architecture in GGUF: SmolLM2, Llama 2, TinyLlama and others. Dense, SwiGLU, RMSNorm.

A key or tensor that changes what the model computes, and that coeld does not compute, is refused:
a model that runs slightly wrong is worse than one that does not run. llama.cpp stores the rows of
q and k for interleaved rotary embedding (pairs 2i, 2i+1); they are put back into the half-rotated
order (pairs i, i + dim/2) that the engine's kernel is given.

Source of names and meanings: llama.cpp, src/llama-arch.cpp and convert_hf_to_gguf.py (`permute`).
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from coeld.errors import BadModelFile, UnsupportedModel
from coeld.model.gguf_file import GgufFile, expect
from coeld.model.manifest import Shape

Floats = NDArray[np.float32]

ARCHITECTURE: Final = "llama"
EXPERTS_WANTED: Final = 8
"""Neuron slices per feed-forward block: eight let up to eight devices share a layer."""
BLOCKS: Final = (64, 32)
COUNT_MAX: Final = 1 << 20

EMBEDDING: Final = "token_embd.weight"
HEAD: Final = "output.weight"
NORM: Final = "output_norm.weight"

HARMLESS: Final = {
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.freq_base",
    "rope.dimension_count",
    "vocab_size",
    "rope.scaling.original_context_length",
}
"""Keys that are read below, or say nothing about the computation."""

NEUTRAL: Final = {
    "rope.scaling.type": "none",
    "rope.scaling.factor": 1.0,
    "rope.scale_linear": 1.0,
    "rope.scaling.attn_factor": 1.0,
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.causal": True,
    "use_parallel_residual": False,
}
"""Keys that are fine with this one value."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer as float32, named as in the manifest, with the whole feed-forward block."""

    attention_norm: Floats
    ffn_norm: Floats
    qkv: Floats
    o: Floats
    gate: Floats
    up: Floats
    down: Floats


def read_shape(file: GgufFile) -> Shape:
    """The dimensions, checked against every tensor. Raises BadModelFile or UnsupportedModel."""
    _refuse_unknown_keys(file)
    hidden = _count(file, "embedding_length")
    heads = _count(file, "attention.head_count")
    kv_heads = _count(file, "attention.head_count_kv", heads)
    head_dim = _count(file, "attention.key_length", max(1, hidden // heads))
    width = _count(file, "feed_forward_length")
    block = _block(hidden, heads * head_dim, width)
    experts = next(e for e in range(EXPERTS_WANTED, 0, -1) if width % (e * block) == 0)
    shape = Shape(
        family=ARCHITECTURE,
        layers=_count(file, "block_count"),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        experts=experts,
        top_k=experts,
        expert_width=width // experts,
        vocab=file.tensors[EMBEDDING].shape[0] if EMBEDDING in file.tensors else 0,
        context_max=_count(file, "context_length"),
        rope_base=_number(file, "rope.freq_base", 10_000.0),
        norm_epsilon=_number(file, "attention.layer_norm_rms_epsilon"),
        block=block,
    )
    _check(file, shape)
    return shape


def _refuse_unknown_keys(file: GgufFile) -> None:
    for key, value in file.metadata.items():
        family, _, rest = key.partition(".")
        if family != ARCHITECTURE or rest in HARMLESS:
            continue
        if rest not in NEUTRAL or value != NEUTRAL[rest]:
            raise UnsupportedModel(
                f"{file.path} sets {key} to {str(value)[:80]!r}, which coeld cannot represent "
                "exactly. Use a llama model without it."
            )


def _count(file: GgufFile, key: str, default: int | None = None) -> int:
    return expect(file, f"{ARCHITECTURE}.{key}", int, lambda value: 0 < value <= COUNT_MAX, default)


def _number(file: GgufFile, key: str, default: float | None = None) -> float:
    return expect(file, f"{ARCHITECTURE}.{key}", float, lambda value: 0 < value < 1e9, default)


def _block(*widths: int) -> int:
    for block in BLOCKS:
        if all(width % block == 0 for width in widths):
            return block
    raise UnsupportedModel(
        f"widths {widths} (embedding, attention, feed-forward) are not all multiples of "
        f"{BLOCKS[-1]}; coeld stores weights in blocks of that many."
    )


def _check(file: GgufFile, shape: Shape) -> None:
    if shape.heads % shape.kv_heads or shape.head_dim % 8:
        raise UnsupportedModel(
            f"{shape.heads} heads over {shape.kv_heads} key-value heads of {shape.head_dim}: coeld "
            "needs a whole number of heads for each, and a multiple of 8."
        )
    for key in ("rope.dimension_count", "attention.value_length"):
        if _count(file, key, shape.head_dim) != shape.head_dim:
            raise UnsupportedModel(f"{file.path} sets {key} to something else than the head size.")
    if not 0 < shape.vocab <= COUNT_MAX:
        raise BadModelFile(f"{file.path} has no tensor {EMBEDDING}: it is not a complete model.")
    wanted = tensor_shapes(shape)
    for name in file.tensors.keys() - wanted.keys() - {HEAD}:
        raise UnsupportedModel(
            f"{file.path} has a tensor {name!r} that the plain llama architecture does not have "
            "(biases, rope factors and routed experts are not supported)."
        )
    for name, want in wanted.items():
        found = file.tensors[name].shape if name in file.tensors else "no such tensor"
        if found != want:
            raise BadModelFile(f"tensor {name!r} of {file.path}: {found}, expected {want}.")
    if HEAD in file.tensors and file.tensors[HEAD].shape != wanted[EMBEDDING]:
        raise BadModelFile(f"tensor {HEAD!r} of {file.path} has the wrong shape.")


def tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """What the file must hold, but for a separate head."""
    h, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    width = shape.experts * shape.expert_width
    wanted: dict[str, tuple[int, ...]] = {EMBEDDING: (shape.vocab, h), NORM: (h,)}
    for index in range(shape.layers):
        wanted |= {
            f"blk.{index}.attn_norm.weight": (h,),
            f"blk.{index}.ffn_norm.weight": (h,),
            f"blk.{index}.attn_q.weight": (q, h),
            f"blk.{index}.attn_k.weight": (kv, h),
            f"blk.{index}.attn_v.weight": (kv, h),
            f"blk.{index}.attn_output.weight": (h, q),
            f"blk.{index}.ffn_gate.weight": (width, h),
            f"blk.{index}.ffn_up.weight": (width, h),
            f"blk.{index}.ffn_down.weight": (h, width),
        }
    return wanted


def read_layer(file: GgufFile, shape: Shape, index: int) -> Layer:
    """One layer's weights. Raises BadModelFile."""

    def read(name: str) -> Floats:
        return file.rows(f"blk.{index}.{name}.weight")

    q = half_rotated(read("attn_q"), shape.heads)
    k = half_rotated(read("attn_k"), shape.kv_heads)
    return Layer(
        attention_norm=read("attn_norm"),
        ffn_norm=read("ffn_norm"),
        qkv=np.concatenate([q, k, read("attn_v")]),
        o=read("attn_output"),
        gate=read("ffn_gate"),
        up=read("ffn_up"),
        down=read("ffn_down"),
    )


def half_rotated(weight: Floats, heads: int) -> Floats:
    """Rows of each head from order 0, d/2, 1, d/2+1, … back to 0, 1, …, d-1."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)
