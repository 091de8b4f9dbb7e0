"""What a text says about experts, against a slow truth: the whole model with one part rounded."""

from dataclasses import replace

import numpy as np
import pytest

from coeld.compression.quantize import dequantize, quantize
from coeld.errors import BadRequest, BudgetTooSmall
from coeld.model import importance
from coeld.model.allocation import Allocation, Plan, expert_bytes, trunk_bytes
from coeld.model.calibration import Calibration, rms_norm, times
from coeld.model.families import blueprint
from coeld.model.families.blueprint import Blueprint
from coeld.model.importance import measure, sample
from coeld.model.importer import Precision, import_checkpoint
from coeld.model.manifest import parse_manifest, tensor_bytes
from coeld.model.statistics import Statistics
from coeld.model.store import Store
from tests.fakes.memory_checkpoint import huggingface
from tests.harness.importing import quiet
from tests.harness.tiny_checkpoints import FAMILIES

ROUTED = "mixtral"
DENSE = "llama"


def opened(name: str) -> Blueprint:
    return blueprint(huggingface(name))  # type: ignore[arg-type]


def tokens(plan: Blueprint, count: int = 64) -> list[int]:
    found: list[int] = np.random.default_rng(0).integers(0, plan.shape.vocab, count).tolist()
    return found


@pytest.fixture(scope="module")
def measured() -> dict[str, tuple[Blueprint, Statistics]]:
    plans = {name: opened(name) for name in (ROUTED, DENSE)}
    return {name: (p, measure(p, tokens(p), "text", quiet)) for name, p in plans.items()}


def rounded(plan: Blueprint, weights: dict[str, np.ndarray], bits: int) -> dict[str, np.ndarray]:
    matrices = {
        name: dequantize(*quantize(np.ascontiguousarray(weights[name]), bits, plan.block), bits)
        for name in ("gate", "up", "down")
    }
    return {**weights, **matrices}


def predictions(plan: Blueprint, ids: list[int], change) -> np.ndarray:
    """Log-probabilities with `change(layer, expert, smoothed weights)` in the experts' place."""
    plain, states = Calibration(plan, ids), Calibration(plan, ids)
    for layer in range(plan.shape.layers):
        trunk = plan.trunk(layer)
        smooth = plain.trunk(trunk)
        states.trunk(smooth)  # what smoothing does again to it is no change of the function
        into = trunk["ffn_norm"] / smooth["ffn_norm"]
        for expert in range(len(plan.layers[layer].experts)):
            weights = plan.expert(layer, expert)
            changed = dict(change(layer, expert, plain.expert(expert, weights)))
            assert into.shape == (plan.shape.hidden,)
            states.expert(expert, changed)
    rows = rms_norm(states.states, plan.norm.read(plan.checkpoint), plan.shape.norm_epsilon)
    logits = times(rows, plan.head.read(plan.checkpoint))
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def divergence(exact: np.ndarray, other: np.ndarray) -> float:
    return float((np.exp(exact) * (exact - other)).sum(axis=1).mean())


@pytest.mark.parametrize("name", [ROUTED, DENSE])
def test_a_layers_errors_add_up_to_what_rounding_the_layer_does(name: str, measured) -> None:
    plan, statistics = measured[name]
    ids = tokens(plan)
    exact = predictions(plan, ids, lambda _layer, _expert, weights: weights)
    for layer in (0, plan.shape.layers - 1):

        def change(at: int, _expert: int, weights, layer=layer):
            return rounded(plan, weights, 4) if at == layer else weights

        truth = divergence(exact, predictions(plan, ids, change))
        found = sum(statistics.errors[4][layer])
        assert 0.5 * truth < found < 2 * truth


def test_a_slice_alone_does_about_what_is_predicted(measured) -> None:
    """At 2 bits, where nothing was followed to the end: only shares of squared errors."""
    plan, statistics = measured[DENSE]
    ids, width = tokens(plan), plan.shape.expert_width
    exact = predictions(plan, ids, lambda _layer, _expert, weights: weights)
    for own in range(3):

        def change(at: int, _expert: int, weights, own=own):
            if at != 1:
                return weights
            low, mixed = rounded(plan, weights, 2), {k: v.copy() for k, v in weights.items()}
            neurons = slice(own * width, (own + 1) * width)
            mixed["gate"][neurons], mixed["up"][neurons] = low["gate"][neurons], low["up"][neurons]
            mixed["down"][:, neurons] = low["down"][:, neurons]
            return mixed

        truth = divergence(exact, predictions(plan, ids, change))
        assert 0.5 * truth < statistics.errors[2][1][own] < 2 * truth


@pytest.mark.parametrize("name", [ROUTED, DENSE])
def test_fewer_bits_cost_more_and_nothing_is_free(name: str, measured) -> None:
    _, statistics = measured[name]
    sums = [sum(map(sum, statistics.errors[bits])) for bits in (2, 3, 4, 8)]
    assert sums == sorted(sums, reverse=True)
    assert all(error > 0 for table in statistics.errors.values() for row in table for error in row)


def test_popularity_is_the_part_of_tokens_that_chose_an_expert(measured) -> None:
    plan, routed = measured[ROUTED]
    sums = [pytest.approx(plan.shape.top_k, abs=2e-3)] * plan.shape.layers
    assert list(map(sum, routed.popularity)) == sums
    counts = [64 * part for part in routed.popularity[0]]
    assert counts == [pytest.approx(round(count), abs=0.01) for count in counts]
    plan, dense = measured[DENSE]
    assert dense.popularity == ((1.0,) * plan.shape.experts,) * plan.shape.layers


