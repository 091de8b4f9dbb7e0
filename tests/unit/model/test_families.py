"""Every family: the tiny checkpoints give the logits of transformers, and bad ones are refused."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coeld.errors import BadModelFile, ModelError, UnsupportedModel
from coeld.model.calibration import Calibration, rms_norm, times
from coeld.model.families import FAMILIES, blueprint
from coeld.model.families.blueprint import Blueprint, half_rotated
from tests.fakes.memory_checkpoint import (
    ARCHITECTURES,
    MemoryCheckpoint,
    gguf_spelling,
    huggingface,
)
from tests.harness.tiny_checkpoints import golden_tokens

GOLDEN = Path(__file__).parents[2] / "golden/families"
NAMES = sorted(ARCHITECTURES)
UNSAID = {"qwen2": 16, "mixtral": 24}
"""Windows that GGUF files of these families cannot express: only the tokens before are the same."""
BOTH = [huggingface, gguf_spelling]


def logits(plan: Blueprint, tokens: list[int]) -> np.ndarray:
    """Through the float64 pass that calibrates imports, smoothing and all."""
    calibration = Calibration(plan, tokens)
    for layer in range(plan.shape.layers):
        calibration.trunk(plan.trunk(layer))
        for expert in range(len(plan.layers[layer].experts)):
            calibration.expert(expert, plan.expert(layer, expert))
    states = rms_norm(calibration._x, plan.norm.read(plan.checkpoint), plan.shape.norm_epsilon)
    return times(states, plan.head.read(plan.checkpoint))


@pytest.mark.parametrize("spelling", BOTH)
@pytest.mark.parametrize("name", NAMES)
def test_the_logits_are_those_of_transformers(name: str, spelling: Any) -> None:
    golden = np.load(GOLDEN / f"{name}.npz")["logits"][0]
    found = logits(blueprint(spelling(name)), golden_tokens(name)[0].tolist())
    count = len(golden) if spelling is huggingface else UNSAID.get(name, len(golden))
    assert np.abs(found - golden)[:count].max() < 1e-4 * np.abs(golden).max()


def test_every_family_is_tested() -> None:
    untested = {"granitemoeshared"}  # below
    assert {family.name for family in FAMILIES} == set(NAMES) | untested


def test_granites_shared_expert_adds_to_the_routed_ones() -> None:
    """As one more expert that every token chooses with weight 1."""
    rng = np.random.default_rng(0)
    plain = huggingface("granitemoe")
    shared = huggingface("granitemoe", model_type="granitemoeshared", shared_intermediate_size=64)
    for layer in range(3):
        at = f"model.layers.{layer}.shared_mlp."
        shared.tensors[at + "input_linear.weight"] = rng.standard_normal((128, 128)) * 0.1
        shared.tensors[at + "output_linear.weight"] = np.zeros((128, 64))
    tokens = golden_tokens("granitemoe")[0].tolist()
    silent = logits(blueprint(shared), tokens)
    assert np.allclose(silent, logits(blueprint(plain), tokens), atol=1e-9)
    shared.tensors["model.layers.2.shared_mlp.output_linear.weight"] += 1.0
    assert np.abs(logits(blueprint(shared), tokens) - silent).max() > 0.1


def test_gpt_oss_as_it_is_published_is_in_mxfp4() -> None:
    """Bytes drawn by lot; what they mean is looked up one nibble at a time."""
    rng = np.random.default_rng(0)
    plain = huggingface("gpt_oss")
    packing = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    packed = huggingface("gpt_oss", quantization_config=packing)
    meaning = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    for layer in range(3):
        for part, n, k in (("gate_up_proj", 128, 128), ("down_proj", 128, 64)):
            name = f"model.layers.{layer}.mlp.experts.{part}"
            blocks = rng.integers(0, 256, (8, n, k // 32, 16))
            scales = rng.integers(120, 124, (8, n, k // 32))
            wanted = np.zeros((8, n, k), np.float32)
            for at, byte in np.ndenumerate(blocks):
                for half, nibble in enumerate((byte % 16, byte // 16)):
                    value = meaning[nibble % 8] * (-1 if nibble >= 8 else 1)
                    column = 32 * at[2] + 2 * at[3] + half
                    wanted[at[0], at[1], column] = value * 2.0 ** (scales[at[:3]] - 127)
            plain.tensors[name] = wanted.swapaxes(1, 2)
            del packed.tensors[name]
            packed.tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    tokens = golden_tokens("gpt_oss")[0].tolist()
    expected = logits(blueprint(plain), tokens)
    np.testing.assert_array_equal(logits(blueprint(packed), tokens), expected)
    packed.tensors["model.layers.1.mlp.experts.down_proj_scales"][3, 5, 1] = 255
    with pytest.raises(BadModelFile, match=r"layers\.1\.mlp\.experts\.down_proj_blocks"):
        blueprint(packed).expert(1, 3)
    del packed.tensors["model.layers.1.mlp.experts.down_proj_scales"]
    with pytest.raises(BadModelFile, match=r"layers\.1\.mlp\.experts\.down_proj_scales"):
        blueprint(packed)


# Tensors


@pytest.mark.parametrize("spelling", BOTH)
@pytest.mark.parametrize("name", NAMES)
def test_each_missing_tensor_is_named(name: str, spelling: Any) -> None:
    checkpoint = spelling(name)
    optional = {"rope_freqs.weight", "output.weight"}
    for tensor in some(checkpoint) - optional:
        broken = without(checkpoint, tensor)
        with pytest.raises(ModelError, match=tensor.replace(".", r"\.")) as caught:
            blueprint(broken)
        assert type(caught.value) is BadModelFile
        assert broken.reads in ([], ["rope_freqs.weight"]), "nothing is read before the check"


def some(checkpoint: MemoryCheckpoint) -> set[str]:
    """The tensors of one layer, and those of none."""
    others = (".layers.0.", ".layers.2.", "blk.0.", "blk.2.")
    return {name for name in checkpoint.names() if not any(part in name for part in others)}


def without(checkpoint: MemoryCheckpoint, tensor: str) -> MemoryCheckpoint:
    rest = {name: value for name, value in checkpoint.tensors.items() if name != tensor}
    return MemoryCheckpoint(checkpoint.kind, checkpoint.config, rest)


@pytest.mark.parametrize("spelling", BOTH)
@pytest.mark.parametrize("name", NAMES)
def test_each_misshaped_tensor_is_named_with_both_shapes(name: str, spelling: Any) -> None:
    checkpoint = spelling(name)
    for tensor in some(checkpoint):
        value = checkpoint.tensors[tensor]
        wrong = np.concatenate([value, value[:1]])
        changed = {**checkpoint.tensors, tensor: wrong}
        with pytest.raises(BadModelFile, match="expected") as caught:
            blueprint(MemoryCheckpoint(checkpoint.kind, checkpoint.config, changed))
        said = str(caught.value)
        assert tensor in said or "vocab_size" in said
        assert str(wrong.shape) in said or "rows" in said


@pytest.mark.parametrize("spelling", BOTH)
@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_too_many_is_not_ignored(name: str, spelling: Any) -> None:
    checkpoint = spelling(name)
    extra = "blk.0.ffn_gate.scale" if spelling is gguf_spelling else "model.layers.0.mlp.extra"
    checkpoint.tensors[extra] = np.ones(4, np.float32)
    with pytest.raises(UnsupportedModel, match=extra):
        blueprint(checkpoint)


# Configurations


@pytest.mark.parametrize("spelling", BOTH)
@pytest.mark.parametrize("name", NAMES)
def test_each_count_that_contradicts_the_tensors_is_refused(name: str, spelling: Any) -> None:
    checkpoint = spelling(name)
    unseen = {"max_position_embeddings", "context_length", "max_window_layers", "sliding_window"}
    unseen |= {"bos_token_id", "eos_token_id", "decoder_sparse_step", "num_experts_per_tok"}
    unseen |= {"expert_used_count", "original_context_length", "vocab_size"}
    if name in ("qwen3_moe", "qwen2_moe"):
        unseen |= {"intermediate_size", "feed_forward_length"}  # of dense layers, which it has not
    if spelling is gguf_spelling and name == "gpt_oss":
        unseen |= {"feed_forward_length"}
    for key, value in checkpoint.config.items():
        if type(value) is not int or key.rpartition(".")[2] in unseen:
            continue
        for wrong in (value + 1, value * 2, max(1, value // 2), 0, -1, 1 << 40, "7", 1.5, True):
            try:
                blueprint(changed(checkpoint, key, wrong))
            except (BadModelFile, UnsupportedModel):
                continue
            pytest.fail(f"{key} = {wrong!r} was accepted")


def changed(checkpoint: MemoryCheckpoint, key: str, value: Any) -> MemoryCheckpoint:
    config = {**checkpoint.config, key: value}
    return MemoryCheckpoint(checkpoint.kind, config, checkpoint.tensors)


WEIRD: list[Any] = [None, [], {}, [{}], {"rope_type": []}, "x", "", -1, 0, 1, 1 << 70, True]
WEIRD += [float("nan"), float("inf"), -0.5, [1, 2], ["sliding_attention"] * 3, {"factor": {}}]


@pytest.mark.parametrize("spelling", BOTH)
@pytest.mark.parametrize("name", NAMES)
def test_weird_values_give_a_model_error_or_another_model_but_nothing_else(
    name: str, spelling: Any
) -> None:
    rng = random.Random(name)
    refused = 0
    for _ in range(60):
        checkpoint = spelling(name)
        for key in rng.sample(sorted(checkpoint.config), rng.choice([1, 1, 3])):
            checkpoint.config[key] = rng.choice(WEIRD)
        try:
            blueprint(checkpoint)
        except ModelError:
            refused += 1
    assert refused > 30


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("llama", "rms_norm_eps", float("nan")),
        ("llama", "rms_norm_eps", -1.0),
        ("llama", "rms_norm_eps", None),
        ("llama", "rope_theta", float("inf")),
        ("llama", "rope_theta", "big"),
        ("llama", "rope_scaling", 8),
        ("llama", "rope_scaling", {"rope_type": "linear", "factor": 0}),
        ("llama", "rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("llama", "vocab_size", 271),
        ("llama", "tie_word_embeddings", "yes"),
        ("llama", "max_position_embeddings", 0),
        ("mixtral", "num_experts_per_tok", 9),
        ("mixtral", "num_experts_per_tok", 0),
        ("gpt_oss", "layer_types", ["full_attention"]),
        ("gpt_oss", "swiglu_limit", -7.0),
        ("granitemoe", "logits_scaling", 0),
        ("olmoe", "norm_topk_prob", 1),
    ],
)
def test_a_value_that_cannot_be_is_refused(name: str, key: str, value: Any) -> None:
    with pytest.raises(BadModelFile, match=r"cannot be|rows"):
        blueprint(huggingface(name, **{key: value}))


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("llama", "rope_scaling", {"rope_type": "dynamic", "factor": 2.0}),
        ("llama", "rope_scaling", {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}),
        ("llama", "partial_rotary_factor", 0.5),
        ("qwen2", "use_mrope", True),
        ("llama", "hidden_act", "gelu"),
        ("llama", "mlp_bias", True),
        ("llama", "quantization_config", {"quant_method": "awq"}),
        ("llama", "final_logit_softcapping", 30.0),
        ("qwen3_moe", "decoder_sparse_step", 2),
        ("qwen3_moe", "mlp_only_layers", [0]),
        ("qwen3_moe", "shared_expert_intermediate_size", 64),
        ("qwen3_moe", "qkv_bias", True),
        ("qwen3_moe", "use_qk_norm", False),
        ("llama", "use_qk_norm", True),
        ("olmoe", "clip_qkv", 8.0),
        ("gpt_oss", "layer_types", ["full_attention", "chunked_attention", "full_attention"]),
    ],
)
def test_a_key_that_changes_the_computation_is_unsupported(name: str, key: str, value: Any) -> None:
    with pytest.raises(UnsupportedModel, match=r"rope_type|rope_parameters|" + key):
        blueprint(huggingface(name, **{key: value}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.rope.scaling.type", "longrope"),
        ("llama.rope.scaling.factor", 2.0),
        ("llama.attention.sliding_window", 128),
        ("llama.logit_scale", 0.5),
        ("llama.attention.clamp_kqv", 1.0),
        ("llama.rope.dimension_count", 8),
        ("llama.attention.value_length", 8),
    ],
)
def test_the_same_in_gguf(key: str, value: Any) -> None:
    with pytest.raises(UnsupportedModel, match=key):
        blueprint(changed(gguf_spelling("llama"), key, value))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("torch_dtype", "bfloat16"),
        ("use_cache", False),
        ("rope_interleaved", False),
        ("use_mrope", False),
        ("something_new", None),
        ("attention_dropout", 0.1),
    ],
)
def test_a_key_that_changes_nothing_is_fine(key: str, value: Any) -> None:
    blueprint(huggingface("llama", **{key: value}))


def test_what_qwen3_coder_says_that_it_has_not_is_fine() -> None:
    extra = {"shared_expert_intermediate_size": 0, "qkv_bias": False, "use_qk_norm": True}
    assert blueprint(huggingface("qwen3_moe", **extra)).shape.shared_width == 0
    key, checkpoint = "qwen3moe.expert_shared_feed_forward_length", gguf_spelling("qwen3_moe")
    assert blueprint(changed(checkpoint, key, 0)).shape.shared_width == 0
    with pytest.raises(UnsupportedModel, match=key):
        blueprint(changed(checkpoint, key, 64))


def test_the_width_of_experts_in_old_files_follows_from_how_many_are_used() -> None:
    checkpoint = gguf_spelling("qwen2_moe")
    width = checkpoint.config.pop("qwen2moe.expert_feed_forward_length")
    used = checkpoint.config["qwen2moe.expert_used_count"]
    whole = changed(checkpoint, "qwen2moe.feed_forward_length", used * width)
    assert blueprint(whole).shape.expert_width == width


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "qwen2_moe", "qwen3_moe"])
def test_qwen_has_windows_only_where_it_says_that_they_are_used(name: str) -> None:
    checkpoint = huggingface(name, sliding_window=16, max_window_layers=1)
    checkpoint.config["use_sliding_window"] = True
    assert 16 in blueprint(checkpoint).shape.windows
    for unsaid in (None, False):
        assert blueprint(changed(checkpoint, "use_sliding_window", unsaid)).shape.windows == ()


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_other_families_have_windows_without_saying_so(name: str) -> None:
    assert 16 in blueprint(huggingface(name, sliding_window=16)).shape.windows


@pytest.mark.parametrize("kind", ["gguf", "huggingface"])
@pytest.mark.parametrize("found", ["mamba", 3, None])
def test_an_unknown_family_is_answered_with_the_known_ones(kind: Any, found: Any) -> None:
    checkpoint = MemoryCheckpoint(kind, {"general.architecture": found, "model_type": found}, {})
    with pytest.raises(UnsupportedModel, match=r"coeld runs gpt.oss, granitemoe.*qwen3.?moe"):
        blueprint(checkpoint)


# Shapes


@pytest.mark.parametrize(
    ("width", "block", "slices"),
    [(1024, 128, 8), (512, 128, 4), (448, 64, 7), (64, 64, 1), (96, 32, 3), (48, 16, 3)],
)
def test_block_and_slices_follow_from_the_widths(width: int, block: int, slices: int) -> None:
    checkpoint = huggingface("llama", intermediate_size=width)
    for layer in range(3):
        for part, shape in (("gate", (width, 128)), ("up", (width, 128)), ("down", (128, width))):
            name = f"model.layers.{layer}.mlp.{part}_proj.weight"
            checkpoint.tensors[name] = np.zeros(shape, np.float32)
    plan = blueprint(checkpoint)
    shape = plan.shape
    assert (plan.block, shape.experts, shape.top_k) == (block, slices, slices)
    assert shape.expert_width * slices == width


def test_widths_that_fit_no_block_are_unsupported() -> None:
    with pytest.raises(UnsupportedModel, match="multiples of 16"):
        blueprint(huggingface("llama", intermediate_size=40))


@pytest.mark.parametrize("size", [24, 40, 120])
def test_heads_that_the_attention_kernel_refuses_are_unsupported(size: int) -> None:
    with pytest.raises(UnsupportedModel, match="multiple of 16 values per head"):
        blueprint(huggingface("llama", head_dim=size))


def test_an_embedding_written_twice_is_still_tied() -> None:
    checkpoint = huggingface("llama")
    checkpoint.tensors["lm_head.weight"] = checkpoint.tensors["model.embed_tokens.weight"]
    plan = blueprint(checkpoint)
    assert plan.tied
    assert plan.head.name == "model.embed_tokens.weight"


def test_rows_come_back_in_the_order_before_llama_cpp_permuted_them() -> None:
    heads, dim, columns = 3, 8, 5
    wanted = np.arange(heads * dim * columns, dtype=np.float32).reshape(heads * dim, columns)
    permuted = wanted.reshape(heads, 2, dim // 2, columns).swapaxes(1, 2).reshape(wanted.shape)
    np.testing.assert_array_equal(half_rotated(permuted, heads), wanted)
