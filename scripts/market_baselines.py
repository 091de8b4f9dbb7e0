"""Placements that others use, to compare with: greedy, round-robin, proportional to memory.

All respect the rooms and give every lot one owner; none knows what the market knows of layers.
"""

from collections.abc import Sequence

from coeld.deployment.cost import CostModel, Share
from coeld.ids import Lot

Placed = dict[Lot, int]


def round_robin(model: CostModel, rooms: Sequence[int]) -> Placed:
    """Lots are dealt out in order, one to each site in turn, while it has room."""
    left, placed, site = list(rooms), {}, -1
    for lot in model.demand.lots():
        site = next(
            s % len(left) for s in range(site + 1, site + 1 + len(left)) if left[s % len(left)]
        )
        left[site] -= 1
        placed[lot] = site
    return placed


def by_memory(model: CostModel, rooms: Sequence[int]) -> Placed:
    """Consecutive lots in proportion to memory, as pipelines of layers are usually cut."""
    lots = model.demand.lots()
    placed, at, seen = {}, 0, 0
    for site, room in enumerate(rooms):
        seen += room
        end = min(-(-len(lots) * seen // sum(rooms)), at + room)
        placed.update(dict.fromkeys(lots[at:end], site))
        at = end
    return placed


def greedy(model: CostModel, rooms: Sequence[int]) -> Placed:
    """The most used lots first, each to the site where it raises the predicted latency least."""
    left, placed = list(rooms), {}
    shares: list[dict[int, Share]] = [{} for _ in range(model.demand.layers)]
    prices = [0] * model.demand.layers
    for lot in sorted(model.demand.lots(), key=lambda lot: (-model.uses(lot), lot)):
        held, one = shares[lot.layer], model.share(lot)
        options = []
        for site, room in enumerate(left):
            if room:
                share = held.get(site, Share(0, 0))
                more = Share(share.uses + one.uses, share.bytes_used + one.bytes_used)
                options.append((model.swarm_layer_ns({**held, site: more}), site, more))
        price, site, more = min(options)
        held[site] = more
        prices[lot.layer] = price
        left[site] -= 1
        placed[lot] = site
    return placed


BASELINES = {"greedy": greedy, "round-robin": round_robin, "by memory": by_memory}
