"""Qwen2-MoE (Qwen1.5-MoE, Qwen2-57B-A14B): Qwen2's attention, routed experts and a shared one.

Softmax over all experts, not renormalised unless the configuration says so (llama.cpp never does).
The shared expert runs for every token; its output is times a sigmoid of its own score.
"""

from coeld.model.families.blueprint import Family, Sizes, Source, Traits
from coeld.model.families.qwen3_moe import EXPERTS
from coeld.model.families.settings import Settings
from coeld.model.manifest import Routing


def read(settings: Settings) -> Traits:
    layers = settings.count("num_hidden_layers", "block_count")
    experts = settings.count("num_experts", "expert_count")
    full = settings.value("max_window_layers", "")
    dense = settings.count("intermediate_size", "feed_forward_length", 1)
    top_k = settings.count("num_experts_per_tok", "expert_used_count")
    width = dense // top_k if settings.gguf else None  # how llama.cpp reads files without the key
    return Traits(
        qkv_bias=settings.flag("qkv_bias", "", default=True),
        windows=()
        if settings.gguf
        else settings.windows(
            layers,
            lambda layer: layer % 2 == 0 and isinstance(full, int) and layer < full,
            used=False,
        ),
        width=settings.count("moe_intermediate_size", "expert_feed_forward_length", width),
        routing=Routing("softmax", renormalise=settings.flag("norm_topk_prob", "", default=False)),
        experts=experts,
        top_k=top_k,
        shared_width=settings.count(
            "shared_expert_intermediate_size", "expert_shared_feed_forward_length", dense
        ),
        shared_score=True,
    )


def shared(sizes: Sizes, traits: Traits) -> dict[str, tuple[Source, ...]]:
    h, width = sizes.hidden, traits.shared_width
    return {
        "shared_gate": (Source("mlp.shared_expert.gate_proj.weight", (width, h)),),
        "shared_up": (Source("mlp.shared_expert.up_proj.weight", (width, h)),),
        "shared_down": (Source("mlp.shared_expert.down_proj.weight", (h, width)),),
        "shared_score": (Source("mlp.shared_expert_gate.weight", (1, h)),),
    }


FAMILY = Family("qwen2_moe", "qwen2moe", read, EXPERTS, shared)
