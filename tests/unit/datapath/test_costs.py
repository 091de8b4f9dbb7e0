"""Learned costs against machines whose parts cost what they are told to cost."""

import json
from random import Random

import pytest

from coeld.datapath.costs import (
    ANSWER,
    FORGET_TOKENS,
    KEPT,
    Costs,
    Part,
    costs_to_json,
    graph_work,
    layers_work,
    lots_work,
    reach_work,
    rest_work,
)
from coeld.datapath.plan import Cut, compile_plan
from coeld.deployment.expectation import learned
from coeld.ids import NodeId

PEER, OTHER = NodeId("a" * 16), NodeId("b" * 16)


def test_a_graph_is_its_fused_layers_and_what_it_ends_with() -> None:
    steps = compile_plan(7, {0, 1, 2, 5, 6})
    works = [graph_work(step) for step in steps if not isinstance(step, Cut)]
    layer, attention, head = Part("layer"), Part("attention"), Part("head")
    assert works == [
        ((layer, 3), (attention, 1)),
        ((attention, 1),),
        ((layer, 2), (head, 1)),
    ]


@pytest.mark.parametrize("seed", range(20))
def test_parts_that_occur_in_different_sums_are_told_apart(seed: int) -> None:
    rng = Random(seed)
    truth = {
        Part("layer"): rng.uniform(2e-4, 2e-2),
        Part("attention"): rng.uniform(1e-4, 1e-2),
        Part("head"): rng.uniform(1e-3, 5e-2),
        Part("token"): rng.uniform(1e-4, 1e-3),
        Part("cut"): rng.uniform(1e-4, 1e-3),
        Part("call", PEER): rng.uniform(5e-5, 5e-4),
        Part("lot", PEER): rng.uniform(5e-5, 5e-3),
        Part("reach", PEER): rng.uniform(1e-4, 5e-3),
        Part("layer", OTHER): rng.uniform(1e-3, 5e-2),
    }
    works = [
        ((Part("layer"), 2), (Part("attention"), 1)),
        ((Part("layer"), 4), (Part("head"), 1)),
        ((Part("head"), 1),),
        ((Part("attention"), 1),),
        *[lots_work(lots, PEER) for lots in range(1, 9)],
        reach_work(PEER),
        layers_work(3, OTHER),
        rest_work(0),
        rest_work(5),
    ]
    costs = Costs()
    for _ in range(200):
        for work in works:
            exact_s = sum(truth[part] * times for part, times in work)
            costs.note(work, exact_s * rng.uniform(0.8, 1.2))
    found = costs.fitted()
    assert found.keys() == truth.keys()
    for work in works:  # what is asked of them: sums as they occur
        told, exact = (sum(c[p] * times for p, times in work) for c in (found, truth))
        assert told == pytest.approx(exact, rel=0.06)
    for kind in ("layer", "attention", "head"):
        assert found[Part(kind)] == pytest.approx(truth[Part(kind)], rel=0.08)


def test_parts_that_only_occur_together_keep_their_proportion_and_sum_up() -> None:
    costs = Costs()
    costs.note(lots_work(8), 0.0094)
    found = costs.fitted()
    assert found[Part("call")] + 8 * found[Part("lot")] == pytest.approx(0.0094)
    assert found[Part("call")] / found[Part("lot")] == pytest.approx(7 / 5)


def test_old_tokens_count_less_and_less() -> None:
    costs = Costs()
    for took_s in [0.1] * FORGET_TOKENS + [0.02] * 4 * FORGET_TOKENS:
        costs.note(ANSWER, took_s)
        costs.note(rest_work(0), took_s / 2)
    assert costs.token_s == pytest.approx(0.02, rel=0.3)
    assert costs.fitted()[Part("token")] == pytest.approx(costs.token_s / 2, rel=1e-3)


def test_new_routes_forget_whole_tokens_and_soon_outweigh_what_parts_cost_before() -> None:
    costs = Costs()
    for _ in range(400):
        costs.note(ANSWER, 0.1)
        costs.note(reach_work(PEER), 0.01)
    costs.rerouted()
    assert costs.token_s == 0
    assert costs.fitted()[Part("reach", PEER)] == pytest.approx(0.01)
    for _ in range(KEPT):
        costs.note(reach_work(PEER), 0.02)
    assert costs.fitted()[Part("reach", PEER)] == pytest.approx(0.015)


def test_nothing_is_learned_while_something_is_in_the_way() -> None:
    costs = Costs()
    costs.paused = True
    costs.note(rest_work(0), 1.0)
    assert costs.fitted() == {}


def test_they_travel_to_the_agent_as_json() -> None:
    costs = Costs()
    costs.note(reach_work(PEER), 0.00125)
    costs.note(rest_work(0), 0.0005)
    rows = json.loads(json.dumps(costs_to_json(costs.fitted())))
    assert learned(rows) == {("reach", PEER): 1_250_000, ("token", ""): 500_000}
