"""The best placement there is, by integer programming: what the market is measured against.

Layers of one kind are interchangeable, and so are lots of one kind in a layer. So a column is what
one layer may look like (how many lots of each kind at each site), its price is the cost model's
own, and the program chooses how many layers look like which column, within the rooms (a
Dantzig-Wolfe master with all columns enumerated: any layer price is exact in it, the maximum over
branches included, and its bound is tight). Solved by HiGHS through scipy.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
from scipy.optimize import LinearConstraint, milp

from coeld.deployment.cost import CostModel, Share
from coeld.ids import Lot


def compositions(count: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to write `count` as an ordered sum of `parts` numbers from 0."""
    if parts == 1:
        yield (count,)
        return
    for first in range(count + 1):
        for rest in compositions(count - first, parts - 1):
            yield (first, *rest)


def columns_of(
    model: CostModel, layer: int, rooms: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], int]]:
    """(lots at each site, price) of everything that one layer may look like."""
    kinds = Counter(model.share(Lot(layer, e)) for e in range(model.demand.experts))
    choices = [list(compositions(n, len(rooms))) for _, n in sorted(kinds.items())]
    shares = sorted(kinds)
    for counts in product(*choices):
        held = tuple(sum(of_kind) for of_kind in zip(*counts, strict=True))
        if any(h > room for h, room in zip(held, rooms, strict=True)):
            continue
        at = {}
        for site in range(len(rooms)):
            uses = sum(c[site] * share.uses for c, share in zip(counts, shares, strict=True))
            read = sum(c[site] * share.bytes_used for c, share in zip(counts, shares, strict=True))
            if held[site]:
                at[site] = Share(uses, read)
        yield held, model.swarm_layer_ns(at)


def least_ns(model: CostModel, rooms: Sequence[int], limit_s: float = 60.0) -> int:
    """A proven lower bound on the price of all layers together, at most 0.01 % below the optimum
    unless `limit_s` ends the proof; then whatever was proven, at the worst the relaxation."""
    kinds: dict[tuple[Share, ...], list[int]] = {}
    for layer in range(model.demand.layers):
        key = tuple(sorted(model.share(Lot(layer, e)) for e in range(model.demand.experts)))
        kinds.setdefault(key, []).append(layer)
    prices, held, belongs = [], [], []
    for index, layers in enumerate(kinds.values()):
        for count, price in columns_of(model, layers[0], rooms):
            held.append(count)
            prices.append(price)
            belongs.append(index)
    matrix = np.array(held, dtype=float).T
    chosen = np.array([[b == i for b in belongs] for i in range(len(kinds))], dtype=float)
    sizes = np.array([len(layers) for layers in kinds.values()], dtype=float)
    cost = np.array(prices, dtype=float) / 1e6
    rules = [
        LinearConstraint(matrix, ub=np.array(rooms, dtype=float)),
        LinearConstraint(chosen, lb=sizes, ub=sizes),
    ]
    options = {"mip_rel_gap": 1e-4, "time_limit": limit_s}
    done = milp(cost, constraints=rules, integrality=np.ones(len(prices)), options=options)
    if done.mip_dual_bound is None:  # out of time before anything was proven
        done = milp(cost, constraints=rules)
        return int(done.fun * 1e6)
    return int(done.mip_dual_bound * 1e6)
