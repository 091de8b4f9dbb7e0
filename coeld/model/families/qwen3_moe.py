"""Qwen3-MoE: Qwen3's attention, routed experts; softmax over all, then renormalised or not.

llama.cpp always renormalises, so that is what a GGUF file means.
"""

from coeld.model.families.blueprint import Family, Traits, named_experts
from coeld.model.families.settings import Settings
from coeld.model.manifest import Routing

EXPERTS = named_experts(
    gate="mlp.experts.{}.gate_proj.weight",
    up="mlp.experts.{}.up_proj.weight",
    down="mlp.experts.{}.down_proj.weight",
)


def read(settings: Settings) -> Traits:
    layers = settings.count("num_hidden_layers", "block_count")
    # The configuration's attribute has two names.
    experts = "num_experts" if settings.value("num_experts", "") else "num_local_experts"
    settings.value("intermediate_size", "")  # of dense layers: there are none
    if not settings.flag("use_qk_norm", "", default=True):
        settings.refuse("use_qk_norm", False)
    qkv, o = settings.attention_biases()
    return Traits(
        qkv_bias=qkv,
        o_bias=o,
        qk_norm="head",
        windows=() if settings.gguf else settings.windows(layers, lambda _layer: True, used=False),
        width=settings.count("moe_intermediate_size", "expert_feed_forward_length"),
        routing=Routing(
            "softmax", renormalise=settings.flag("norm_topk_prob", "", default=settings.gguf)
        ),
        experts=settings.count(experts, "expert_count"),
        top_k=settings.count("num_experts_per_tok", "expert_used_count"),
    )


FAMILY = Family("qwen3_moe", "qwen3moe", read, EXPERTS)
