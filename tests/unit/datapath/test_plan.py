"""The plan compiler against the obvious reading of what a plan must do."""

from dataclasses import replace
from random import Random

import pytest

from coeld.datapath.plan import (
    SPAN_LAYERS_MAX,
    Cut,
    Span,
    borders_of,
    chunks,
    compile_plan,
    describe,
    fusible_layers,
    part_of,
)
from coeld.ids import Lot, ModelHash, NodeId
from coeld.routes import Leg, RouteTable

ME, OTHER = NodeId("a" * 16), NodeId("b" * 16)


def play(steps) -> list[str]:
    """What a reader of the plan does, one word at a time."""
    words = []
    for step in steps:
        match step:
            case Cut(layer):
                words.append(f"call {layer}")
            case Span(first, stop, end):
                for layer in range(first, stop):
                    words.append(f"attention {layer}")
                    if layer in step.fused():
                        words.append(f"experts {layer}")
                words += ["head"] if end == "head" else []
    return words


@pytest.mark.parametrize("seed", range(200))
def test_every_layer_runs_once_in_order_and_only_unfused_layers_are_cut(seed: int) -> None:
    rng = Random(seed)
    layers = rng.randint(1, 40)
    fused = {layer for layer in range(layers) if rng.random() < rng.choice([0, 0.3, 0.9, 1])}
    obvious = []
    for layer in range(layers):
        obvious += [f"attention {layer}", f"{'experts' if layer in fused else 'call'} {layer}"]
    legs = {layer for layer in range(1, layers + 1) if rng.random() < rng.choice([0, 0, 0.2])}
    steps = compile_plan(layers, fused, legs)
    assert play(steps) == [*obvious, "head"], f"seed={seed}"
    spans = [step for step in steps if isinstance(step, Span)]
    assert all(step.stop - step.first <= SPAN_LAYERS_MAX for step in spans)
    borders = {chunk.stop for chunk in chunks(layers)} - {layers} | legs
    joints = {step.stop for step in spans if step.end == "experts"}
    assert joints == {border for border in borders if border - 1 in fused}, f"seed={seed}"


@pytest.mark.parametrize("seed", range(200))
def test_a_part_runs_its_layers_or_there_is_none(seed: int) -> None:
    rng = Random(seed)
    layers = rng.randint(1, 20)
    fused = {layer for layer in range(layers) if rng.random() < rng.choice([0, 0.3, 0.9, 1])}
    legs = {layer for layer in range(1, layers + 1) if rng.random() < 0.2}
    steps = compile_plan(layers, fused, legs)
    for first in range(layers + 1):
        for stop in range(first, layers + 1):
            obvious = []
            for layer in range(first, stop):
                obvious.append(f"attention {layer}")
                obvious.append(f"{'experts' if layer in fused else 'call'} {layer}")
            starts = {step.first for step in steps if isinstance(step, Span)}
            ends = {step.stop for step in steps if isinstance(step, Span) and step.end != "head"}
            part = part_of(steps, first, stop, head=False)
            if first < stop and first in starts and stop in ends:
                assert play(part) == obvious, f"seed={seed}"
            else:
                assert not part, f"seed={seed}"
            if stop == layers:
                part = part_of(steps, first, stop, head=True)
                expected = [*obvious, "head"] if first in starts else []
                assert play(part) == expected, f"seed={seed}"


def table(*nodes: NodeId) -> RouteTable:
    return RouteTable(ModelHash("m"), 1, {}, dict.fromkeys(nodes, ("127.0.0.1", 1)))


def test_a_device_alone_with_everything_is_one_graph() -> None:
    held = {Lot(layer, expert) for layer in range(3) for expert in range(2)}
    assert fusible_layers(2, held, table(ME), ME) == {0, 1, 2}
    assert fusible_layers(2, held, None, ME) == {0, 1, 2}
    assert describe(compile_plan(3, {0, 1, 2})) == "1 graph, 0 cuts"


def test_whoever_may_be_called_by_peers_fuses_nothing() -> None:
    held = {Lot(layer, expert) for layer in range(3) for expert in range(2)}
    assert fusible_layers(2, held, table(ME, OTHER), ME) == frozenset()
    assert fusible_layers(2, held - {Lot(1, 1)}, table(ME), ME) == {0, 2}
    assert describe(compile_plan(3, ())) == "4 graphs, 3 cuts"


def test_layers_of_spans_that_a_device_serves_whole_are_fused_there() -> None:
    held = {Lot(layer, expert) for layer in range(4) for expert in range(2)} - {Lot(2, 0)}
    legs = (Leg(ME, 0, 1), Leg(OTHER, 1, 2), Leg(ME, 2, 4))
    spans = (Leg(ME, 2, 4), Leg(OTHER, 0, 2))
    pair = replace(table(ME, OTHER), legs=legs, spans=spans)
    assert fusible_layers(2, held, pair, ME) == {3}
    assert borders_of(pair, ME) == {1, 2, 4}
    assert borders_of(replace(pair, legs=()), ME) == {2, 4}
    assert borders_of(replace(table(ME), spans=spans), ME) == frozenset()
    assert borders_of(None, ME) == frozenset()
