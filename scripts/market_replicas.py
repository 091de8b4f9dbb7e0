"""What replicas save: whole layers, the auction's two ways to choose them, and none at all.

Random swarms of 3 to 8 unlike devices with memory for 1.1 to 2 times the model, wired and wireless
links, one asker, all alike, or all unlike. Each asker has every layer run wherever it is quickest
for it, or takes the shortest way through spans; what a token costs is summed over askers by weight.
The owners of layers are the same in all three.
"""

from random import Random
from statistics import mean
from typing import Any

from market_auction import Bidder, settle

from coeld.deployment.chains import Run, Way, runs, span_ns
from coeld.deployment.cost import Device, Link, Tier
from coeld.deployment.proposal import Facts
from coeld.deployment.replicas import layers_served, least_layer_ns
from coeld.ids import Lot, ModelHash, NodeId
from coeld.view import ModelDemand


def instance(seed: int, spans: bool) -> Facts:
    """A swarm in which whole layers fit, with room for replicas."""
    rng = Random(f"replicas/{seed}")
    count, layers = rng.randint(3, 8), rng.randint(12, 48)
    demand = ModelDemand(
        ModelHash("5e" * 32), "random", layers, 4, rng.choice([300_000, 1_000_000, 2_600_000]),
        layers * rng.choice([1_000_000, 4_000_000]), hidden=rng.choice([576, 1024, 2048]),
    )  # fmt: skip
    sizes = [rng.uniform(0.3, 1) for _ in range(count)]
    plenty = rng.choice([1.1, 1.3, 1.6, 2.0])
    who = rng.choice(["one", "alike", "unlike"])
    asker = rng.randrange(count)
    weights = [
        int(who == "alike" or i == asker) if who != "unlike" else 1 + rng.choice([0, 0, 1, 8, 64])
        for i in range(count)
    ]
    devices = tuple(
        Device(
            NodeId(f"{rng.getrandbits(64):016x}"),
            (
                Tier(
                    "ram",
                    (int(layers * plenty * size / sum(sizes)) + 1) * 4 * demand.lot_bytes,
                    rng.choice([2000, 4000, 4000, 10000, 20000]),
                ),
            ),
            weight=weight,
        )
        for size, weight in zip(sizes, weights, strict=True)
    )
    devices = tuple(sorted(devices, key=lambda device: device.node))
    wireless = [rng.random() < 0.3 for _ in range(count)]
    wire, air = Link(rng.choice([200, 300, 500]), 110), Link(rng.choice([2000, 4000, 8000]), 30)
    links = tuple(
        tuple(air if wireless[a] or wireless[b] else wire for b in range(count))
        for a in range(count)
    )
    return Facts(demand, devices, links, spans=spans)


def holders(facts: Facts, bidders: list[Bidder], copies: int) -> list[list[int]]:
    """By layer: the device that owns it, then those with a copy below `copies`, all whole."""
    index = {device.node: i for i, device in enumerate(facts.devices)}
    best: dict[tuple[Lot, int], tuple[int, NodeId]] = {}
    for bidder in bidders:
        for lot, copy, bid in bidder.record.claims:
            best[lot, copy] = max(best.get((lot, copy), (-1, bidder.node)), (bid, bidder.node))
    found = []
    for layer in range(facts.demand.layers):
        there = [
            {best[lot, copy][1] for copy in range(copies) if (lot, copy) in best}
            for lot in facts.demand.lots_of(layer)
        ]
        owner = best[Lot(layer, 0), 0][1]
        others = set.intersection(*there) - {owner}
        found.append([index[owner], *sorted(index[node] for node in others)])
    return found


def price_ns(facts: Facts, there: list[list[int]]) -> int:
    """Every asker calls the quickest for each layer, or takes the shortest way through spans."""
    model = facts.model()
    owned = [sites[0] for sites in there]
    if facts.spans:
        costs = [way_ns(facts, asker, there, owned) for asker in model.askers]
    else:
        served = zip(there, layers_served(model, owned), strict=True)
        layers = [least_layer_ns(model, sites, layer) for sites, layer in served]
        costs = list(map(sum, zip(*layers, strict=True)))
    weights = [model.devices[asker].weight for asker in model.askers]
    return sum(weight * cost for weight, cost in zip(weights, costs, strict=True))


def way_ns(facts: Facts, asker: int, there: list[list[int]], owned: list[int]) -> int:
    """All that is held is served as spans, none across a border of owners."""
    model = facts.model()
    spans = []
    for site in range(len(facts.devices)):
        mine = ((i, (owned[i], site)) for i, sites in enumerate(there) if site in sites)
        spans += [Run(site, run.first, run.stop) for run in runs(mine)]
    here = {i for i, sites in enumerate(there) if asker in sites}
    legs = Way(model, asker, here, spans).cheapest()
    return sum(span_ns(model, asker, leg.site, leg.layers) for leg in legs)


def measure(seed: int, spans: bool) -> dict[Any, Any] | None:
    """None: layers are placed in parts, where replicas go by hash as before."""
    facts = instance(seed, spans)
    found: dict[Any, Any] = {}
    for valued in (True, False):
        bidders = [Bidder(device.node, facts, 2, valued=valued) for device in facts.devices]
        settle(bidders, Random(seed))
        if not bidders[0].whole:
            return None
        found["records", valued] = sum(bidder.published for bidder in bidders)
        found["none"] = price_ns(facts, holders(facts, bidders, 1))
        found[valued] = price_ns(facts, holders(facts, bidders, 2))
    return found


def report(seed: int, instances: int) -> None:
    for spans in (False, True):
        found = [measure(s, spans) for s in range(seed, seed + instances)]
        rows = [row for row in found if row is not None]
        print(f"{len(rows)} swarms, {'spans' if spans else 'cuts'}; latency without replicas: 1")
        for valued in (True, False):
            shares = [row[valued] / row["none"] for row in rows]
            name = "by value" if valued else "by hash"
            records = mean(row["records", valued] for row in rows)
            print(
                f"  {name:<9} mean {mean(shares):.3f}, worst {max(shares):.3f}, best"
                f" {min(shares):.3f}; {records:.1f} records"
            )
        ahead = sum(row[True] < row[False] for row in rows)
        behind = sum(row[True] > row[False] for row in rows)
        worst = max(row[True] / row[False] for row in rows)
        print(f"  by value is faster in {ahead}, slower in {behind}, at worst {worst:.4f} times")
