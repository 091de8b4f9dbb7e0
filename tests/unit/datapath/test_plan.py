"""The plan compiler against the obvious reading of what a plan must do."""

from random import Random

import pytest

from coeld.datapath.plan import (
    SPAN_LAYERS_MAX,
    Cut,
    Span,
    chunks,
    compile_plan,
    describe,
    fusible_layers,
)
from coeld.ids import Lot, ModelHash, NodeId
from coeld.routes import RouteTable

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
    steps = compile_plan(layers, fused)
    assert play(steps) == [*obvious, "head"], f"seed={seed}"
    spans = [step for step in steps if isinstance(step, Span)]
    assert all(step.stop - step.first <= SPAN_LAYERS_MAX for step in spans)
    borders = {chunk.stop for chunk in chunks(layers)} - {layers}
    joints = {step.stop for step in spans if step.end == "experts"}
    assert joints == {border for border in borders if border - 1 in fused}, f"seed={seed}"


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
