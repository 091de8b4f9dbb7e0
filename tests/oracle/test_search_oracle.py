"""Sites that are alike, against looking at every one of them: the same prices and placements."""

from random import Random

import pytest

from coeld.deployment.cost import LAN, CostModel, Device, Link, Share, Tier
from coeld.deployment.search import Search, kinds
from coeld.ids import ModelHash, NodeId
from coeld.view import ModelDemand


def model_of(layers: int, lots: int, used: int) -> ModelDemand:
    return ModelDemand(ModelHash("ab" * 32), "m", layers, lots, 1_000_000, 0, used, hidden=2048)


def some_model(rng: Random) -> CostModel:
    """Two to six devices, most of them alike; some have a second memory, or a link of their own."""
    layers, lots = rng.choice([2, 4]), rng.choice([4, 8])
    demand = model_of(layers, lots, rng.randint(1, lots))
    devices = []
    for index in range(rng.randint(2, 6)):
        tiers = [Tier("ram", 0, rng.choice([4000, 4000, 12_000]))]
        if rng.random() < 0.1:
            tiers.append(Tier("disk", 0, 500))
        weight = rng.choice([1, 1, 1, 0, 5])
        devices.append(Device(NodeId(f"{index:016x}"), tuple(tiers), weight=weight))
    odd = {
        (a.node, b.node): rng.choice([LAN, LAN, Link(9000, 5)]) for a in devices for b in devices
    }
    some = rng.random() < 0.5
    return CostModel(demand, devices, lambda a, b: odd[a, b] if some else LAN)


@pytest.mark.parametrize("seed", range(100))
def test_sites_of_one_kind_change_places_at_no_change_of_price(seed: int) -> None:
    rng = Random(seed)
    model = some_model(rng)
    sites = range(len(model.sites))
    for site, kind in enumerate(kinds(model)):
        for _ in range(5):
            held = rng.sample(sites, rng.randint(1, len(sites)))
            shares = {s: Share(10**5 * rng.randint(1, 9), 10**12 * rng.randint(1, 9)) for s in held}
            swapped = {{site: kind, kind: site}.get(s, s): share for s, share in shares.items()}
            assert model.swarm_layer_ns(swapped) == model.swarm_layer_ns(shares), f"seed={seed}"


@pytest.mark.parametrize("seed", range(100))
def test_a_search_that_passes_over_what_is_alike_finds_the_same(seed: int) -> None:
    rng = Random(seed)
    model = some_model(rng)
    lots = model.demand.layers * model.demand.experts
    rooms = [rng.choice([lots // 2, lots, lots]) for _ in model.sites]
    quick, slow = Search(model, rooms), Search(model, rooms)
    slow._kinds = list(range(len(rooms)))
    for search in (quick, slow):
        for _ in search.run():
            pass
    assert (quick.found, quick.found_ns) == (slow.found, slow.found_ns), f"seed={seed}"


def test_equal_devices_are_of_one_kind_and_a_faster_one_of_another() -> None:
    demand = model_of(2, 4, 2)
    speeds = [4000, 12_000, 4000, 4000]
    devices = [
        Device(NodeId(f"{i:016x}"), (Tier("ram", i, speed),)) for i, speed in enumerate(speeds)
    ]
    assert kinds(CostModel(demand, devices, lambda a, b: LAN)) == [0, 1, 0, 0]
