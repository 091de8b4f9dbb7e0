"""Writes a tiny checkpoint of every family as a Hugging Face folder, with numpy alone.

The names and shapes are those of the checkpoints on the hub; every odd number of a family is away
from its default, biases and norms are random too, so that nothing forgotten stays unseen. Weights
come from the raw 64-bit stream of PCG64 and additions, both exact everywhere: the same bytes on
every machine and with every numpy. `tests/golden/families/*.npz` holds the logits transformers
computes from them (scripts/goldens).

Scales are such that the network decides: scores in attention, routers and logits have a standard
deviation of 2 to 4, as in trained models, instead of near-ties that any rounding turns over.
"""

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.reference.tiny_gguf import CHAT_TEMPLATE, CONTROL_TOKENS, MERGES, byte_tokens

VOCAB = 272
"""Rows of the embedding; the tokenizer knows 269 tokens, as in models whose rows are padded."""
HIDDEN = 128
LAYERS = 3
SEQUENCES, LENGTH = 4, 56
LOGITS = 3.5
"""Standard deviation of the logits."""

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Family:
    """A checkpoint: its config.json, how it is stored, and the seed of its weights."""

    config: dict[str, Any]
    dtypes: tuple[str, ...] = ("F32",)
    """Of the matrices, in turns; vectors have the first."""
    shards: int = 1
    seed: int = 0
    likeness: float = 0.6
    """Of a token's row in the head with the embedding of the token before it."""


BASE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}

FAMILIES = {
    "llama": Family(
        {
            **BASE,
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "intermediate_size": 512,
            "tie_word_embeddings": True,
            "head_dim": 32,
            "attention_bias": False,
            "mlp_bias": False,
            "rms_norm_eps": 0.01,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
        seed=1,
    ),
    "qwen2": Family(
        {
            **BASE,
            "model_type": "qwen2",
            "architectures": ["Qwen2ForCausalLM"],
            "intermediate_size": 384,
            "rope_theta": 1000000.0,
            "rms_norm_eps": 1e-6,
            "use_sliding_window": True,
            "sliding_window": 16,
            "max_window_layers": 1,
        },
        dtypes=("BF16",),
        shards=2,
        seed=2,
    ),
    "qwen3": Family(
        {
            **BASE,
            "model_type": "qwen3",
            "architectures": ["Qwen3ForCausalLM"],
            "intermediate_size": 512,
            "head_dim": 64,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "rms_norm_eps": 0.02,
            "use_sliding_window": False,
        },
        dtypes=("F16",),
        seed=3,
    ),
    "mixtral": Family(
        {
            **BASE,
            "model_type": "mixtral",
            "architectures": ["MixtralForCausalLM"],
            "intermediate_size": 64,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": 24,
            "rope_theta": 1000000.0,
        },
        dtypes=("BF16",),
        shards=3,
        seed=4,
    ),
    "qwen2_moe": Family(
        {
            **BASE,
            "model_type": "qwen2_moe",
            "architectures": ["Qwen2MoeForCausalLM"],
            "intermediate_size": 192,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 96,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "use_sliding_window": False,
            "rms_norm_eps": 1e-6,
        },
        dtypes=("F32", "BF16", "F16"),
        shards=2,
        seed=5,
    ),
    "qwen3_moe": Family(
        {
            **{key: value for key, value in BASE.items() if key != "rope_theta"},
            "model_type": "qwen3_moe",
            "architectures": ["Qwen3MoeForCausalLM"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 200000.0},
            "head_dim": 64,
            "intermediate_size": 192,
            "moe_intermediate_size": 64,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "attention_bias": False,
            "use_sliding_window": False,
            "rms_norm_eps": 1e-6,
        },
        dtypes=("F32", "F16"),
        seed=6,
    ),
    "olmoe": Family(
        {
            **BASE,
            "model_type": "olmoe",
            "architectures": ["OlmoeForCausalLM"],
            "intermediate_size": 64,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "norm_topk_prob": False,
            "attention_bias": False,
            "clip_qkv": None,
            "rms_norm_eps": 0.01,
        },
        dtypes=("BF16",),
        seed=7,
    ),
    "granitemoe": Family(
        {
            **BASE,
            "model_type": "granitemoe",
            "architectures": ["GraniteMoeForCausalLM"],
            "intermediate_size": 64,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.109375,
            "logits_scaling": 6.0,
            "rope_theta": 20000.0,
        },
        dtypes=("BF16", "F32"),
        seed=8,
    ),
    "gpt_oss": Family(
        {
            **BASE,
            "model_type": "gpt_oss",
            "architectures": ["GptOssForCausalLM"],
            "num_attention_heads": 8,
            "head_dim": 32,
            "intermediate_size": 64,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "attention_bias": True,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "swiglu_limit": 7.0,
            "rms_norm_eps": 0.01,
            "rope_theta": 150000.0,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 32,
            },
        },
        dtypes=("BF16",),
        shards=2,
        seed=9,
        likeness=0.65,
    ),
}


