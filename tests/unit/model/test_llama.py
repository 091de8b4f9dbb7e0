"""The llama family: what can be run, and that what would run slightly wrong is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coeld.errors import BadModelFile, UnsupportedModel
from coeld.model.families.llama import half_rotated, read_shape
from coeld.model.gguf_file import GgufFile
from coeld.model.manifest import Shape
from tests.reference.tiny_gguf import Type, write_tiny_llama


def shape_of(path: Path, **options: Any) -> Shape:
    write_tiny_llama(path, layers=1, **options)
    with GgufFile(path) as file:
        return read_shape(file)


@pytest.mark.parametrize(
    ("hidden", "width", "block", "experts"),
    [(64, 512, 64, 8), (64, 448, 64, 7), (64, 64, 64, 1), (96, 512, 32, 8), (64, 352, 32, 1)],
)
def test_block_and_slices_follow_from_the_widths(
    tmp_path: Path, hidden: int, width: int, block: int, experts: int
) -> None:
    shape = shape_of(tmp_path / "m.gguf", hidden=hidden, width=width)
    assert (shape.block, shape.experts, shape.top_k) == (block, experts, experts)
    assert shape.expert_width * shape.experts == width


def test_widths_that_fit_no_block_are_unsupported(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="multiples of 32"):
        shape_of(tmp_path / "m.gguf", hidden=80, kind=Type.F32)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.rope.scaling.type", "linear"),
        ("llama.rope.scaling.factor", 2.0),
        ("llama.attention.sliding_window", 128),
        ("llama.expert_count", 8),
        ("llama.logit_scale", 0.5),
        ("llama.attention.clamp_kqv", 1.0),
    ],
)
def test_a_key_that_changes_the_computation_is_unsupported(
    tmp_path: Path, key: str, value: Any
) -> None:
    with pytest.raises(UnsupportedModel, match=key):
        shape_of(tmp_path / "m.gguf", extra_keys={key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [("llama.rope.scaling.type", "none"), ("llama.attention.key_length", 16)],
)
def test_a_key_that_changes_nothing_is_fine(tmp_path: Path, key: str, value: Any) -> None:
    shape_of(tmp_path / "m.gguf", extra_keys={key: value})


@pytest.mark.parametrize(
    ("name", "count"),
    [("rope_freqs.weight", 8), ("blk.0.attn_q.bias", 64), ("blk.0.ffn_gate_inp.weight", 64)],
)
def test_a_tensor_that_would_be_ignored_is_unsupported(
    tmp_path: Path, name: str, count: int
) -> None:
    with pytest.raises(UnsupportedModel, match=name):
        shape_of(tmp_path / "m.gguf", extra_tensors={name: np.ones(count, np.float32)})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_count", 2),
        ("block_count", 4),
        ("block_count", 0),
        ("block_count", 1 << 31),
        ("block_count", "1"),
        ("attention.head_count", 0),
        ("attention.head_count_kv", 4),
        ("feed_forward_length", 1024),
        ("embedding_length", 128),
        ("attention.layer_norm_rms_epsilon", float("nan")),
        ("attention.layer_norm_rms_epsilon", -1.0),
        ("rope.freq_base", float("inf")),
        ("context_length", True),
    ],
)
def test_a_number_that_contradicts_the_tensors_is_refused(
    tiny_gguf: Path, key: str, value: Any
) -> None:
    with GgufFile(tiny_gguf) as file:
        file.config["llama." + key] = value
        with pytest.raises((BadModelFile, UnsupportedModel)):
            read_shape(file)


def test_a_rotary_embedding_of_part_of_the_head_is_unsupported(tiny_gguf: Path) -> None:
    with GgufFile(tiny_gguf) as file:
        file.config["llama.rope.dimension_count"] = 8
        with pytest.raises(UnsupportedModel, match="head size"):
            read_shape(file)


def test_rows_come_back_in_the_order_before_llama_cpp_permuted_them() -> None:
    heads, dim, columns = 3, 8, 5
    wanted = np.arange(heads * dim * columns, dtype=np.float32).reshape(heads * dim, columns)
    permuted = (  # convert_hf_to_gguf.py, LlamaModel.permute
        wanted.reshape(heads, 2, dim // 2, columns).swapaxes(1, 2).reshape(wanted.shape)
    )
    np.testing.assert_array_equal(half_rotated(permuted, heads), wanted)
