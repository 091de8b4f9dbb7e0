"""The way of a request: every layer once, at the device that the table names or here."""

from itertools import pairwise
from random import Random

import pytest

from coeld.datapath.ways import way_of
from coeld.ids import ModelHash, NodeId
from coeld.routes import Leg, RouteTable

ME, B, C, GONE = (NodeId(letter * 16) for letter in "abcd")


def table(*legs: Leg, spans: tuple[Leg, ...] = ()) -> RouteTable:
    addresses = dict.fromkeys((ME, B, C), ("127.0.0.1", 1))
    return RouteTable(ModelHash("m"), 1, {}, addresses, legs=legs, spans=spans)


@pytest.mark.parametrize("seed", range(200))
def test_each_layer_runs_where_the_table_says_unless_that_device_cannot_be_asked(seed: int) -> None:
    rng = Random(seed)
    layers = rng.randint(1, 30)
    stops = sorted({*rng.sample(range(1, layers + 1), rng.randint(0, min(5, layers))), layers})
    legs = [
        Leg(rng.choice((ME, B, C, GONE)), first, stop)
        for first, stop in zip([0, *stops], stops, strict=False)
    ]
    lost = {node for node in (B, C) if rng.random() < 0.3}
    obvious = [
        leg.node if leg.node in ({ME, B, C} - lost) else ME
        for leg in legs
        for _ in range(leg.first, leg.stop)
    ]
    way = way_of(table(*legs), ME, layers, lost)
    assert [leg.node for leg in way for _ in range(leg.first, leg.stop)] == obvious, f"seed={seed}"
    assert way[0].first == 0
    for one, other in pairwise(way):
        assert one.stop == other.first, f"seed={seed}"
        assert one.node != other.node, f"seed={seed}"


@pytest.mark.parametrize(
    "legs",
    [
        (),
        (Leg(B, 0, 3),),
        (Leg(B, 1, 6),),
        (Leg(B, 0, 3), Leg(C, 4, 6)),
        (Leg(B, 0, 4), Leg(C, 3, 6)),
        (Leg(B, 0, 0), Leg(C, 0, 6)),
        (Leg(B, 0, 6), Leg(C, 6, 6)),
        (Leg(B, 0, 7),),
    ],
)
def test_a_table_whose_legs_do_not_join_means_that_all_layers_run_here(legs) -> None:
    assert way_of(table(*legs), ME, 6, ()) == (Leg(ME, 0, 6),)


def test_where_a_leg_cannot_be_asked_another_that_serves_the_same_span_is() -> None:
    legs = Leg(ME, 0, 2), Leg(B, 2, 4), Leg(ME, 4, 6)
    for spans, node in (
        ((Leg(B, 2, 4), Leg(C, 2, 4)), C),
        ((Leg(B, 2, 4), Leg(C, 2, 5)), ME),
        ((Leg(B, 2, 4), Leg(GONE, 2, 4)), ME),
    ):
        way = way_of(table(*legs, spans=spans), ME, 6, {B})
        assert [leg.node for leg in way for _ in range(leg.first, leg.stop)][2:4] == [node] * 2
        assert way_of(table(*legs, spans=spans), ME, 6, ()) == legs


def test_without_a_table_all_layers_run_here() -> None:
    assert way_of(None, ME, 6, ()) == (Leg(ME, 0, 6),)