class _Draw:
    """Random matrices from the raw stream."""

    def __init__(self, seed: int) -> None:
        self._stream = np.random.PCG64(seed)

    def normal(self, *shape: int) -> np.ndarray:
        """Nearly normal (sums of four uniforms), mean 0, variance 1, float32."""
        raw = np.atleast_1d(self._stream.random_raw(int(np.prod(shape))))
        parts = raw.astype("<u8").view("<u2").reshape(-1, 4).astype(np.int64).sum(1)
        # four times uniform in 0..65535: mean 131070, variance 4 * (65536**2 - 1) / 12
        return ((parts - 131070) / 37837.0).astype(np.float32).reshape(shape)

    def matrix(self, rows: int, columns: int, gain: float) -> np.ndarray:
        """Turns a vector of size 1 per element into one of size `gain`."""
        return self.normal(rows, columns) * np.float32(gain / columns**0.5)

    def around(self, centre: float, spread: float, *shape: int) -> np.ndarray:
        return np.float32(centre) + np.float32(spread) * self.normal(*shape)


def tensors_of(family: Family) -> Arrays:
    """All tensors of a checkpoint, float32, in the order they are written."""
    draw, config = _Draw(family.seed), family.config
    tied = config["tie_word_embeddings"]
    scaling = config.get("logits_scaling", 1.0)
    size = 1 / config.get("embedding_multiplier", 1.0)
    logits = LOGITS * scaling / HIDDEN**0.5
    embedding = draw.normal(VOCAB, HIDDEN)
    found = {"model.embed_tokens.weight": embedding * np.float32(size)}
    norm = draw.around(1.0, 0.2, HIDDEN)
    if tied:
        # The head is given by the embedding: the final norm makes up for its size, and a quarter of
        # negative signs for the likeness of a token with itself.
        norm = norm * np.float32(logits / size)
        norm[::4] *= -1
    else:
        likeness = family.likeness
        other = (1 - likeness**2) ** 0.5 * draw.normal(VOCAB, HIDDEN)
        mixed = likeness * np.roll(embedding, 1, 0) + other
        found["lm_head.weight"] = mixed.astype(np.float32) * np.float32(logits)
    for index in range(config["num_hidden_layers"]):
        at = f"model.layers.{index}."
        layer = _attention(draw, config) | FEED_FORWARD[config["model_type"]](draw, config)
        found |= {at + name: value for name, value in layer.items()}
    return found | {"model.norm.weight": norm}


