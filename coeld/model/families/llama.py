"""Llama 2 and 3, SmolLM, TinyLlama: dense, SwiGLU, RMSNorm. What the rest derive from."""

from coeld.model.families.blueprint import DENSE, Family, Traits
from coeld.model.families.settings import Settings


def read(settings: Settings) -> Traits:
    if settings.gguf:
        biased = settings.has("blk.0.attn_q.bias")
    else:
        biased = settings.flag("attention_bias", "", default=False)
    for key in ("expert_count", "expert_used_count"):
        if count := settings.value("", key):
            settings.refuse(key, count)
    return Traits(
        permuted=True,
        qkv_bias=biased,
        o_bias=biased,
        width=settings.count("intermediate_size", "feed_forward_length"),
    )


FAMILY = Family("llama", "llama", read, DENSE)
