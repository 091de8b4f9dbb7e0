"""What a token should take, against sums done by hand."""

from dataclasses import replace

import pytest

from coeld.deployment.cost import CALL_US, CUT_US, LAN
from coeld.deployment.expectation import expected_us, learned
from coeld.errors import FrameError
from coeld.ids import ModelHash, NodeId
from coeld.messages import Record
from coeld.routes import Leg, RouteTable
from coeld.view import ModelDemand

DENSE = ModelDemand(
    ModelHash("5e" * 32), "m", 4, 2, 1_000_000, 5_000_000, hidden=250, head_bytes=1_000_000
)
"""Attention: 1 MB a layer; at 1000 MB/s a millisecond, as for a lot and the head."""
ROUTED = replace(DENSE, experts=8, top_k=2)
A, B, C = NodeId("a" * 16), NodeId("b" * 16), NodeId("c" * 16)
PAYLOAD_US = 2 * 250 * 4 // LAN.mb_per_s
REACH_US = LAN.rtt_us + PAYLOAD_US + CALL_US


def record(node: NodeId, speed: int = 1000) -> Record:
    return Record(node, 1, 1, data_host="h", data_port=9, kernel_mb_per_s=speed)


def table(
    demand: ModelDemand, owner, nodes=(A, B), legs: tuple[Leg, ...] = (), spans=()
) -> RouteTable:
    """`owner` says who serves a lot."""
    owners = {lot: owner(lot) for lot in demand.lots()}
    addresses = dict.fromkeys(nodes, ("h", 9))
    return RouteTable(demand.model, 1, owners, addresses, legs=legs, spans=spans)


def expected(demand: ModelDemand, routes: RouteTable, costs=(), records=None) -> int | None:
    known = [record(node) for node in routes.addresses] if records is None else records
    return expected_us(demand, routes, A, known, learned(costs))


def test_alone_every_layer_is_fused_and_as_fast_as_told_or_as_learned() -> None:
    alone = table(DENSE, lambda lot: (A,), nodes=(A,))
    assert expected(DENSE, alone) == 4 * 3000 + 1000
    rows = [["layer", "", 2500.0], ["head", "", 700.5], ["token", "", 200.0]]
    assert expected(DENSE, alone, rows) == 4 * 2500 + 700 + 200


def test_layers_that_others_may_call_are_cut_though_all_of_them_is_here() -> None:
    routes = table(DENSE, lambda lot: (A,))
    assert expected(DENSE, routes) == 4 * (1000 + CUT_US + CALL_US + 2000) + 1000
    rows = [
        ["attention", "", 800], ["cut", "", 90], ["call", "", 60], ["lot", "", 500],
        ["layer", "", 1],
    ]  # fmt: skip
    assert expected(DENSE, routes, rows) == 4 * (800 + 90 + 60 + 1000) + 1000
    spanned = replace(routes, spans=(Leg(A, 0, 2),))
    cut_us = 2 * (1000 + CUT_US + CALL_US + 2000) + 1000
    assert expected(DENSE, spanned) == 2 * 3000 + cut_us


def test_a_layer_elsewhere_costs_what_reaching_it_does() -> None:
    routes = table(DENSE, lambda lot: (B,) if lot.layer == 3 else (A,))
    here_us = 3 * (1000 + CUT_US + CALL_US + 2000) + 1000
    assert expected(DENSE, routes) == here_us + 1000 + CUT_US + REACH_US + 2000
    rows = [["reach", B, 2500], ["call", B, 100], ["lot", B, 4000]]
    assert expected(DENSE, routes, rows) == here_us + 1000 + CUT_US + 2500 + 100 + 8000
    other = [["reach", C, 2500], ["lot", C, 1]]
    assert expected(DENSE, routes, other) == expected(DENSE, routes), "of nobody who is asked"


def test_a_layer_in_parts_costs_its_slowest_part() -> None:
    routes = table(DENSE, lambda lot: (A,) if lot.expert == 0 else (B,))
    assert expected(DENSE, routes) == 4 * (1000 + CUT_US + REACH_US + 1000) + 1000
    rows = [["lot", "", 5000], ["reach", B, 500]]
    assert expected(DENSE, routes, rows) == 4 * (1000 + CUT_US + CALL_US + 5000) + 1000


def test_who_serves_all_of_a_layer_is_asked_for_all_of_it() -> None:
    def owner(lot):
        return (A, B) if lot.expert == 0 else (B,)

    assert expected(DENSE, table(DENSE, owner)) == expected(DENSE, table(DENSE, lambda lot: (B,)))
    ours = table(DENSE, lambda lot: (B, A))
    assert expected(DENSE, ours) == expected(DENSE, table(DENSE, lambda lot: (A,)))


def test_a_leg_elsewhere_is_one_call() -> None:
    legs = Leg(A, 0, 1), Leg(B, 1, 4)
    routes = table(DENSE, lambda lot: (B,) if lot.layer else (A,), legs=legs, spans=legs)
    assert expected(DENSE, routes) == 3000 + 3 * 3000 + CUT_US + REACH_US + 1000
    rows = [["reach", B, 450], ["layer", B, 1900], ["layer", "", 2900], ["token", "", 20]]
    assert expected(DENSE, routes, rows) == 2900 + 3 * 1900 + 450 + 1000 + 20


def test_routed_layers_cost_what_random_choices_are_expected_to() -> None:
    halves = table(ROUTED, lambda lot: (A,) if lot.expert < 4 else (B,))
    found = expected(ROUTED, halves, [["reach", B, 1], ["lot", B, 100], ["lot", "", 100]])
    base_us = 4 * (1000 + CUT_US) + 1000
    assert found is not None
    busy_us = (found - base_us) / 4 - CALL_US
    # 2 of 8 lots over two equal halves: both in one with probability 3/7.
    assert busy_us == pytest.approx(100 * (2 * 3 / 7 + 1 * 4 / 7), rel=0.1)


def test_without_an_owner_nothing_is_expected() -> None:
    holes = table(DENSE, lambda lot: (A,))
    some = {lot: nodes for lot, nodes in holes.owners.items() if lot.layer}
    assert expected(DENSE, replace(holes, owners=some)) is None
    unreachable = replace(holes, legs=(Leg(A, 0, 1), Leg(B, 1, 4)))
    silent = replace(record(B), data_host="", data_port=0)
    assert expected(DENSE, unreachable, records=[record(A), silent]) is None
    gone = table(DENSE, lambda lot: (B,))
    assert expected(DENSE, gone, records=[record(A)]) is None
    assert expected(DENSE, gone, records=[record(B)]) is None


def test_costs_that_are_none_are_refused() -> None:
    for rows in ([["lot", "", "x"]], [["lot", ""]], [7], [["lot", "", float("nan")]]):
        with pytest.raises(FrameError):
            learned(rows)
