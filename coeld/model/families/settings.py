"""The configuration of a checkpoint, read under either spelling, and nothing in it overlooked.

A key that changes what the model computes, and that coeld does not compute, must be refused: a
model that runs slightly wrong is worse than one that does not run. Nobody can list all such keys,
so it is the other way round: every key that is not asked for here by the family, known to say
nothing about the computation, or set to the one value that changes nothing, is refused.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn

from coeld.errors import BadModelFile, UnsupportedModel
from coeld.model.checkpoint import Checkpoint

COUNT_MAX: Final = 1 << 20
NUMBER_MAX: Final = 1e12
"""The largest there are: rotary bases of models for a million tokens, 3.6e9."""

HARMLESS: Final = frozenset(
    """
    vocab_size block_count context_length feed_forward_length rope.dimension_count
    rope.scaling.finetuned
    _name_or_path architectures attention_dropout auto_map bos_token_id dtype eos_token_id
    hidden_dropout id2label initializer_range label2id model_type output_attentions
    output_hidden_states output_router_logits pad_token_id pretraining_tp resid_pdrop
    router_aux_loss_coef router_jitter_noise tokenizer_class torch_dtype transformers_version
    unsloth_fixed unsloth_version use_cache is_llama_config transformers.js_config
    max_window_layers initial_context_length experts_per_token task_specific_params
    _attn_implementation_autoset neftune_noise_alpha bos_token eos_token pad_token use_bfloat16
    temperature top_p do_sample max_length repetition_penalty
    """.split()  # noqa: SIM905
)
"""Keys that are checked elsewhere, or say nothing about the computation (but about training)."""

NEUTRAL: Final[dict[str, Any]] = {
    "attention.causal": True,
    "is_causal": True,
    "use_parallel_residual": False,
    "rope.scale_linear": 1.0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "expert_group_count": 0,
    "expert_group_used_count": 0,
    "expert_shared_count": 1,
    "expert_shared_feed_forward_length": 0,
    "shared_expert_intermediate_size": 0,
    "qkv_bias": False,
    "expert_weights_scale": 1.0,
    "hidden_act": "silu",
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "use_mrope": False,
    "mlp_bias": False,
    "clip_qkv": None,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "chunk_size_feed_forward": 0,
    "tie_encoder_decoder": False,
}
"""Keys that are fine with this one value. Any key is fine when it is null."""


class Settings:
    """One checkpoint's configuration. Every key is given as (Hugging Face's name, GGUF's name).

    An empty name: that kind of source has no such key, and the default holds.
    """

    def __init__(self, checkpoint: Checkpoint, architecture: str) -> None:
        """`architecture`: what GGUF's keys begin with."""
        self.checkpoint = checkpoint
        self.gguf = checkpoint.kind == "gguf"
        self._prefix = architecture + "." if self.gguf else ""
        self._asked: set[str] = set()

    def value(self, huggingface: str, gguf: str) -> Any:
        """The value as it is, None when the key is absent."""
        key = gguf if self.gguf else huggingface
        self._asked.add(key)
        return self.checkpoint.config.get(self._prefix + key) if key else None

    def count(self, huggingface: str, gguf: str, default: int | None = None) -> int:
        """A whole number, 1 to COUNT_MAX. Raises BadModelFile."""
        found = self.value(huggingface, gguf)
        found = default if found is None else found
        if type(found) is not int or not 0 < found <= COUNT_MAX:
            self.bad(huggingface, gguf, found)
        return found

    def number(self, huggingface: str, gguf: str, default: float | None = None) -> float:
        """A positive number. Raises BadModelFile."""
        found = self.value(huggingface, gguf)
        found = default if found is None else found
        if (
            isinstance(found, bool)
            or not isinstance(found, int | float)
            or not 0 < found < NUMBER_MAX
        ):
            self.bad(huggingface, gguf, found)
        return float(found)

    def flag(self, huggingface: str, gguf: str, default: bool) -> bool:
        """Raises BadModelFile."""
        found = self.value(huggingface, gguf)
        found = default if found is None else found
        if type(found) is not bool:
            self.bad(huggingface, gguf, found)
        return found

    def attention_biases(self) -> tuple[bool, bool]:
        """Whether q, k and v have biases, and whether o has, in families where they may.

        GGUF has no key for it: llama.cpp uses what is there.
        """
        if not self.gguf:
            biased = self.flag("attention_bias", "", default=False)
            return biased, biased
        ends = (".attn_q.bias", ".attn_k.bias", ".attn_v.bias"), ".attn_output.bias"
        names = self.checkpoint.names()
        qkv, o = (any(name.endswith(end) for name in names) for end in ends)
        return qkv, o

    def windows(
        self, layers: int, slides: Callable[[int], bool], used: bool = True
    ) -> tuple[int, ...]:
        """Per layer, the tokens a token attends to, itself included; 0 is all. Empty: all are 0.

        `slides` says which layers have a window where `layer_types` does not; `used`, whether there
        are any where `use_sliding_window` does not. Raises BadModelFile, UnsupportedModel.
        """
        size = self.value("sliding_window", "attention.sliding_window")
        used = self.flag("use_sliding_window", "", default=used)
        types = self.value("layer_types", "")
        if not size or not used:
            return ()
        size = self.count("sliding_window", "attention.sliding_window")
        if types is None:
            sliding: Sequence[bool] = [slides(layer) for layer in range(layers)]
        elif isinstance(types, list) and all(
            kind in ("sliding_attention", "full_attention") for kind in types
        ):
            sliding = [kind == "sliding_attention" for kind in types]
        else:
            self.refuse("layer_types", types)
        if len(sliding) != layers:
            self.bad("layer_types", "", types)
        return tuple(size if slide else 0 for slide in sliding) if any(sliding) else ()

    def has(self, tensor: str) -> bool:
        return tensor in self.checkpoint.names()

    def bad(self, huggingface: str, gguf: str, value: Any) -> NoReturn:
        key = gguf if self.gguf else huggingface
        said = "nothing" if value is None else repr(str(value)[:80])
        raise BadModelFile(
            f"{self.checkpoint.source} gives {self._prefix}{key} as {said}, which cannot be. "
            "The file is damaged or made by a broken tool; get it again."
        )

    def refuse(self, key: str, value: Any) -> NoReturn:
        raise UnsupportedModel(
            f"{self.checkpoint.source} sets {self._prefix}{key} to {str(value)[:80]!r}, which "
            "coeld cannot represent exactly. Use a model without it."
        )

    def refuse_what_nobody_asked_for(self) -> None:
        """Call last. Raises UnsupportedModel."""
        for key, value in self.checkpoint.config.items():
            if not key.startswith(self._prefix):
                continue
            name = key.removeprefix(self._prefix)
            if name in self._asked or name in HARMLESS or value is None:
                continue
            if name not in NEUTRAL or value != NEUTRAL[name]:
                self.refuse(name, value)
