"""A checkpoint that is not on disk, and the tiny ones of every family in it, in both spellings.

`gguf_spelling` does to names, keys and rows what llama.cpp's conversion does (conversion/*.py).
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cache
from types import TracebackType
from typing import Any, Self

import numpy as np

from coeld.errors import BadModelFile
from coeld.model.checkpoint import Kind, Vocabulary
from tests.harness.tiny_checkpoints import FAMILIES, encode, tensors_of

Arrays = dict[str, np.ndarray]


@dataclass
class MemoryCheckpoint:
    kind: Kind
    config: dict[str, Any]
    tensors: Arrays
    words: Vocabulary | None = None
    source: str = "memory"
    licence: str = "unknown"
    reads: list[str] = field(default_factory=list)
    """Every tensor that was read, in order."""

    @property
    def bytes(self) -> int:
        return sum(value.nbytes for value in self.tensors.values())

    def names(self) -> Collection[str]:
        return self.tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        self.reads.append(name)
        value = np.array(self.tensors[name][start:stop], np.float32)
        if not np.isfinite(value).all():
            raise BadModelFile(f"tensor {name} of {self.source} holds infinities or NaN")
        return value

    def fingerprint(self) -> str:
        return "0" * 64

    def vocabulary(self, rows: int) -> Vocabulary | None:
        return self.words

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        pass


def huggingface(name: str, **changes: Any) -> MemoryCheckpoint:
    """The tiny checkpoint of a family."""
    config = {**FAMILIES[name].config, **changes}
    return MemoryCheckpoint("huggingface", config, dict(_tensors(name)))


@cache
def _tensors(name: str) -> Arrays:
    """Rounded as they would be on disk."""
    family, tensors, matrices = FAMILIES[name], {}, 0
    for key, value in tensors_of(family).items():
        dtype = family.dtypes[matrices % len(family.dtypes) if value.ndim > 1 else 0]
        matrices += value.ndim > 1
        stored = encode(value, dtype)
        if dtype == "BF16":
            stored = (stored.astype(np.uint32) << 16).view(np.float32)
        tensors[key] = stored.astype(np.float32)
        tensors[key].flags.writeable = False
    return tensors


ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "olmoe": "olmoe",
    "granitemoe": "granitemoe",
    "gpt_oss": "gpt-oss",
}
KEYS = {
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "num_experts": "expert_count",
    "num_local_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "vocab_size": "vocab_size",
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.router": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "block_sparse_moe.router.layer": "ffn_gate_inp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}
PARTS = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"} | {
    "w1": "gate",
    "w3": "up",
    "w2": "down",
}


def gguf_spelling(name: str) -> MemoryCheckpoint:
    """The same checkpoint as llama.cpp's conversion would write it."""
    original = huggingface(name)
    config, architecture = original.config, ARCHITECTURES[name]
    keys = {
        f"{architecture}.{KEYS[key]}": value
        for key, value in (config | config.get("rope_parameters", {})).items()
        if key in KEYS
    }
    keys["general.architecture"] = architecture
    tensors = {
        "token_embd.weight": original.tensors["model.embed_tokens.weight"],
        "output_norm.weight": original.tensors["model.norm.weight"],
    }
    if not config["tie_word_embeddings"]:
        tensors["output.weight"] = original.tensors["lm_head.weight"]
    for index in range(config["num_hidden_layers"]):
        at = f"model.layers.{index}."
        layer = {
            key.removeprefix(at): value
            for key, value in original.tensors.items()
            if key.startswith(at)
        }
        spelled = _layer(name, layer, config)
        tensors |= {f"blk.{index}.{key}": value for key, value in spelled.items()}
    scaling = config.get("rope_scaling", {})
    if scaling.get("rope_type") == "llama3":
        tensors["rope_freqs.weight"] = _llama3_factors(config)
    elif scaling:
        keys[f"{architecture}.rope.scaling.type"] = scaling["rope_type"]
        keys[f"{architecture}.rope.scaling.factor"] = scaling["factor"]
        context = scaling["original_max_position_embeddings"]
        keys[f"{architecture}.rope.scaling.original_context_length"] = context
    if name == "gpt_oss":
        keys["gpt-oss.attention.sliding_window"] = config["sliding_window"]
        keys["gpt-oss.expert_feed_forward_length"] = config["intermediate_size"]
    return MemoryCheckpoint("gguf", keys, tensors)


def _layer(name: str, layer: Arrays, config: dict[str, Any]) -> Arrays:
    found: Arrays = {}
    stacks: dict[str, list[np.ndarray]] = {}
    for key, value in layer.items():
        stem, _, end = key.rpartition(".")
        if ".experts." in stem:
            stacks.setdefault(PARTS[stem.rpartition(".")[2]], []).append(value)
        elif stem in NAMES:
            if name in ("llama", "mixtral", "granitemoe") and stem[-6:] in ("q_proj", "k_proj"):
                heads = "num_attention_heads" if stem[-6] == "q" else "num_key_value_heads"
                value = _permuted(value, config[heads])
            found[f"{NAMES[stem]}.{end}"] = value
    for part, values in stacks.items():
        found[f"ffn_{part}_exps.weight"] = np.stack(values)
    if name == "granitemoe":
        both, width = layer["block_sparse_moe.input_linear.weight"], config["intermediate_size"]
        found["ffn_gate_exps.weight"], found["ffn_up_exps.weight"] = (
            both[:, :width],
            both[:, width:],
        )
        found["ffn_down_exps.weight"] = layer["block_sparse_moe.output_linear.weight"]
    if name == "gpt_oss":
        found["post_attention_norm.weight"] = found.pop("ffn_norm.weight")
        found["attn_sinks.weight"] = layer["self_attn.sinks"]
        both = layer["mlp.experts.gate_up_proj"].swapaxes(1, 2)
        bias = layer["mlp.experts.gate_up_proj_bias"]
        for offset, part in enumerate(("gate", "up")):
            found[f"ffn_{part}_exps.weight"] = both[:, offset::2]
            found[f"ffn_{part}_exps.bias"] = bias[:, offset::2]
        found["ffn_down_exps.weight"] = layer["mlp.experts.down_proj"].swapaxes(1, 2)
        found["ffn_down_exps.bias"] = layer["mlp.experts.down_proj_bias"]
    return found


def _permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """LlamaModel.permute."""
    rows = weight.shape[0]
    halves = weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _llama3_factors(config: dict[str, Any]) -> np.ndarray:
    """What generate_extra_tensors writes as rope_freqs."""
    scaling, found = config["rope_scaling"], []
    context = scaling["original_max_position_embeddings"]
    low = context / scaling["low_freq_factor"]
    high = context / scaling["high_freq_factor"]
    for index in range(0, config["head_dim"], 2):
        wavelength = 2 * np.pi * config["rope_theta"] ** (index / config["head_dim"])
        if wavelength < high:
            found.append(1.0)
        elif wavelength > low:
            found.append(scaling["factor"])
        else:
            smooth = (context / wavelength - scaling["low_freq_factor"]) / (
                scaling["high_freq_factor"] - scaling["low_freq_factor"]
            )
            found.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(found, np.float32)
