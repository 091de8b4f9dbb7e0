"""Granite-MoE, without and with a shared expert: llama with routed experts and four multipliers.

A softmax over the chosen experts' logits, which is a softmax over all, renormalised. What attention
and experts add to the residual is multiplied by `residual_multiplier`, logits are divided by
`logits_scaling`: both are folded into weights. Hugging Face keeps gate and up of all experts of a
layer in one tensor, gate's rows first.
"""

from coeld.model.families.blueprint import Expert, Family, Sizes, Source, Traits
from coeld.model.families.settings import Settings
from coeld.model.manifest import Routing


def read(settings: Settings) -> Traits:
    shared = settings.value("shared_intermediate_size", "expert_shared_feed_forward_length")
    qkv, o = settings.attention_biases()
    return Traits(
        qkv_bias=qkv,
        o_bias=o,
        permuted=True,
        # GGUF's attention.scale 0 or absent: llama.cpp takes 1 / sqrt(head_dim).
        attention_scale=settings.number("attention_multiplier", "attention.scale", 1.0)
        if not settings.gguf or settings.value("", "attention.scale")
        else None,
        embedding_scale=settings.number("embedding_multiplier", "embedding_scale", 1.0),
        residual_scale=settings.number("residual_multiplier", "residual_scale", 1.0),
        logits_scale=1 / settings.number("logits_scaling", "logit_scale", 1.0),
        width=settings.count("intermediate_size", "feed_forward_length"),
        routing=Routing("softmax", renormalise=True),
        experts=settings.count("num_local_experts", "expert_count"),
        top_k=settings.count("num_experts_per_tok", "expert_used_count"),
        shared_width=settings.count("shared_intermediate_size", "expert_shared_feed_forward_length")
        if shared
        else 0,
        router="block_sparse_moe.router.layer",
    )


def expert(sizes: Sizes, traits: Traits, index: int) -> Expert:
    h, width, count = sizes.hidden, traits.width, traits.experts
    both = ("block_sparse_moe.input_linear.weight", (count, 2 * width, h), index)
    return {
        "gate": Source(*both, lambda rows: rows[:width]),
        "up": Source(*both, lambda rows: rows[width:]),
        "down": Source("block_sparse_moe.output_linear.weight", (count, h, width), index),
    }


def shared(sizes: Sizes, traits: Traits) -> dict[str, tuple[Source, ...]]:
    h, width = sizes.hidden, traits.shared_width
    both = ("shared_mlp.input_linear.weight", (2 * width, h), None)
    return {
        "shared_gate": (Source(*both, lambda rows: rows[:width]),),
        "shared_up": (Source(*both, lambda rows: rows[width:]),),
        "shared_down": (Source("shared_mlp.output_linear.weight", (h, width)),),
    }


FAMILY = Family("granitemoe", "granitemoe", read, expert, shared)
SHARED = Family("granitemoeshared", "granitemoe", read, expert, shared)
