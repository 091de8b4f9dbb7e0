"""OLMoE: q and k normed over all heads together; softmax over all experts, as it is."""

from coeld.model.families.blueprint import Family, Traits
from coeld.model.families.qwen3_moe import EXPERTS
from coeld.model.families.settings import Settings
from coeld.model.manifest import Routing


def read(settings: Settings) -> Traits:
    qkv, o = settings.attention_biases()
    return Traits(
        qkv_bias=qkv,
        o_bias=o,
        qk_norm="all",
        width=settings.count("intermediate_size", "feed_forward_length"),
        routing=Routing("softmax", renormalise=settings.flag("norm_topk_prob", "", default=False)),
        experts=settings.count("num_experts", "expert_count"),
        top_k=settings.count("num_experts_per_tok", "expert_used_count"),
    )


FAMILY = Family("olmoe", "olmoe", read, EXPERTS)
