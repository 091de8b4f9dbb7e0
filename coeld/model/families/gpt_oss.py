"""gpt-oss: sinks, a window in every other layer, biases everywhere, clamped SwiGLU, YaRN.

A softmax over the chosen experts' logits, which is a softmax over all, renormalised. The clamped
SwiGLU is g * sigmoid(1.702 g) * (u + 1). Hugging Face keeps the experts' matrices transposed, with
columns of gate and up alternating; or, as published, not transposed and in MXFP4: 32 weights of a
row in 16 bytes, low nibble first, and a power of two (OCP Microscaling Formats, version 1.0). The
ramp of YaRN is not rounded (llama.cpp's is, GGUF or not).
"""

from dataclasses import replace
from typing import Final

import numpy as np

from coeld.model.families.blueprint import Expert, Family, Floats, Sizes, Source, Traits
from coeld.model.families.settings import Settings
from coeld.model.manifest import Activation, Routing

ALPHA, BETA, LIMIT = 1.702, 1.0, 7.0
E2M1: Final = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E2M1_SIGNED: Final = np.concatenate([E2M1, -E2M1])
"""What the four bits stand for."""


def read(settings: Settings) -> Traits:
    layers = settings.count("num_hidden_layers", "block_count")
    biased = settings.flag("attention_bias", "", default=True)
    packing = settings.value("quantization_config", "")
    packed = isinstance(packing, dict) and packing.get("quant_method") == "mxfp4"
    if packing is not None and not packed:
        settings.refuse("quantization_config", packing)
    return Traits(
        theta=150_000.0,
        yarn_truncate=False,
        qkv_bias=biased,
        o_bias=biased,
        sinks=True,
        windows=settings.windows(layers, lambda layer: layer % 2 == 0),
        activation=Activation(
            alpha=settings.number("swiglu_alpha", "", ALPHA),
            beta=BETA,
            limit=settings.number("swiglu_limit", "", LIMIT),
        ),
        width=settings.count("intermediate_size", "expert_feed_forward_length"),
        routing=Routing("softmax", renormalise=True),
        experts=settings.count("num_local_experts", "expert_count"),
        top_k=settings.count("num_experts_per_tok", "expert_used_count"),
        ffn_norm=("post_attention_layernorm", "post_attention_norm"),
        router="mlp.router",
        router_bias=True,
        packed=packed and settings.has("model.layers.0.mlp.experts.down_proj_blocks"),
    )


def expert(sizes: Sizes, traits: Traits, index: int) -> Expert:
    h, width, count = sizes.hidden, traits.width, traits.experts
    biases = ("mlp.experts.gate_up_proj_bias", (count, 2 * width), index)
    found = {
        "gate.b": Source(*biases, lambda x: x[0::2]),
        "up.b": Source(*biases, lambda x: x[1::2]),
        "down.b": Source("mlp.experts.down_proj_bias", (count, h), index),
    }
    if traits.packed:
        both = _packed("gate_up_proj", count, 2 * width, h, index)
        found["gate"] = replace(both, change=lambda *x: unpacked(*x)[0::2])
        found["up"] = replace(both, change=lambda *x: unpacked(*x)[1::2])
        found["down"] = _packed("down_proj", count, h, width, index)
    else:
        fused = ("mlp.experts.gate_up_proj", (count, h, 2 * width), index)
        found["gate"] = Source(*fused, lambda x: x[:, 0::2].T)
        found["up"] = Source(*fused, lambda x: x[:, 1::2].T)
        found["down"] = Source("mlp.experts.down_proj", (count, width, h), index, lambda x: x.T)
    return found


def _packed(name: str, count: int, n: int, k: int, index: int) -> Source:
    groups = (count, n, k // 32)
    scales = Source(f"mlp.experts.{name}_scales", groups, index)
    return Source(f"mlp.experts.{name}_blocks", (*groups, 16), index, unpacked, scales)


def unpacked(blocks: Floats, scales: Floats) -> Floats:
    """MXFP4: bytes (N, K/32, 16) and exponents (N, K/32), as the numbers 0..255, to (N, K)."""
    codes = blocks.astype(np.uint8)
    values = E2M1_SIGNED[np.stack([codes & 15, codes >> 4], -1)]
    with np.errstate(over="ignore"):  # a damaged exponent; the result is checked
        scaled: Floats = np.ldexp(values, scales.astype(np.int32)[..., None, None] - 127)
    return scaled.reshape(len(blocks), -1)


FAMILY = Family("gpt_oss", "gpt-oss", read, expert)
