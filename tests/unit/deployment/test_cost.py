"""The cost model against layers that are simulated draw by draw, and its sanity."""

from functools import partial
from random import Random
from statistics import mean, quantiles

import pytest

from coeld.deployment import chains
from coeld.deployment.cost import LAN, PPM, CostModel, Device, Link, Share, Tier
from coeld.ids import Lot, ModelHash, NodeId
from coeld.view import ModelDemand

MODEL = ModelHash("5e" * 32)


def demand(
    lots: int = 8, used: int = 2, layers: int = 4, lot_bytes: int = 1_000_000
) -> ModelDemand:
    return ModelDemand(MODEL, "m", layers, lots, lot_bytes, 40_000_000, top_k=used, hidden=2048)


def devices(*speeds: int) -> list[Device]:
    return [
        Device(NodeId(f"{i:016x}"), (Tier("ram", 10**10, speed),)) for i, speed in enumerate(speeds)
    ]


def lan(_: NodeId, __: NodeId) -> Link:
    return LAN


def shares(model: CostModel, owners: list[int]) -> dict[int, Share]:
    found: dict[int, Share] = {}
    for expert, site in enumerate(owners):
        one, held = model.share(Lot(0, expert)), found.get(site, Share(0, 0))
        found[site] = Share(held.uses + one.uses, held.bytes_used + one.bytes_used)
    return found


def drawn_ns(model: CostModel, owners: list[int], rng: Random, draws: int) -> float:
    """The layer simulated: draw the lots of a token, take the slowest branch, average."""
    wanted = model.demand
    total = 0
    for _ in range(draws):
        calls = [0] * len(model.sites)
        for expert in rng.sample(range(wanted.experts), wanted.used):
            calls[owners[expert]] += 1
        total += max(
            model.reach_ns(0, site) + count * model.tiers[site].lot_ns(wanted.lot_bytes)
            for site, count in enumerate(calls)
            if count
        )
    return total / draws


def test_the_expected_layer_is_what_draws_give() -> None:
    rng = Random(5)
    errors = []
    for _ in range(120):
        lots = rng.choice([8, 16, 32, 64])
        used = rng.choice([k for k in (1, 2, 4, 8) if k <= lots // 2] + [lots] * (lots == 8))
        count = rng.randint(2, 8)
        model = CostModel(
            demand(lots, used), devices(*rng.choices([2000, 4000, 6000, 10000], k=count)), lan
        )
        owners = rng.choices(
            range(count), weights=[rng.random() + 0.1 for _ in range(count)], k=lots
        )
        if len(set(owners)) > 1:
            told = model.layer_ns(0, shares(model, owners))
            errors.append(abs(told / drawn_ns(model, owners, rng, 600) - 1))
    assert mean(errors) < 0.035
    assert quantiles(errors, n=20)[-1] < 0.1


@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_the_busiest_of_equal_devices_has_more_than_its_share(count: int) -> None:
    one = Link(0, 10**6)
    model = CostModel(demand(128, 8), devices(*[4000] * count), lambda a, b: one)
    owners = [expert % count for expert in range(128)]
    told = model.layer_ns(0, shares(model, owners))
    assert told > 1.15 * 8 / count * model.tiers[0].lot_ns(10**6)
    assert told == pytest.approx(drawn_ns(model, owners, Random(count), 2000), rel=0.08)


def test_a_layer_at_home_costs_its_weights_and_no_call() -> None:
    model = CostModel(demand(), devices(4000, 4000), lan)
    assert model.layer_ns(0, shares(model, [0] * 8)) == 2 * 1_000_000 * 1000 // 4000


def test_a_layer_elsewhere_costs_its_weights_and_one_call_however_many_lots_it_has() -> None:
    model = CostModel(demand(), devices(4000, 4000), lan)
    assert model.layer_ns(0, shares(model, [1] * 8)) == 500_000 + model.reach_ns(0, 1)
    assert model.reach_ns(0, 1) >= 300_000


def test_of_a_dense_layer_the_slowest_branch_counts_and_nothing_is_random() -> None:
    model = CostModel(demand(8, 8), devices(4000, 1000), lan)
    here, there = 6 * 250_000 + model.reach_ns(0, 0), 2 * 1_000_000 + model.reach_ns(0, 1)
    assert model.layer_ns(0, shares(model, [0] * 6 + [1] * 2)) == max(here, there)


def test_splitting_over_equals_pays_when_computing_outweighs_the_call() -> None:
    slow, fast = (CostModel(demand(8, 8), devices(s, s), lan) for s in (1000, 100_000))
    for model, pays in ((slow, True), (fast, False)):
        split = model.layer_ns(0, shares(model, [0, 1] * 4))
        assert (split < model.layer_ns(0, shares(model, [0] * 8))) == pays


def test_whoever_holds_what_is_used_most_saves_the_asker_most() -> None:
    row = tuple([900_000, 900_000] + [33_333] * 6)
    model = CostModel(
        ModelDemand(MODEL, "m", 1, 8, 1_000_000, 0, top_k=2, hidden=64, popularity=(row,)),
        devices(4000, 4000),
        lan,
    )
    hot_here = model.layer_ns(0, shares(model, [0, 0, 1, 1, 1, 1, 1, 1]))
    hot_there = model.layer_ns(0, shares(model, [1, 1, 0, 0, 1, 1, 1, 1]))
    assert hot_here < hot_there


def test_a_long_context_is_read_with_every_token() -> None:
    model = CostModel(
        ModelDemand(MODEL, "m", 4, 8, 1000, 0, kv_bytes_per_token=100_000), devices(4000), lan
    )
    layers = [shares(model, [0] * 8)] * 4
    short, long = (chains.token_us(model, 0, layers, tokens) for tokens in (0, 1000))
    assert long - short == 100_000 * 1000 // 4000


def test_prefill_reads_a_lot_once_per_chunk_and_then_computes() -> None:
    model = CostModel(demand(8, 8, 1, 4_000_000), devices(4000), lan)
    layers = [shares(model, [0] * 8)]
    one, many, more = (chains.prefill_us(model, 0, layers, rows) for rows in (1, 256, 512))
    assert one >= 8 * 1000
    assert many < 256 * one / 4
    assert more > 1.9 * many, "one device has no other to share a prompt with"


@pytest.mark.parametrize("seed", range(20))
def test_a_faster_device_or_link_never_makes_a_token_slower(seed: int) -> None:
    rng = Random(seed)
    speeds = rng.choices([2000, 4000, 8000], k=4)
    owners = [[rng.randrange(4) for _ in range(8)] for _ in range(4)]
    rtt = rng.choice([300, 4000])
    for spans in (False, True):
        base = CostModel(demand(), devices(*speeds), lambda a, b: Link(rtt, 30), spans=spans)
        fast = devices(*[2 * s for s in speeds])
        better = CostModel(demand(), fast, lambda a, b: Link(rtt // 2, 60), spans=spans)
        layers = [shares(base, row) for row in owners]
        for time_us in (chains.token_us, partial(chains.prefill_us, rows=300)):
            assert time_us(better, 0, layers) <= time_us(base, 0, layers)


def test_shares_add_up_to_what_a_token_uses() -> None:
    model = CostModel(demand(64, 8), devices(4000, 4000), lan)
    assert sum(share.uses for share in shares(model, [0, 1] * 32).values()) == 8 * PPM
