"""Mixtral: llama with routed experts; softmax over all, the chosen ones' weights sum to 1."""

from coeld.model.families.blueprint import Family, Traits, named_experts
from coeld.model.families.settings import Settings
from coeld.model.manifest import Routing


def read(settings: Settings) -> Traits:
    layers = settings.count("num_hidden_layers", "block_count")
    return Traits(
        theta=10_000.0 if settings.gguf else 1e6,
        permuted=True,
        windows=() if settings.gguf else settings.windows(layers, lambda _layer: True),
        width=settings.count("intermediate_size", "feed_forward_length"),
        routing=Routing("softmax", renormalise=True),
        experts=settings.count("num_local_experts", "expert_count"),
        top_k=settings.count("num_experts_per_tok", "expert_used_count"),
        router="block_sparse_moe.gate",
    )


FAMILY = Family(
    "mixtral",
    "llama",
    read,
    named_experts(
        gate="block_sparse_moe.experts.{}.w1.weight",
        up="block_sparse_moe.experts.{}.w3.weight",
        down="block_sparse_moe.experts.{}.w2.weight",
    ),
)
