"""Llama 2 and 3, SmolLM, TinyLlama: dense, SwiGLU, RMSNorm. What the rest derive from."""

from coeld.model.families.blueprint import DENSE, Family, Traits
from coeld.model.families.settings import Settings


def read(settings: Settings) -> Traits:
    for key in ("expert_count", "expert_used_count"):
        if count := settings.value("", key):
            settings.refuse(key, count)
    qkv, o = settings.attention_biases()
    return Traits(
        qkv_bias=qkv,
        o_bias=o,
        permuted=True,
        width=settings.count("intermediate_size", "feed_forward_length"),
    )


FAMILY = Family("llama", "llama", read, DENSE)
