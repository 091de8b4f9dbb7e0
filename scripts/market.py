"""Quality of the market's outcome against the exact optimum and other placements; its cost.

Random heterogeneous instances: 3 to 8 devices of unlike speed and memory, 48 to 256 lots, wired and
wireless links, one asker or all, dense and routed layers, even and uneven popularity, memory from
just enough to twice as much. The optimum is exact (market_exact) on the same cost model, the
outcome that of the real auction (market_auction). `latency saving`: against the asker alone, which
reads what does not fit from its disk. `--fleet` measures 8 devices with 48 x 128 experts instead.
"""

import argparse
import json
import sys
import time
from math import comb
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any

from market_auction import Bidder, outcome, settle
from market_baselines import BASELINES
from market_exact import least_ns
from market_replicas import report as report_replicas
from market_settle import report as report_settling

from coeld.deployment.cost import PPM, Device, Link, Tier
from coeld.deployment.proposal import Facts, shares_of
from coeld.ids import Lot, ModelHash, NodeId
from coeld.view import ModelDemand

COLUMNS_MAX = 30_000
DISKS_MB_PER_S = (40, 90, 400)


def instance(seed: int) -> Facts:
    """A random swarm and model whose exact optimum can be computed."""
    rng = Random(f"market/{seed}")
    while True:
        count, lots = rng.randint(3, 8), rng.choice([4, 6, 8, 12, 16])
        layers, skewed = rng.randint(3, 64), rng.random() < 0.4
        hot = max(1, lots // 4)
        parts = (hot, lots - hot) if skewed else (lots,)
        columns = 1
        for part in parts:
            columns *= comb(part + count - 1, count - 1)
        if 48 <= layers * lots <= 256 and columns <= COLUMNS_MAX:
            break
    used = rng.choice([k for k in (1, 2, 4, 8) if k < lots] + [lots])
    lot_bytes = rng.choice([300_000, 1_000_000, 2_600_000, 5_000_000])
    popularity: tuple[tuple[int, ...], ...] = ()
    if skewed and used < lots:
        often = min(1.0, rng.choice([1.5, 2.0, 3.0]) * used / lots)
        seldom = (used - often * hot) / (lots - hot)
        row = (int(often * PPM),) * hot + (int(seldom * PPM),) * (lots - hot)
        popularity = (row,) * layers
    demand = ModelDemand(
        ModelHash("5e" * 32), "random", layers, lots, lot_bytes, 0,
        top_k=used, hidden=rng.choice([576, 1024, 2048]), popularity=popularity,
    )  # fmt: skip
    weights = [rng.uniform(0.3, 1) for _ in range(count)]
    plenty = rng.choice([1.0, 1.05, 1.2, 1.5, 2.0])
    rooms = [int(layers * lots * plenty * w / sum(weights)) + 1 for w in weights]
    alone, asker = rng.random() < 0.6, rng.randrange(count)
    devices = tuple(
        Device(
            NodeId(f"{i:016x}"),
            (Tier("ram", room * lot_bytes, rng.choice([2000, 4000, 6000, 10000, 20000])),),
            weight=int(not alone or i == asker),
        )
        for i, room in enumerate(rooms)
    )
    wireless = [rng.random() < 0.3 for _ in range(count)]
    wire, air = Link(rng.choice([200, 300, 500]), 110), Link(rng.choice([2000, 4000, 8000]), 30)
    links = tuple(
        tuple(air if wireless[a] or wireless[b] else wire for b in range(count))
        for a in range(count)
    )
    return Facts(demand, devices, links, split=True)


def price_ns(facts: Facts, placed: dict[Lot, int]) -> int:
    model = facts.model()
    return sum(map(model.swarm_layer_ns, shares_of(model, placed)))


def alone_ns(facts: Facts, rooms: list[int], disk_mb_per_s: int) -> int:
    """Every asker by itself: what it cannot hold, the least used, comes from its own disk."""
    model, demand, total = facts.model(), facts.demand, 0
    lots = sorted(demand.lots(), key=lambda lot: (-model.uses(lot), lot))
    for asker in model.askers:
        device = facts.devices[asker]
        for index, lot in enumerate(lots):
            tier = device.tiers[0] if index < rooms[asker] else Tier("disk", 0, disk_mb_per_s)
            total += device.weight * model.uses(lot) * tier.lot_ns(demand.lot_bytes) // PPM
    return total


def auction(facts: Facts, seed: int) -> tuple[dict[Lot, int], list[Bidder], int]:
    """Where the auction puts every lot (as a site), who bid, and in how many rounds."""
    bidders = [Bidder(device.node, facts, 1) for device in facts.devices]
    rounds = settle(bidders, Random(seed))
    index = {device.node: i for i, device in enumerate(facts.devices)}
    return {lot: index[node] for lot, node in outcome(bidders).items()}, bidders, rounds


def measure(seed: int, limit_s: float) -> dict[str, Any]:
    """One instance: the auction, the baselines, and the proven optimum."""
    facts = instance(seed)
    model = facts.model()
    rooms = [tier.memory_bytes // facts.demand.lot_bytes for tier in model.tiers]
    placed, bidders, rounds = auction(facts, seed)
    assert len(placed) == facts.demand.layers * facts.demand.experts, f"seed {seed}: not covered"
    started = time.perf_counter()
    bound = least_ns(model, rooms, limit_s)
    exact_s = time.perf_counter() - started
    ours = price_ns(facts, placed)
    alone = alone_ns(facts, rooms, Random(seed).choice(DISKS_MB_PER_S))
    others = {name: price_ns(facts, place(model, rooms)) for name, place in BASELINES.items()}
    return {
        "seed": seed,
        "devices": len(facts.devices),
        "lots": len(placed),
        "latency": bound / ours,
        "saving": (alone - ours) / (alone - bound) if alone > bound else 1.0,
        "others": {name: bound / price for name, price in others.items()},
        "ahead": {name: ours <= price for name, price in others.items()},
        "rounds": rounds,
        "exact_s": exact_s,
        "cpu_s": max(bidder.cpu_s for bidder in bidders),
    }


def report(rows: list[dict[str, Any]]) -> None:
    def line(name: str, values: list[float]) -> None:
        worst = min(values)
        print(f"{name:<34} mean {100 * mean(values):6.2f} %   worst {100 * worst:6.2f} %")

    print(f"{len(rows)} instances, proven lower bounds; largest 100 %")
    line("auction, share of latency saving", [row["saving"] for row in rows])
    line("auction, optimum / latency", [row["latency"] for row in rows])
    for name in BASELINES:
        line(f"{name}, optimum / latency", [row["others"][name] for row in rows])
        ahead = sum(row["ahead"][name] for row in rows)
        print(f"  the auction is as fast or faster in {ahead} of {len(rows)}")
    print(
        f"rounds at most {max(row['rounds'] for row in rows)}, CPU per device at most "
        f"{max(row['cpu_s'] for row in rows):.2f} s, exact at most "
        f"{max(row['exact_s'] for row in rows):.0f} s"
    )


def fleet(popular: bool, all_ask: bool) -> Facts:
    """Eight unlike devices and the shape of Qwen3-30B-A3B at 4 bits: 48 layers of 128 experts."""
    rng, layers, experts, used, lot_bytes = Random(1), 48, 128, 8, 2_654_208
    rows = []
    for _ in range(layers if popular else 0):
        weights = [2.718 ** (0.7 * rng.gauss(0, 1)) for _ in range(experts)]
        rows.append(tuple(min(PPM, int(used * PPM * w / sum(weights))) for w in weights))
    demand = ModelDemand(
        ModelHash("5e" * 32), "48 x 128", layers, experts, lot_bytes, 0,
        top_k=used, hidden=2048, popularity=tuple(rows),
    )  # fmt: skip
    speeds = (10000, 10000, 10000, 10000, 6600, 15000, 4400, 10000)
    sizes = (8, 8, 8, 8, 4, 12, 4, 8)
    devices = tuple(
        Device(
            NodeId(f"{i:016x}"),
            (Tier("ram", int(1.15 * layers * experts * size / 60) * lot_bytes, speed),),
            weight=int(all_ask or i == 0),
        )
        for i, (speed, size) in enumerate(zip(speeds, sizes, strict=True))
    )
    return Facts(demand, devices, ((Link(300, 110),) * 8,) * 8, split=True)


def measure_fleet() -> None:
    for popular in (False, True):
        for all_ask in (False, True):
            facts = fleet(popular, all_ask)
            placed, bidders, rounds = auction(facts, 1)
            cpu = [bidder.cpu_s for bidder in bidders]
            sent = sum(bidder.sent_bytes for bidder in bidders)
            print(
                f"popularity {'uneven' if popular else 'even':<6} "
                f"{'all ask' if all_ask else 'one asks':<8} lots {len(placed)}, "
                f"CPU per device {min(cpu):.2f} to {max(cpu):.2f} s, {rounds} rounds, "
                f"{sum(b.published for b in bidders)} records, {sent / 1e3:.0f} KB sent once each, "
                f"{7 * sent / 1e3:.0f} KB delivered"
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--instances", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the first instance")
    parser.add_argument("--limit", type=float, default=60, help="seconds per exact solution")
    parser.add_argument("--json", type=Path, help="write every instance there")
    parser.add_argument("--fleet", action="store_true", help="8 devices, 6144 experts")
    parser.add_argument("--settle", action="store_true", help="real nodes: cost until claims rest")
    parser.add_argument("--replicas", action="store_true", help="what spare memory saves")
    arguments = parser.parse_args()
    if arguments.replicas:
        report_replicas(arguments.seed, arguments.instances)
        return 0
    if arguments.fleet or arguments.settle:
        (measure_fleet if arguments.fleet else report_settling)()
        return 0
    rows = []
    for seed in range(arguments.seed, arguments.seed + arguments.instances):
        rows.append(measure(seed, arguments.limit))
        print(f"\r{len(rows)} of {arguments.instances}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    report(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