def test_an_expert_that_no_token_chose_is_unimportant_but_not_free() -> None:
    checkpoint = huggingface(ROUTED)
    (name,) = (n for n in checkpoint.tensors if "layers.0" in n and n.endswith("gate.weight"))
    router = checkpoint.tensors[name].copy()
    router[1:3] = router[1:3] * 1e-3 + router[0]  # 3 never wins against these
    router[3] = 0
    router[0], router[1], router[2] = (sign * router[0] for sign in (1, -1, 1.01))
    checkpoint.tensors[name] = router * 50
    plan = blueprint(checkpoint)  # type: ignore[arg-type]
    statistics = measure(plan, tokens(plan), "text", quiet)
    popularity, errors = statistics.popularity[0], statistics.errors[4][0]
    least = min(range(len(errors)), key=popularity.__getitem__)
    assert 0 < errors[least] <= min(errors) * 1.01
    assert errors[least] < 0.2 * max(errors)


def test_the_same_text_gives_the_same_statistics(measured) -> None:
    plan, statistics = measured[ROUTED]
    assert measure(plan, tokens(plan), "text", quiet) == statistics


def test_loud_rows_are_followed_apart() -> None:
    """One row's error a thousand times the others': both kinds keep their part."""
    squared = np.full((2, 4, 100), 1e-6)
    squared[1, :, 0] = 1.0
    layer = importance._Layer(squared, np.ones((2, 100)))
    assert layer.loud.tolist() == [True] + [False] * 99
    assert layer.shares(True)[:, 2] == pytest.approx([0, 1], abs=1e-5)
    assert layer.shares(False)[:, 2] == pytest.approx([0.5, 0.5], abs=1e-5)


def test_a_text_too_short_to_say_anything_is_refused(tiny_gguf) -> None:
    from coeld.model.open_checkpoint import open_checkpoint

    with open_checkpoint(tiny_gguf) as checkpoint:
        words = checkpoint.vocabulary(checkpoint.shape("token_embd.weight")[0])
    assert words is not None
    with pytest.raises(BadRequest, match="tokens"):
        sample(words.json, "short")
    found = sample(words.json, "some words of a text. " * 400)
    assert len(found) == importance.TOKENS_MAX


@pytest.mark.parametrize("name", sorted(FAMILIES))
@pytest.mark.parametrize("trunk_bits", [8, 4])
def test_bytes_are_those_of_the_weights_in_the_store(name: str, trunk_bits: int, tmp_path) -> None:
    checkpoint, store = huggingface(name), Store(tmp_path)
    plan = blueprint(checkpoint)  # type: ignore[arg-type]
    for bits in (4, 3):
        precision = Precision(bits, trunk_bits)
        manifest = import_checkpoint(store, checkpoint, f"m{bits}", quiet, precision=precision)  # type: ignore[arg-type]
        experts = sum(tensor_bytes(ref) for layer in manifest.experts for ref in layer)
        count = manifest.shape.layers * manifest.shape.experts
        assert experts == count * expert_bytes(plan, bits)
        assert manifest.trunk_bytes == trunk_bytes(plan, trunk_bits)


def test_a_plan_keeps_its_budget_and_beats_uniform_widths(measured) -> None:
    plan, statistics = measured[ROUTED]
    allocation = Allocation(plan, 8, statistics, (2, 3, 4, 8))
    for bits in (3, 4):
        uniform = allocation.uniform(bits)
        mixed = allocation.fit(uniform.bytes)
        assert mixed.bytes <= uniform.bytes
        assert mixed.error <= uniform.error * (1 + 1e-9)
    curve: list[Plan] = allocation.curve()
    assert [plan.error for plan in curve] == sorted((p.error for p in curve), reverse=True)
    smallest = allocation.uniform(2).bytes
    with pytest.raises(BudgetTooSmall, match="too small") as failure:
        allocation.fit(smallest - 1)
    assert failure.value.smallest_bytes == smallest


def test_of_statistics_only_what_the_market_is_told_is_part_of_the_hash(measured, tmp_path) -> None:
    plan, statistics = measured[ROUTED]
    precision = Precision(4, 8, statistics)
    manifest = import_checkpoint(
        Store(tmp_path),
        plan.checkpoint,
        "m",
        quiet,
        precision=precision,
    )
    again = parse_manifest(manifest.to_json())
    assert again.statistics == statistics
    assert again == manifest

    def hashed(**changes: object) -> str:
        return replace(manifest, statistics=replace(statistics, **changes)).hash

    layers, even = plan.shape.layers, (0.5,) * plan.shape.experts
    bare = replace(manifest, statistics=None).hash
    assert hashed(text="another", errors={8: statistics.errors[8]}) == manifest.hash
    assert hashed(tokens=1) == hashed(popularity=(even,) * layers) == bare, "nothing is told"
    skewed = ((0.8, 0.2, *even[2:]), *(even,) * (layers - 1))
    assert len({bare, hashed(popularity=skewed), hashed(popularity=skewed[::-1])}) == 3
    same = tuple(tuple(part * 1.01 for part in row) for row in skewed)
    assert hashed(popularity=same) == hashed(popularity=skewed), "in levels"
    calibrated = replace(manifest, statistics=replace(statistics, popularity=skewed))
    assert calibrated.demand().prior[0] == bytes([5, 3] + [4] * (len(even) - 2))
    assert set(calibrated.demand().prior[1:]) == {b""}
    assert parse_manifest(calibrated.to_json()).demand() == calibrated.demand()
    assert parse_manifest(replace(manifest, statistics=None).to_json()).statistics is None
