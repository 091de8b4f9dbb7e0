"""Which layers spare memory holds: those that save most, whole runs of equals, and what is held."""

from itertools import product
from random import Random

import pytest

from coeld.deployment.cost import CostModel, Device, Link, Tier
from coeld.deployment.replicas import layers_served, least_layer_ns, replicas
from coeld.ids import Lot, ModelHash, NodeId
from coeld.messages import Record
from coeld.view import ModelDemand

DEMAND = ModelDemand(ModelHash("5e" * 32), "m", 6, 2, 1_000_000, 6_000_000, hidden=576)
A, B, C = (NodeId(letter * 16) for letter in "abc")


def model(
    rooms: list[int],
    speeds: list[int],
    links: dict[tuple[NodeId, NodeId], Link] | None = None,
    weights: list[int] | None = None,
    spans: bool = False,
) -> CostModel:
    """Devices with room for so many layers."""
    devices = [
        Device(node, (Tier("ram", room * 2 * DEMAND.lot_bytes, speed),), weight=weight)
        for node, room, speed, weight in zip(
            (A, B, C), rooms, speeds, weights or [1] * len(rooms), strict=False
        )
    ]
    known = links or {}
    return CostModel(DEMAND, devices, lambda a, b: known.get((a, b), Link(300, 110)), spans=spans)


def owners(layers: str) -> dict[Lot, NodeId]:
    """ "aabbcc": the owner of each layer."""
    return {lot: NodeId(layers[lot.layer] * 16) for lot in DEMAND.lots()}


def test_layers_of_the_slow_and_of_the_far_are_copied_first() -> None:
    slow = model([4, 2, 2], [10_000, 10_000, 2_000])
    assert replicas(slow, owners("aabbcc"), (), 2) == {A: {4, 5}}
    far = {(a, b): Link(5000, 30) for a, b in product((A, B, C), repeat=2) if C in (a, b)}
    assert replicas(model([4, 2, 2], [10_000] * 3, far), owners("aabbcc"), (), 2) == {A: {4, 5}}


def test_of_equals_a_run_stays_together() -> None:
    found = replicas(model([4, 2, 2], [10_000] * 3), owners("aabbcc"), (), 2)
    assert found in ({A: {2, 3}}, {A: {4, 5}})


def test_with_spans_the_shortest_run_is_worth_most_for_its_hop() -> None:
    found = replicas(model([2, 4, 1], [10_000] * 3, spans=True), owners("abbbbc"), (), 2)
    assert found == {A: {5}}


def test_the_one_who_asks_gets_the_copies_that_save_it_calls() -> None:
    contended = model([3, 3, 3], [10_000] * 3, weights=[1, 50, 1])
    found = replicas(contended, owners("aabbcc"), (), 2)
    assert len(found[B]) == 1, "as many as it has room for"
    assert sorted(layer for layers in found.values() for layer in layers) == sorted(
        {layer for layers in found.values() for layer in layers}
    ), "one copy each"


def test_what_is_held_stays_while_nothing_saves_a_quarter_more() -> None:
    known = model([4, 2, 2], [10_000] * 3)
    for held in ((2, 3), (4, 5), (3, 4)):
        serving = tuple(Lot(layer, e) for layer in (0, 1, *held) for e in range(2))
        record = Record(A, 1, 1, model=DEMAND.model, serving=serving)
        assert replicas(known, owners("aabbcc"), (record,), 2) == {A: set(held)}
    slower = model([4, 2, 2], [10_000, 10_000, 2_000])
    serving = tuple(Lot(layer, e) for layer in (0, 1, 2, 3) for e in range(2))
    record = Record(A, 1, 1, model=DEMAND.model, serving=serving)
    assert replicas(slower, owners("aabbcc"), (record,), 2) == {A: {4, 5}}


def test_further_copies_come_after_the_first_of_every_layer() -> None:
    found = replicas(model([6, 6, 6], [10_000] * 3), owners("aabbcc"), (), 3)
    assert found == {A: {2, 3, 4, 5}, B: {0, 1, 4, 5}, C: {0, 1, 2, 3}}
    two = replicas(model([6, 6, 6], [10_000] * 3), owners("aabbcc"), (), 2)
    assert sorted(layer for layers in two.values() for layer in layers) == list(range(6))


def test_nothing_is_proposed_for_layers_in_parts_or_without_a_whole_plan() -> None:
    known = model([6, 6, 6], [10_000] * 3)
    torn = {**owners("aabbcc"), Lot(0, 1): B}
    assert replicas(known, torn, (), 2) == {}
    assert replicas(known, {}, (), 2) == {}
    assert replicas(known, owners("aabbcc"), (), 1) == {}


@pytest.mark.parametrize("seed", range(30))
def test_against_every_choice_of_one_more_copy_of_each_layer(seed: int) -> None:
    """Greedy with limited rooms and one copy per layer: at least half of the best saving."""
    rng = Random(seed)
    links = {
        (a, b): Link(rng.choice([200, 2000, 6000]), 100) for a, b in product((A, B, C), repeat=2)
    }
    known = model(
        [rng.randint(2, 4) for _ in range(3)],
        [rng.choice([2000, 5000, 10_000]) for _ in range(3)],
        links,
        [rng.choice([1, 1, 10]) for _ in range(3)],
    )
    plan = owners("aabbcc")
    spare = [tier.memory_bytes // (2 * DEMAND.lot_bytes) - 2 for tier in known.tiers]

    def price(copies: dict[int, int]) -> int:
        owned = [0, 0, 1, 1, 2, 2]
        costs = [
            least_layer_ns(known, {owned[i], copies.get(i, owned[i])}, layer)
            for i, layer in enumerate(layers_served(known, owned))
        ]
        weights = [known.devices[asker].weight for asker in known.askers]
        return sum(weights[i] * cost for row in costs for i, cost in enumerate(row))

    found = replicas(known, plan, (), 2)
    index = {A: 0, B: 1, C: 2}
    ours = price({layer: index[node] for node, layers in found.items() for layer in layers})
    assert all(len(layers) <= spare[index[node]] for node, layers in found.items())
    choices = product(range(4), repeat=6)
    best = min(
        price({layer: site for layer, site in enumerate(chosen) if site < 3})
        for chosen in choices
        if all(chosen.count(site) <= spare[site] for site in range(3))
    )
    nothing = price({})
    assert 2 * (nothing - ours) >= nothing - best, f"seed={seed}"
