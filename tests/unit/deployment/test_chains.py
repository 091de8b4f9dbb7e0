"""Runs as spans or cuts, the cheapest way against trying all, blocks of consecutive layers."""

from random import Random

import pytest

from coeld.deployment.blocks import blocks, completed
from coeld.deployment.chains import (
    SPAN_GAIN_PERCENT,
    Run,
    Way,
    cache_bytes,
    cut_ns,
    layers_with_caches,
    legs,
    prefill_us,
    runs,
    span_ns,
    spans_that_fit,
    spans_worth,
    token_us,
)
from coeld.deployment.cost import CHUNK_ROWS, CostModel, Device, Link, Share, Tier
from coeld.ids import Lot, ModelHash, NodeId
from coeld.view import ModelDemand

LAN, WIFI = Link(300, 110), Link(4000, 30)


def priced(speeds: list[int], links: list[Link], layers: int = 12, lot: int = 500_000) -> CostModel:
    """`links[i]`: how device i is reached, by anybody."""
    demand = ModelDemand(
        ModelHash("5e" * 32),
        "m",
        layers,
        8,
        lot,
        layers * 10**6,
        hidden=1024,
        kv_bytes_per_token=layers * 1000,
    )
    devices = [
        Device(NodeId(f"{i:016x}"), (Tier("ram", 10**9, speed),)) for i, speed in enumerate(speeds)
    ]
    return CostModel(demand, devices, lambda a, b: links[int(b, 16)])


def test_runs_are_maximal() -> None:
    assert runs([(0, 1), (1, 1), (2, 0), (4, 0), (5, 0)]) == [
        Run(1, 0, 2),
        Run(0, 2, 3),
        Run(0, 4, 6),
    ]


def test_a_run_of_layers_elsewhere_costs_one_round_trip_as_a_span_and_one_each_as_cuts() -> None:
    model = priced([4000, 4000], [WIFI, WIFI])
    cut, span = cut_ns(model, 0, 1, 6), span_ns(model, 0, 1, 6)
    assert cut - span == 5 * model.reach_ns(0, 1)
    assert cut_ns(model, 0, 1, 1) == span_ns(model, 0, 1, 1)


def test_a_device_with_slow_attention_serves_cuts_on_a_fast_link_and_spans_on_a_slow_one() -> None:
    """Its experts are no slower by that; but in a span it runs the attention of all who ask."""
    for link, spans in ((Link(20, 1000), False), (WIFI, True)):
        model = priced([40_000, 500, 40_000], [link] * 3, lot=1000)
        assert spans_worth(model, 1, range(4, 8), ()) == (set(range(4, 8)) if spans else set())


def test_what_is_a_span_stays_one_until_cuts_gain_clearly() -> None:
    found = {}
    for rtt in range(0, 900, 10):
        model = priced([40_000, 3000, 40_000], [Link(rtt, 1000)] * 3, lot=1000)
        found[rtt] = [bool(spans_worth(model, 1, range(8), now)) for now in ((), range(8))]
    undecided = [rtt for rtt, (before, after) in found.items() if before != after]
    assert undecided, "between the two there is a band in which nothing changes"
    assert all(not found[rtt][0] and found[rtt][1] for rtt in undecided)


def whole(model: CostModel, sites: list[int]) -> list[dict[int, Share]]:
    """Layer by layer, who holds all of it."""
    lots = [model.share(Lot(0, expert)) for expert in range(model.demand.experts)]
    total = Share(sum(share.uses for share in lots), sum(share.bytes_used for share in lots))
    return [{site: total} for site in sites]


@pytest.mark.parametrize("seed", range(20))
def test_a_token_takes_each_run_of_layers_in_the_cheaper_form(seed: int) -> None:
    rng = Random(seed)
    speeds = [rng.choice([500, 4000, 40_000]) for _ in range(3)]
    links = [rng.choice([Link(20, 1000), LAN, WIFI]) for _ in range(3)]
    model = priced(speeds, links, lot=rng.choice([1000, 500_000]))
    sites = sorted(rng.choices(range(3), k=12), key=lambda site: (site + seed) % 3)
    asker = rng.randrange(3)
    ns = model.head_ns(asker)
    for run in runs(enumerate(sites)):
        span, cut = (one(model, asker, run.site, run.layers, 500) for one in (span_ns, cut_ns))
        ns += span if run.site == asker else min(span, cut)
    layers = whole(model, sites)
    assert token_us(model, asker, layers, 500) == pytest.approx(ns / 1000, abs=2)
    way = legs(model, asker, layers, 500)
    assert [leg.first for leg in way[1:]] == [leg.stop for leg in way[:-1]]
    assert (way[0].first, way[-1].stop) == (0, 12)


