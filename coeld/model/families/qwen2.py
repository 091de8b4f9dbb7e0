"""Qwen2 and Qwen2.5, dense: llama with biases on q, k and v. llama.cpp does not permute q and k."""

from coeld.model.families.blueprint import DENSE, Family, Traits
from coeld.model.families.settings import Settings


def read(settings: Settings) -> Traits:
    layers = settings.count("num_hidden_layers", "block_count")
    full = settings.value("max_window_layers", "")
    return Traits(
        qkv_bias=True,
        windows=()
        if settings.gguf
        else settings.windows(
            layers, lambda layer: isinstance(full, int) and layer >= full, used=False
        ),
        width=settings.count("intermediate_size", "feed_forward_length"),
    )


FAMILY = Family("qwen2", "qwen2", read, DENSE)
