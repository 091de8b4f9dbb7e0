"""Smoothing changes how a layer is written, never what it computes; statistics are of what runs."""

from pathlib import Path

import numpy as np
import pytest

from coeld.compression.quantize import dequantize, quantize
from coeld.compression.smooth import smoothing
from coeld.model.calibration import (
    TOKENS_MAX,
    Calibration,
    calibration_tokens,
    route,
)
from coeld.model.families import blueprint
from coeld.model.gguf_file import GgufFile
from coeld.model.manifest import Routing
from tests.fakes.memory_checkpoint import ARCHITECTURES, huggingface

NAMES = sorted(ARCHITECTURES)
TOKENS = list(range(20, 60))


@pytest.mark.parametrize("name", NAMES)
def test_a_smoothed_model_is_the_same_function(name: str) -> None:
    """Fed to the same states, the original and the smoothed layers give the same next states."""
    plan = blueprint(huggingface(name))
    one, two = Calibration(plan, TOKENS), Calibration(plan, TOKENS)
    for layer in range(plan.shape.layers):
        trunk = plan.trunk(layer)
        smoothed = one.trunk(trunk)
        two.trunk(smoothed)
        assert not np.array_equal(smoothed["qkv"], trunk["qkv"])
        assert not np.array_equal(smoothed["ffn_norm"], trunk["ffn_norm"])
        assert np.array_equal(one.gates > 0, two.gates > 0)
        for index in range(len(plan.layers[layer].experts)):
            expert = plan.expert(layer, index)
            two.expert(index, one.expert(index, expert))
        np.testing.assert_allclose(one._x, two._x, rtol=1e-4, atol=1e-4 * np.abs(one._x).max())


@pytest.mark.parametrize("name", NAMES)
def test_what_was_given_is_not_changed(name: str) -> None:
    plan = blueprint(huggingface(name))
    calibration = Calibration(plan, TOKENS)
    trunk, expert = plan.trunk(0), plan.expert(0, 0)
    before = {key: value.copy() for key, value in (trunk | expert).items()}
    calibration.trunk(trunk)
    calibration.expert(0, expert)
    for key, value in (trunk | expert).items():
        np.testing.assert_array_equal(value, before[key])


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_spending_what_was_given_changes_no_bit_of_the_result(name: str) -> None:
    plan = blueprint(huggingface(name))
    kept, spent = Calibration(plan, TOKENS), Calibration(plan, TOKENS)
    for layer in range(plan.shape.layers):
        kept.trunk(plan.trunk(layer))
        spent.trunk(plan.trunk(layer))
        for index in range(len(plan.layers[layer].experts)):
            own = {key: value.copy() for key, value in plan.expert(layer, index).items()}
            smooth = spent.expert(index, own, spend=True)
            for key, value in kept.expert(index, plan.expert(layer, index)).items():
                assert value.tobytes() == smooth[key].tobytes()
            assert smooth["gate"] is own["gate"]
        assert kept._x.tobytes() == spent._x.tobytes()


def test_each_row_chooses_as_many_experts_as_the_model_says() -> None:
    plan = blueprint(huggingface("qwen3_moe"))
    calibration = Calibration(plan, TOKENS)
    for layer in range(plan.shape.layers):
        calibration.trunk(plan.trunk(layer))
        assert calibration.rows.shape == (len(TOKENS), plan.shape.hidden)
        assert ((calibration.gates > 0).sum(1) == plan.shape.top_k).all()
        np.testing.assert_allclose(calibration.gates.sum(1), 1)
        for expert in range(plan.shape.experts):
            calibration.expert(expert, plan.expert(layer, expert))


@pytest.mark.parametrize("seed", range(30))
def test_routing_is_what_its_definition_says(seed: int) -> None:
    rng = np.random.default_rng(seed)
    experts, top_k = int(rng.integers(2, 12)), 1
    top_k = int(rng.integers(1, experts + 1))
    kind = Routing(
        ("softmax", "sigmoid")[seed % 2], bool(rng.integers(2)), float(rng.uniform(0.5, 3))
    )
    logits = rng.standard_normal((5, experts)) * 3
    correction = rng.standard_normal(experts).astype(np.float32) * (seed % 3 == 0)
    found = route(logits, kind, top_k, correction)
    for row, gates in zip(logits, found, strict=True):
        if kind.score == "softmax":
            scores = [np.exp(x) / sum(np.exp(y) for y in row) for x in row]
        else:
            scores = [1 / (1 + np.exp(-x)) for x in row]
        order = sorted(range(experts), key=lambda e: -(scores[e] + correction[e]))[:top_k]
        total = sum(scores[e] for e in order) if kind.renormalise else 1.0
        wanted = [scores[e] / total * kind.scale if e in order else 0.0 for e in range(experts)]
        np.testing.assert_allclose(gates, wanted, rtol=1e-12)


def test_of_equal_scores_the_first_experts_are_chosen() -> None:
    gates = route(np.zeros((1, 6)), Routing("softmax", True), 2, np.zeros(1, np.float32))
    assert gates.tolist() == [[0.5, 0.5, 0, 0, 0, 0]]


def test_smoothed_channels_survive_int8_better() -> None:
    """Few loud channels among quiet ones: the case SmoothQuant is for."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 256)) * np.where(rng.random(256) < 0.03, 60.0, 1.0)
    w = rng.standard_normal((32, 256)).astype(np.float32)

    def error(s: np.ndarray) -> float:
        rounded = [
            dequantize(*quantize(m.astype(np.float32), 8, 64), bits=8) for m in (x / s, w * s)
        ]
        return float(np.abs(rounded[0] @ rounded[1].T - x @ w.T).mean())

    assert error(smoothing(np.abs(x).max(0))) < 0.6 * error(np.ones(256, np.float32))


@pytest.mark.parametrize("seed", range(20))
def test_last_bits_of_the_measurement_do_not_change_the_factors(seed: int) -> None:
    rng = np.random.default_rng(seed)
    loudest = np.exp(rng.standard_normal(4096))
    nudged = loudest * (1 + rng.choice([-1, 1], 4096) * 1e-13)
    assert np.array_equal(smoothing(loudest), smoothing(nudged))


def test_silent_channels_get_a_finite_factor() -> None:
    for loudest in (np.zeros(8), np.array([0.0, 5.0])):
        assert np.isfinite(smoothing(loudest)).all()
        assert (smoothing(loudest) > 0).all()


def test_the_text_is_the_same_tokens_every_time(tiny_gguf: Path) -> None:
    with GgufFile(tiny_gguf) as file:
        words = file.vocabulary(file.shape("token_embd.weight")[0])
    assert words is not None
    tokens = calibration_tokens(words.json)
    assert len(tokens) == TOKENS_MAX
    assert tokens == calibration_tokens(words.json)