def flow_shop(stages: list[int], chunks: int) -> int:
    """When the last chunk leaves the last stage, each stage taking one after the other."""
    free = [0] * len(stages)
    for _ in range(chunks):
        done = 0
        for number, takes in enumerate(stages):
            done = free[number] = max(done, free[number]) + takes
    return free[-1]


@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_a_long_prompt_is_at_several_devices_at_once(chunks: int) -> None:
    model = priced([4000, 2000, 4000], [LAN] * 3)
    sites = [0] * 5 + [1] * 4 + [2] * 3
    layers = whole(model, sites)
    stages = []
    for run in runs(enumerate(sites)):
        one = run.layers * model.chunk_ns(run.site, layers[run.first], CHUNK_ROWS)
        away = model.reached(0, run.site) + model.carried_ns(0, run.site, CHUNK_ROWS - 1)
        stages.append(one + (away if run.site else 0))
    took_us = prefill_us(model, 0, layers, chunks * CHUNK_ROWS)
    assert took_us == (flow_shop(stages, chunks) + model.head_ns(0)) // 1000
    alone = prefill_us(model, 0, whole(model, [0] * 12), chunks * CHUNK_ROWS)
    assert (took_us < alone) == (chunks > 2), "several devices are worth their hops"


def all_ways(asker: int, layers: int, here: set[int], spans: list[Run]) -> list[list[Run]]:
    """Every way from the first layer to the last, step by step."""
    done: list[list[Run]] = []
    under_way: list[list[Run]] = [[]]
    while under_way:
        path = under_way.pop()
        at = path[-1].stop if path else 0
        if at == layers:
            done.append(path)
            continue
        steps = [span for span in spans if span.first == at]
        if at in here:
            steps.append(Run(asker, at, at + 1))
        under_way += [[*path, step] for step in steps]
    return done


@pytest.mark.parametrize("seed", range(40))
def test_the_way_is_as_cheap_as_the_cheapest_of_all(seed: int) -> None:
    rng = Random(seed)
    links = rng.choices([LAN, WIFI, Link(20_000, 2)], k=3)
    model = priced(rng.choices([1000, 4000, 16_000], k=3), links, layers=6)
    here = {layer for layer in range(6) if rng.random() < 0.5}
    spans = [Run(rng.choice([1, 2]), a, b) for a in range(6) for b in range(a + 1, 7)]
    spans = [span for span in spans if rng.random() < 0.6]

    def price(path: list[Run]) -> int:
        layers = [(layer, step.site) for step in path for layer in range(step.first, step.stop)]
        return sum(
            leg.layers * (model.attention_ns(leg.site) + model.whole_ns(leg.site))
            + (model.reach_ns(0, leg.site) if leg.site else 0)
            for leg in runs(layers)
        )

    ways = Way(model, 0, here, spans)
    possible = all_ways(0, 6, here, spans)
    if not possible:
        return
    found = ways.cheapest()
    assert price(found) == min(map(price, possible)), f"seed={seed}"
    before = rng.choice(possible)
    legs = runs((layer, step.site) for step in before for layer in range(step.first, step.stop))
    kept = ways.cheapest(legs)
    if kept == legs:
        assert price(kept) * (100 - SPAN_GAIN_PERCENT) <= price(found) * 100
    else:
        assert kept == found


def test_a_way_that_is_no_longer_served_is_not_kept() -> None:
    model = priced([1000, 4000, 4000], [LAN] * 3, layers=4)
    ways = Way(model, 0, (), [Run(1, 0, 2), Run(1, 2, 4), Run(2, 0, 4)])
    one, two = [Run(1, 0, 4)], [Run(2, 0, 4)]
    assert ways.cheapest() == one
    assert ways.cheapest(two) == two
    assert ways.cheapest([Run(2, 0, 2), Run(1, 2, 4)]) == one, "no span of that device ends there"
    assert ways.cheapest([Run(-1, 0, 4)]) == one


