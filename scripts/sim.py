"""Many simulated swarms: a process per core, a seed per run, every promise checked in each."""

import argparse
import gc
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from random import Random
from typing import Any

from coeld.errors import CoeldError
from coeld.sim.faults import Faults
from coeld.sim.observe import quantile
from coeld.sim.scenario import Plan, simulate

SHOWN = (
    "rounds_to_all",
    "detect_s_p99",
    "detect_reset_s_p99",
    "false_dead",
    "bytes_per_node_s",
    "moves",
    "heal_s",
    "cpu_s",
)


def faults_of(seed: int) -> Faults:
    """Random faults, the same for the same seed."""
    rng = Random(f"faults/{seed}")
    return Faults(
        loss=rng.choice([0.0, 0.05, 0.2]),
        dup=rng.choice([0.0, 0.1]),
        reorder=rng.choice([0.0, 0.05]),
        delay=rng.choice([0.003, 0.05]),
        crash=rng.choice([0.0, 3.0, 12.0]),
        partition=rng.choice([0.0, 0.1, 0.5]),
        asym=rng.choice([0.0, 0.03]),
        slow=rng.choice([0.0, 0.1]),
        skew=rng.choice([0.0, 0.01]),
    )


def one(seed: int, nodes: int, engines: int | None, minutes: float, text: str | None) -> Any:
    faults = faults_of(seed) if text is None else Faults.parse(text)
    gc.disable()
    began_s = time.process_time()
    try:
        plan = Plan(nodes, seed, faults, minutes, engines, acquainted=nodes > 30)
        return simulate(plan).figures | {"cpu_s": round(time.process_time() - began_s, 1)}
    finally:
        gc.enable()
        gc.collect()


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--nodes", type=int, default=100)
    parser.add_argument("--engines", type=int, default=None)
    parser.add_argument("--minutes", type=float, default=0.5)
    parser.add_argument("--faults", default=None, help="as in coeld sim; default: random per seed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    began, broken, found = time.monotonic(), 0, []
    rest = arguments.nodes, arguments.engines, arguments.minutes, arguments.faults
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for future in [pool.submit(one, seed, *rest) for seed in seeds]:
            figures = future.result()
            found.append(figures)
            if figures["violations"]:
                broken += 1
                print(json.dumps(figures), flush=True)
    print(f"{len(found)} seeds, {broken} broken, {time.monotonic() - began:.0f} s")
    for name in SHOWN:
        values = [figures[name] for figures in found if figures.get(name) is not None]
        p50, p99, most = (quantile(values, share) for share in (0.5, 0.99, 1.0))
        print(f"  {name:20} p50 {p50}  p99 {p99}  max {most}")
    return 1 if broken else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CoeldError as exc:
        sys.exit(f"scripts/sim: {exc}")
