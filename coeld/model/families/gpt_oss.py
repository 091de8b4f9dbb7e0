"""gpt-oss: sinks, a window in every other layer, biases everywhere, clamped SwiGLU, YaRN.

A softmax over the chosen experts' logits, which is a softmax over all, renormalised. The clamped
SwiGLU is g * sigmoid(1.702 g) * (u + 1). Hugging Face keeps the experts' matrices transposed, with
columns of gate and up alternating; YaRN's ramp is not rounded (llama.cpp's is, GGUF or not).
"""

from coeld.model.families.blueprint import Expert, Family, Sizes, Source, Traits
from coeld.model.families.settings import Settings
from coeld.model.manifest import Activation, Routing

ALPHA, BETA, LIMIT = 1.702, 1.0, 7.0


def read(settings: Settings) -> Traits:
    layers = settings.count("num_hidden_layers", "block_count")
    biased = settings.flag("attention_bias", "", default=True)
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
    )


def expert(sizes: Sizes, traits: Traits, index: int) -> Expert:
    h, width, count = sizes.hidden, traits.width, traits.experts
    both = ("mlp.experts.gate_up_proj", (count, h, 2 * width), index)
    biases = ("mlp.experts.gate_up_proj_bias", (count, 2 * width), index)
    return {
        "gate": Source(*both, lambda x: x[:, 0::2].T),
        "up": Source(*both, lambda x: x[:, 1::2].T),
        "down": Source("mlp.experts.down_proj", (count, width, h), index, lambda x: x.T),
        "gate.b": Source(*biases, lambda x: x[0::2]),
        "up.b": Source(*biases, lambda x: x[1::2]),
        "down.b": Source("mlp.experts.down_proj_bias", (count, h), index),
    }


FAMILY = Family("gpt_oss", "gpt-oss", read, expert)