def test_a_way_avoids_whom_it_should_unless_there_is_nobody_else() -> None:
    model = priced([1000, 9000, 4000], [LAN] * 3, layers=2)
    spans = [Run(1, 0, 1), Run(2, 0, 1), Run(1, 1, 2)]
    assert Way(model, 0, (), spans).cheapest() == [Run(1, 0, 2)]
    assert Way(model, 0, (), spans, avoid={1}).cheapest() == [Run(2, 0, 1), Run(1, 1, 2)]


def test_layers_that_nobody_serves_as_a_span_are_run_here() -> None:
    model = priced([1000, 9000], [LAN] * 2, layers=4)
    assert Way(model, 0, (), [Run(1, 1, 3)]).cheapest() == [
        Run(0, 0, 1),
        Run(1, 1, 3),
        Run(0, 3, 4),
    ]


def test_caches_beyond_that_of_one_decoder_need_room() -> None:
    demand = priced([1, 1], [LAN, LAN]).demand
    one = demand.kv_bytes_per_token * 2048
    assert cache_bytes(demand, 4, 3) == 0, "a third of the layers for three who ask"
    assert cache_bytes(demand, 12, 3) == 2 * one
    layer_bytes = demand.experts * demand.lot_bytes
    assert layers_with_caches(demand, 12 * layer_bytes + 2 * one, 3) == 12
    assert layers_with_caches(demand, 12 * layer_bytes + 2 * one - 1, 3) == 11
    assert layers_with_caches(demand, 4 * layer_bytes, 3) == 4
    assert layers_with_caches(demand, layer_bytes - 1, 3) == 0
    assert spans_that_fit(demand, range(12), (), 3, 2 * one) == set(range(12))
    assert spans_that_fit(demand, range(12), (), 3, one) == set(range(8))
    assert spans_that_fit(demand, range(12), range(4, 12), 3, one) == set(range(4, 12))
    assert spans_that_fit(demand, range(12), (), 3, -1) == set()


@pytest.mark.parametrize("seed", range(40))
def test_blocks_are_consecutive_and_fit(seed: int) -> None:
    rng = Random(seed)
    count = rng.randint(1, 6)
    layers = rng.randint(count, 30)
    rooms = [rng.randint(0, layers) for _ in range(count - 1)]
    rooms.append(max(layers - sum(rooms), rng.randint(0, layers)))
    model = priced(rng.choices([1000, 4000], k=count), rng.choices([LAN, WIFI], k=count), layers)
    order = rng.sample(range(count), count)
    placed = blocks(model, rooms, order)
    assert len(placed) == layers
    found = runs(enumerate(placed))
    assert len({run.site for run in found}) == len(found), f"seed={seed}: one block each"
    assert all(run.layers <= rooms[run.site] for run in found)
    assert [order[run.site] for run in found] == sorted(order[run.site] for run in found)


def test_equal_devices_share_equally_unless_a_hop_is_dear() -> None:
    rooms, order = [12, 12, 12], [0, 1, 2]
    near = blocks(priced([4000] * 3, [Link(100, 110)] * 3, lot=10**6), rooms, order)
    far = blocks(priced([4000] * 3, [Link(20_000, 2)] * 3, lot=10**6), rooms, order)
    assert [run.layers for run in runs(enumerate(near))] == [4, 4, 4]
    assert [run.layers for run in runs(enumerate(far))] == [12]


def test_the_faster_device_takes_what_it_can() -> None:
    placed = blocks(priced([4000, 8000], [LAN, LAN]), [12, 9], [0, 1])
    assert [placed.count(site) for site in (0, 1)] == [3, 9]


def test_holes_go_to_a_neighbour_among_equals_and_to_a_faster_one_at_once() -> None:
    served = [0, 0, 0, None, None, 1, 1, 1, 1, 1, 1, 1]
    model = priced([4000, 4000, 4000], [LAN] * 3)
    assert completed(model, served, [1, 1, 9], [2] * 12) == [0, 0, 0, 0, 1] + [1] * 7
    fast = priced([4000, 4000, 90_000], [LAN] * 3, lot=10**7)
    assert completed(fast, served, [1, 1, 9], [0] * 12) == [0, 0, 0, 2, 2] + [1] * 7
    assert completed(model, served, [1, 0, 0], [2] * 12) is None
