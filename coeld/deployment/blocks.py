"""Whole layers to devices, in blocks of consecutive ones, so that a request hops seldom. Pure.

Which devices: the cheapest first, until their rooms cover the model. Devices that cost the same
share equally, unless using fewer of them saves more than 5 %, as it does where a hop is dear. How
many layers each takes follows from facts alone, and so does the order of the blocks (a hash of the
device): the placement stays the same while it is carried out. When devices come and go it is
compared with what is served, completed where there are holes (`completed`), and whether moving is
worth it is decided elsewhere (coeld.update.worth), so borders do not wander with every newcomer.
"""

from collections.abc import Mapping, Sequence
from typing import Final

from coeld.deployment.chains import swarm_run_ns
from coeld.deployment.cost import CostModel

FEWER_GAIN_PERCENT: Final = 5
"""What leaving a device out must gain."""


def block_ns(model: CostModel, site: int, layers: int) -> int:
    """What one layer of a block costs, summed over askers by weight."""
    return swarm_run_ns(model, site, max(1, layers)) // max(1, layers)


def blocks(model: CostModel, rooms: Sequence[int], order: Sequence[object]) -> list[int]:
    """The site of every layer. `rooms`: layers that fit at each site, enough for the model.

    `order` gives each site's place along the layers: any comparable values that differ.
    """
    layers = model.demand.layers
    alike: dict[int, list[int]] = {}
    for site, room in enumerate(rooms):
        if room:
            price = block_ns(model, site, min(room, layers))
            alike.setdefault(price, []).append(site)
    places = sorted(range(len(rooms)), key=order.__getitem__)  # type: ignore[arg-type]
    groups = [sorted(sites, key=places.index) for _, sites in sorted(alike.items())]
    shared, filled = (_counts(groups, rooms, layers, share) for share in (True, False))
    few, many = _total(model, filled), _total(model, shared)
    counts = filled if few * 100 < many * (100 - FEWER_GAIN_PERCENT) else shared
    return [site for site in places for _ in range(counts.get(site, 0))]


def _counts(
    groups: Sequence[Sequence[int]], rooms: Sequence[int], layers: int, share: bool
) -> dict[int, int]:
    """Layers of each site: groups one after the other, inside a group equally or one by one."""
    counts: dict[int, int] = {}
    for group in groups:
        waiting = sorted(group, key=lambda site: rooms[site]) if share else list(group)
        while waiting and layers:
            site = waiting.pop(0)
            fair = -(-layers // (1 + len(waiting))) if share else layers
            counts[site] = min(rooms[site], fair)
            layers -= counts[site]
    return counts


def _total(model: CostModel, counts: Mapping[int, int]) -> int:
    return sum(swarm_run_ns(model, site, count) for site, count in counts.items())


def completed(
    model: CostModel,
    served: Sequence[int | None],
    left: Sequence[int],
    wanted: Sequence[int],
) -> list[int] | None:
    """What is served, and each layer that is not at the site where it costs least.

    A site that has a neighbouring layer saves the hop; of equals the `wanted` one. `left`: layers
    that fit besides. None: there is no room.
    """
    placed, room = list(served), list(left)
    alone = [block_ns(model, site, 1) for site in range(len(room))]
    beside = [swarm_run_ns(model, s, 2) - swarm_run_ns(model, s, 1) for s in range(len(room))]
    for layer, site in enumerate(placed):
        if site is not None:
            continue
        near = {placed[at] for at in (layer - 1, layer + 1) if 0 <= at < len(placed)}
        free = [s for s, fits in enumerate(room) if fits > 0]
        if not free:
            return None
        prices = {s: beside[s] if s in near else alone[s] for s in free}
        chosen = min(free, key=lambda s: (prices[s], s != wanted[layer], s))
        placed[layer] = chosen
        room[chosen] -= 1
    return [site for site in placed if site is not None]