def _attention(draw: _Draw, config: dict[str, Any]) -> Arrays:
    kind, heads, groups = (
        config["model_type"],
        config["num_attention_heads"],
        config["num_key_value_heads"],
    )
    dim = config.get("head_dim", HIDDEN // heads)
    q, kv = heads * dim, groups * dim
    gain = 1 / config.get("residual_multiplier", 1.0)
    found = {
        "input_layernorm.weight": draw.around(1.0, 0.2, HIDDEN),
        "post_attention_layernorm.weight": draw.around(1.0, 0.2, HIDDEN),
        "self_attn.q_proj.weight": draw.matrix(q, HIDDEN, 1.4),
        "self_attn.k_proj.weight": draw.matrix(kv, HIDDEN, 1.4),
        "self_attn.v_proj.weight": draw.matrix(kv, HIDDEN, 1.0),
        "self_attn.o_proj.weight": draw.matrix(HIDDEN, q, 0.4 * gain),
    }
    if kind in ("qwen2", "qwen2_moe") or config.get("attention_bias"):
        found |= {
            "self_attn.q_proj.bias": draw.around(0.0, 0.5, q),
            "self_attn.k_proj.bias": draw.around(0.0, 0.5, kv),
            "self_attn.v_proj.bias": draw.around(0.0, 0.3, kv),
        }
    if config.get("attention_bias"):
        found["self_attn.o_proj.bias"] = draw.around(0.0, 0.2, HIDDEN)
    if kind in ("qwen3", "qwen3_moe", "olmoe"):
        sizes = (q, kv) if kind == "olmoe" else (dim, dim)
        found["self_attn.q_norm.weight"] = draw.around(1.4, 0.3, sizes[0])
        found["self_attn.k_norm.weight"] = draw.around(1.4, 0.3, sizes[1])
    if kind == "gpt_oss":
        found["self_attn.sinks"] = draw.around(1.0, 1.0, heads)
    return found


def _swiglu(draw: _Draw, width: int, names: tuple[str, str, str], gain: float = 0.6) -> Arrays:
    gate, up, down = names
    return {
        gate: draw.matrix(width, HIDDEN, 1.2),
        up: draw.matrix(width, HIDDEN, 1.2),
        down: draw.matrix(HIDDEN, width, gain),
    }


def _dense(draw: _Draw, config: dict[str, Any]) -> Arrays:
    names = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
    return _swiglu(draw, config["intermediate_size"], names)


def _routed(draw: _Draw, config: dict[str, Any]) -> Arrays:
    """Qwen2-MoE, Qwen3-MoE and OLMoE name their experts in the same way."""
    width = config.get("moe_intermediate_size", config["intermediate_size"])
    found = {"mlp.gate.weight": draw.matrix(config["num_experts"], HIDDEN, 3.0)}
    for expert in range(config["num_experts"]):
        at = f"mlp.experts.{expert}."
        names = (at + "gate_proj.weight", at + "up_proj.weight", at + "down_proj.weight")
        found |= _swiglu(draw, width, names, 0.6)
    if shared := config.get("shared_expert_intermediate_size"):
        at = "mlp.shared_expert."
        names = (at + "gate_proj.weight", at + "up_proj.weight", at + "down_proj.weight")
        found |= _swiglu(draw, shared, names)
        found["mlp.shared_expert_gate.weight"] = draw.matrix(1, HIDDEN, 1.5)
    return found


def _mixtral(draw: _Draw, config: dict[str, Any]) -> Arrays:
    found = {"block_sparse_moe.gate.weight": draw.matrix(config["num_local_experts"], HIDDEN, 3.0)}
    for expert in range(config["num_local_experts"]):
        at = f"block_sparse_moe.experts.{expert}."
        names = (at + "w1.weight", at + "w3.weight", at + "w2.weight")
        found |= _swiglu(draw, config["intermediate_size"], names, 0.6)
    return found


def _granite(draw: _Draw, config: dict[str, Any]) -> Arrays:
    experts, width = config["num_local_experts"], config["intermediate_size"]
    at = "block_sparse_moe."
    rows = draw.matrix(experts * 2 * width, HIDDEN, 1.2).reshape(experts, 2 * width, HIDDEN)
    down = draw.matrix(experts * HIDDEN, width, 0.6 / config["residual_multiplier"])
    return {
        at + "router.layer.weight": draw.matrix(experts, HIDDEN, 3.0),
        at + "input_linear.weight": rows,
        at + "output_linear.weight": down.reshape(experts, HIDDEN, width),
    }


def _gpt_oss(draw: _Draw, config: dict[str, Any]) -> Arrays:
    """Its matrices stand the other way round: (E, H, 2 I), gate and up in turns, and (E, I, H)."""
    experts, width = config["num_local_experts"], config["intermediate_size"]
    # Some neurons reach the clamp of 7.
    fc1 = draw.matrix(experts * 2 * width, HIDDEN, 2.5).reshape(experts, 2 * width, HIDDEN)
    fc2 = draw.matrix(experts * HIDDEN, width, 0.12).reshape(experts, HIDDEN, width)
    at = "mlp.experts."
    return {
        "mlp.router.weight": draw.matrix(experts, HIDDEN, 3.0),
        "mlp.router.bias": draw.around(0.0, 0.5, experts),
        at + "gate_up_proj": np.ascontiguousarray(fc1.swapaxes(1, 2)),
        at + "gate_up_proj_bias": draw.around(0.0, 0.5, experts, 2 * width),
        at + "down_proj": np.ascontiguousarray(fc2.swapaxes(1, 2)),
        at + "down_proj_bias": draw.around(0.0, 0.15, experts, HIDDEN),
    }


FEED_FORWARD = {
    "llama": _dense,
    "qwen2": _dense,
    "qwen3": _dense,
    "mixtral": _mixtral,
    "qwen2_moe": _routed,
    "qwen3_moe": _routed,
    "olmoe": _routed,
    "granitemoe": _granite,
    "gpt_oss": _gpt_oss,
}


def golden_tokens(name: str) -> np.ndarray:
    """(SEQUENCES, LENGTH) token ids: what the golden logits of the family are for."""
    raw = np.random.PCG64(100 + FAMILIES[name].seed).random_raw(SEQUENCES * LENGTH)
    return (raw % np.uint64(VOCAB)).astype(np.int64).reshape(SEQUENCES, LENGTH)


def write_folder(folder: Path, name: str, **changes: Any) -> Path:
    """Writes the checkpoint of a family; `changes` go into its config.json. Returns `folder`."""
    family = FAMILIES[name]
    folder.mkdir(parents=True, exist_ok=True)
    config = {**family.config, **changes}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    arrays = tensors_of(family)
    stored, matrices = {}, 0
    for tensor, value in arrays.items():
        dtype = family.dtypes[matrices % len(family.dtypes) if value.ndim > 1 else 0]
        matrices += value.ndim > 1
        stored[tensor] = (dtype, encode(value, dtype))
    write_shards(folder, stored, family.shards)
    write_tokenizer(folder)
    return folder


def encode(value: np.ndarray, dtype: str) -> np.ndarray:
    """float32 as it is stored; BF16 as uint16, rounded to nearest even."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return value.astype({"F32": np.float32, "F16": np.float16}[dtype])


def digest(folder: Path) -> str:
    """sha256 over the weights of a folder: whether two machines made the same checkpoint."""
    found = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        found.update(file.read_bytes())
    return found.hexdigest()


Stored = dict[str, tuple[str, np.ndarray]]


def write_shards(folder: Path, stored: Stored, shards: int = 1) -> None:
    """One model.safetensors, or several with their index."""
    if shards == 1:
        (folder / "model.safetensors").write_bytes(safetensors(stored))
        return
    names, index = list(stored), {}
    for number in range(shards):
        part = names[number::shards]
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        (folder / file).write_bytes(safetensors({tensor: stored[tensor] for tensor in part}))
        index |= dict.fromkeys(part, file)
    total = sum(value.nbytes for _dtype, value in stored.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


def safetensors(stored: Stored) -> bytes:
    """The bytes of a safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor, (dtype, value) in stored.items():
        span = [at, at + value.nbytes]
        header[tensor] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": span}
        at = span[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(np.ascontiguousarray(value).tobytes() for _dtype, value in stored.values())
    return struct.pack("<Q", len(text)) + text + data


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json as the library writes it, and the three files beside it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = CONTROL_TOKENS + byte_tokens() + [merge.replace(" ", "") for merge in MERGES]
    merges = [tuple(merge.split(" ")) for merge in MERGES]
    model = models.BPE({token: index for index, token in enumerate(tokens)}, merges)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in CONTROL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    generation = {"bos_token_id": 1, "eos_token_id": [2, 0]}
    (folder / "generation_config.json").write_text(json.dumps(generation))
