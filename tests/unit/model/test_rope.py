"""Rotary frequencies against the formulas written out one number at a time."""

from math import ceil, cos, floor, log, pi, sin
from typing import Any

import numpy as np
import pytest

from coeld.errors import BadModelFile, UnsupportedModel
from coeld.model.families.rope import read_rope
from coeld.model.families.settings import Settings
from coeld.model.manifest import Rope
from tests.fakes.memory_checkpoint import MemoryCheckpoint

DIM, CONTEXT = 32, 4096


def huggingface(**config: Any) -> Rope:
    config = {"max_position_embeddings": CONTEXT, **config}
    return read_rope(Settings(MemoryCheckpoint("huggingface", config, {}), ""), DIM, 10_000.0)


def gguf(tensors: dict[str, np.ndarray] | None = None, **keys: Any) -> Rope:
    config = {f"x.{key.replace('__', '.')}": value for key, value in keys.items()}
    config["x.context_length"] = CONTEXT
    return read_rope(Settings(MemoryCheckpoint("gguf", config, tensors or {}), "x"), DIM, 10_000.0)


def plain(theta: float) -> list[float]:
    return [1 / theta ** (2 * i / DIM) for i in range(DIM // 2)]


def same(found: Rope, frequencies: list[float], scale: float = 1.0) -> None:
    np.testing.assert_allclose(found.inverse_frequencies, frequencies, rtol=1e-6)
    assert found.scale == pytest.approx(scale, rel=1e-6)


def test_without_scaling_they_fall_geometrically() -> None:
    same(huggingface(), plain(10_000.0))
    same(huggingface(rope_theta=5e5), plain(5e5))
    same(huggingface(rope_parameters={"rope_theta": 5e5, "rope_type": "default"}), plain(5e5))
    same(huggingface(rope_theta=1000, rope_scaling=None), plain(1000.0))
    same(gguf(rope__freq_base=5e5), plain(5e5))
    same(huggingface(rope_theta=3580165449.0), plain(3580165449.0))  # Gradient's, for 1048k tokens
    same(gguf(rope__freq_base=3580165449.0), plain(3580165449.0))


def test_linear_scaling_divides_positions() -> None:
    wanted = [value / 4 for value in plain(10_000.0)]
    same(huggingface(rope_scaling={"type": "linear", "factor": 4}), wanted)
    same(gguf(rope__scaling__type="linear", rope__scaling__factor=4.0), wanted)


def test_llama3_stretches_slow_turns_and_keeps_fast_ones() -> None:
    wanted = []
    for value in plain(5e5):
        wavelength = 2 * pi / value
        if wavelength < 512 / 4:
            wanted.append(value)
        elif wavelength > 512 / 1:
            wanted.append(value / 8)
        else:
            smooth = (512 / wavelength - 1) / (4 - 1)
            wanted.append((1 - smooth) * value / 8 + smooth * value)
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    }
    same(huggingface(rope_theta=5e5, rope_scaling=scaling), wanted)
    factors = np.array([a / b for a, b in zip(plain(5e5), wanted, strict=True)], np.float32)
    same(gguf({"rope_freqs.weight": factors}, rope__freq_base=5e5), wanted)


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize(("fast", "slow"), [(32, 1), (16, 2)])
def test_yarn_blends_between_two_numbers_of_turns(truncate: bool, fast: int, slow: int) -> None:
    def where(turns: float) -> float:
        return DIM * log(1024 / (turns * 2 * pi)) / (2 * log(10_000.0))

    low, high = where(fast), where(slow)
    if truncate:
        low, high = floor(low), ceil(high)
    low, high = max(low, 0), min(high, DIM - 1)
    wanted = []
    for i, value in enumerate(plain(10_000.0)):
        ramp = min(max((i - low) / (high - low), 0), 1)
        wanted.append(value / 4 * ramp + value * (1 - ramp))
    scale = 0.1 * log(4) + 1
    yarn: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "truncate": truncate}
    yarn |= {"beta_fast": fast, "beta_slow": slow, "original_max_position_embeddings": 1024}
    same(huggingface(rope_scaling=yarn), wanted, scale)
    same(huggingface(rope_scaling=yarn | {"attention_factor": 1.5}), wanted, 1.5)
    if truncate:
        found = gguf(
            rope__scaling__type="yarn",
            rope__scaling__factor=4.0,
            rope__scaling__original_context_length=1024,
            rope__scaling__yarn_beta_fast=float(fast),
            rope__scaling__yarn_beta_slow=float(slow),
        )
        same(found, wanted, scale)


def test_frequencies_are_float32_so_that_no_last_bit_reaches_the_hash() -> None:
    rope = huggingface(rope_theta=12345.678)
    assert all(value == float(np.float32(value)) for value in rope.inverse_frequencies)
    turned = [cos(value) ** 2 + sin(value) ** 2 for value in rope.inverse_frequencies]
    np.testing.assert_allclose(turned, 1)


@pytest.mark.parametrize(
    "factors", [np.ones(3, np.float32), np.zeros(DIM // 2, np.float32), np.ones((2, 8), np.float32)]
)
def test_factors_that_cannot_be_are_refused(factors: np.ndarray) -> None:
    with pytest.raises(BadModelFile, match="rope_freqs"):
        gguf({"rope_freqs.weight": factors})


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "su", 3])
def test_other_kinds_are_unsupported(kind: Any) -> None:
    with pytest.raises(UnsupportedModel, match="rope_type"):
        huggingface(rope_scaling={"rope_type": kind, "factor": 2.0})
