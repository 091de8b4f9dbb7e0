"""Placing layers in parts: start from several shapes, then exchange while it pays. Pure.

What is exchanged is a unit: some lots of one layer that count alike. A move takes a unit to a site
with room; a swap gives one layer's unit for another's, so that rooms stay as they are. Each step
takes the best exchange there is and only if predicted latency falls, a potential that is an
integer and bounded below: the search ends. One lot at a time never gathers a layer, because the
call to its other owners is saved only by the last; so the starts differ in how many layers are
gathered whole at which site, with the rest spread so that branches take equally long.

Everything is decided by integers and indices, so all devices with the same facts find the same.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Final, NamedTuple

from coeld.deployment.cost import CostModel, Device, Share
from coeld.ids import Lot, NodeId

UNITS_PER_LAYER: Final = 16
"""A layer of more lots is traded in units of several."""
STEPS_MAX: Final = 400
"""Exchanges per start; the best of them come first."""
LEAST_GAIN: Final = 20_000
"""An exchange that gains less than this part of the price ends the search."""
SLICE_UNITS: Final = 16
"""Units that the greedy start places in one slice."""
STARTS_MAX: Final = 2
"""Starts that are worked on, the most promising ones."""
LARGE_UNITS: Final = 256
"""With more units, layers are taken to be alike: as they are, a search costs seconds."""
GATHERED: Final = (0, 1, 2, 3, 4)
"""Quarters of a site's whole layers that a start gathers there."""

Shares = dict[int, Share]
Placed = list[list[int]]
"""Per layer and unit: the site."""
Plan = tuple[tuple[int, int], ...]
"""Sites and how many whole layers each gathers, in that order."""


class Unit(NamedTuple):
    """Lots of one layer that are traded together."""

    experts: tuple[int, ...]
    share: Share


def units_of(model: CostModel, layer: int) -> tuple[Unit, ...]:
    """A layer's lots, the most used first, in at most UNITS_PER_LAYER units of equal size."""
    demand = model.demand
    lots = sorted(
        (Lot(layer, expert) for expert in range(demand.experts)),
        key=lambda lot: (-model.uses(lot), lot),
    )
    size = -(-len(lots) // UNITS_PER_LAYER)
    groups = [lots[at : at + size] for at in range(0, len(lots), size)]
    return tuple(
        Unit(
            tuple(lot.expert for lot in group),
            Share(*map(sum, zip(*(model.share(lot) for lot in group), strict=True))),
        )
        for group in groups
    )


def _alike(layers: list[tuple[Unit, ...]]) -> list[tuple[Unit, ...]]:
    """The same units, in a large model each of the mean share of its rank over all layers.

    Sorted by use, layers resemble each other, and what is alike is priced and filled once.
    """
    if sum(map(len, layers)) <= LARGE_UNITS:
        return layers
    means = [
        Share(*(sum(part) // len(rank) for part in zip(*(u.share for u in rank), strict=True)))
        for rank in zip(*layers, strict=True)
    ]
    return [
        tuple(Unit(u.experts, mean) for u, mean in zip(units, means, strict=True))
        for units in layers
    ]


class Search:
    """One placement of all layers, with the price of each, changed step by step."""

    def __init__(self, model: CostModel, rooms: Sequence[int]) -> None:
        """`rooms`: lots that fit at each site of the model."""
        self.model = model
        self.units = _alike([units_of(model, layer) for layer in range(model.demand.layers)])
        self.rooms = tuple(rooms)
        self.even = len({tuple(unit.share for unit in units) for units in self.units}) == 1
        self.found: Placed | None = None
        self.found_ns = 0
        self._kinds = kinds(model)
        self._prices: dict[tuple[tuple[int, Share], ...], int] = {}
        self._rows: dict[object, list[int] | None] = {}

    def price(self, shares: Shares) -> int:
        """The layer's price, remembered where many layers look alike."""
        if not self.even:
            return self.model.swarm_layer_ns(shares)
        key = tuple(sorted(shares.items()))
        found = self._prices.get(key)
        if found is None:
            found = self._prices[key] = self.model.swarm_layer_ns(shares)
        return found

    def shares(self, placed: Sequence[int], layer: int) -> Shares:
        """What each site holds of a layer."""
        found: Shares = {}
        for unit, site in zip(self.units[layer], placed, strict=True):
            found[site] = _plus(found.get(site), unit.share)
        return found

    def total(self, placed: Placed) -> int:
        return sum(self.price(self.shares(row, layer)) for layer, row in enumerate(placed))

    def run(self) -> Iterator[None]:
        """Search in slices of a few milliseconds; afterwards `found` is the best placement.

        Every layer is complete and no site above its room; `found` stays None when no start fits.
        The greedy placement is among the starts, so the outcome is never worse than that.
        """
        starts: list[tuple[int, int, Placed]] = []
        yield from self._greedy(starts)
        plans: list[tuple[int, Plan]] = []
        even = self if self.even else Search(self.model.evened(), self.rooms)
        for plan in self._plans():
            gathered: list[Placed] = []
            for _ in even._gather(plan, gathered):
                pass  # layers look alike: this is quick
            plans += [(even.total(placed), plan) for placed in gathered]
            yield
        for index, (_, plan) in enumerate(sorted(plans)[:STARTS_MAX]):
            gathered = []
            yield from self._gather(plan, gathered)
            starts += [(self.total(placed), index, placed) for placed in gathered]
        for _, _, placed in sorted(starts)[:STARTS_MAX]:
            yield from self._exchange(placed)
            total = self.total(placed)
            if self.found is None or total < self.found_ns:
                self.found, self.found_ns = placed, total

    # ---- starts ----------------------------------------------------------------------------

    def _plans(self) -> list[Plan]:
        """Which sites gather how many whole layers, before the rest is spread."""
        whole = [room // self.model.demand.experts for room in self.rooms]
        cheap = sorted(range(len(whole)), key=lambda site: (self._whole_price(site), site))
        plans = {tuple((site, whole[site]) for site in cheap): None}
        for a, b in combinations(cheap[:3], 2):
            for p in GATHERED:
                for q in GATHERED:
                    plans[(a, whole[a] * p // 4), (b, whole[b] * q // 4)] = None
        return list(plans)

    def _greedy(self, starts: list[tuple[int, int, Placed]]) -> Iterator[None]:
        """The most used units first, each where it raises the price least; adds it if it fits."""
        layers = range(self.model.demand.layers)
        held: list[Shares] = [{} for _ in layers]
        placed = [[-1] * len(self.units[layer]) for layer in layers]
        left = list(self.rooms)
        order = sorted(
            (-unit.share.uses, layer, index)
            for layer in layers
            for index, unit in enumerate(self.units[layer])
        )
        for count, (_, layer, index) in enumerate(order):
            if count % SLICE_UNITS == 0:
                yield
            experts, share = self.units[layer][index]
            fits = [site for site, room in enumerate(left) if room >= len(experts)]
            options = [
                (self.price({**held[layer], site: _plus(held[layer].get(site), share)}), site)
                for site in self._unlike(fits, held[layer])
            ]
            if not options:
                return
            site = min(options)[1]
            held[layer][site] = _plus(held[layer].get(site), share)
            left[site] -= len(experts)
            placed[layer][index] = site
        starts.append((self.total(placed), 0, placed))

    def _unlike(self, sites: Sequence[int], shares: Shares) -> Iterable[int]:
        """Of those that are of one kind and hold as much of a layer, only the first."""
        return {(self._kinds[site], shares.get(site)): site for site in reversed(sites)}.values()

    def _whole_price(self, site: int) -> int:
        return self.price(self.shares([site] * len(self.units[0]), 0))

    def _gather(self, plan: Plan, found: list[Placed]) -> Iterator[None]:
        """(site, layers) gathered in that order, the other layers spread over what is left; added
        to `found` if it fits."""
        layers, rooms = self.model.demand.layers, list(self.rooms)
        placed: Placed = []
        for site, count in plan:
            for _ in range(min(count, layers - len(placed))):
                placed.append([site] * len(self.units[len(placed)]))
                rooms[site] -= self.model.demand.experts
        for layer in range(len(placed), layers):
            yield
            row = self._spread(layer, rooms, layers - layer)
            if row is None:
                return
            placed.append(list(row))
        found.append(placed)

    def _spread(self, layer: int, rooms: list[int], left: int) -> list[int] | None:
        """Each unit to the site that is done first with it; rooms last for all layers left."""
        caps = [-(-room // left) for room in rooms]
        row = self._filled(layer, tuple(caps), rooms)
        if row is None:
            return None
        for unit, site in zip(self.units[layer], row, strict=True):
            rooms[site] -= len(unit.experts)
        return row

    def _filled(self, layer: int, caps: tuple[int, ...], rooms: Sequence[int]) -> list[int] | None:
        """The better of two ways to fill a layer, remembered where layers look alike."""
        experts = self.model.demand.experts
        key = (caps, tuple(min(room, experts) for room in rooms)) if self.even else None
        if key in self._rows:
            return self._rows[key]
        rows = [self._fill(layer, caps, rooms, by_price) for by_price in (False, True)]
        found = [(self.price(self.shares(row, layer)), row) for row in rows if row is not None]
        row = min(found)[1] if found else None
        if key is not None:
            self._rows[key] = row
        return row

    def _fill(
        self, layer: int, caps: Sequence[int], rooms: Sequence[int], by_price: bool
    ) -> list[int] | None:
        shares: Shares = {}
        taken = [0] * len(caps)
        row = []
        for unit in self.units[layer]:
            count = len(unit.experts)
            fits = [s for s, cap in enumerate(caps) if taken[s] + count <= min(cap, rooms[s])]
            fits = fits or [s for s, room in enumerate(rooms) if taken[s] + count <= room]
            if not fits:
                return None

            def cost(site: int, unit: Unit = unit) -> int:
                share = _plus(shares.get(site), unit.share)
                if by_price:
                    return self.price({**shares, site: share})
                return share.bytes_used // max(1, self.model.tiers[site].mb_per_s)

            site = min(self._unlike(fits, shares), key=lambda s: (cost(s), s))
            shares[site] = _plus(shares.get(site), unit.share)
            taken[site] += count
            row.append(site)
        return row

    # ---- exchanges -------------------------------------------------------------------------

    def _exchange(self, placed: Placed) -> Iterator[None]:
        """Moves and swaps, the best first, until none lowers the price."""
        free = [room - taken for room, taken in zip(self.rooms, self._taken(placed), strict=True)]
        offers = []
        for layer, row in enumerate(placed):
            offers.append(self._offers(row, layer))
            yield
        least = self.total(placed) // LEAST_GAIN
        for _ in range(STEPS_MAX):
            yield
            gain, step = self._best_step(offers, free)
            if gain <= least:
                return
            for layer, unit, source, target in step:
                placed[layer][unit] = target
                count = len(self.units[layer][unit].experts)
                free[source] += count
                free[target] -= count
            for layer in {layer for layer, *_ in step}:
                offers[layer] = self._offers(placed[layer], layer)

    def _taken(self, placed: Placed) -> list[int]:
        taken = [0] * len(self.rooms)
        for units, row in zip(self.units, placed, strict=True):
            for unit, site in zip(units, row, strict=True):
                taken[site] += len(unit.experts)
        return taken

    def _offers(self, row: Sequence[int], layer: int) -> dict[tuple[int, int], tuple[int, int]]:
        """For each (from, to): the cheapest unit to take there, as (change of price, unit)."""
        shares = self.shares(row, layer)
        price = self.price(shares)
        movable: dict[tuple[int, Share], int] = {}
        for unit, site in enumerate(row):
            movable.setdefault((site, self.units[layer][unit].share), unit)
        found: dict[tuple[int, int], tuple[int, int]] = {}
        for (source, share), unit in _extremes(movable):
            rest = dict(shares)
            _take(rest, source, share)
            for target in range(len(self.rooms)):
                if target != source:
                    moved = {**rest, target: _plus(rest.get(target), share)}
                    offer = (self.price(moved) - price, unit)
                    if offer < found.get((source, target), (1 << 62, 0)):
                        found[source, target] = offer
        return found

    def _best_step(
        self, offers: list[dict[tuple[int, int], tuple[int, int]]], free: Sequence[int]
    ) -> tuple[int, list[tuple[int, int, int, int]]]:
        """The largest gain of a move or swap, and which: [(layer, unit, from, to), …]."""
        ranked: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
        for layer, of_layer in enumerate(offers):
            for pair, (change, unit) in of_layer.items():
                ranked.setdefault(pair, []).append((change, layer, unit))
        for pair, rows in ranked.items():
            ranked[pair] = sorted(rows)[:2]
        best: tuple[int, list[tuple[int, int, int, int]]] = (0, [])
        for (source, target), there in sorted(ranked.items()):
            change, layer, unit = there[0]
            go = (layer, unit, source, target)
            if free[target] >= len(self.units[layer][unit].experts):
                best = min(best, (change, [go]))
            for back_change, back_layer, back_unit in ranked.get((target, source), ()):
                same = len(self.units[layer][unit].experts) == len(
                    self.units[back_layer][back_unit].experts
                )
                if source < target and back_layer != layer and same:
                    back = (back_layer, back_unit, target, source)
                    best = min(best, (change + back_change, [go, back]))
        return -best[0], best[1]


def kinds(model: CostModel) -> list[int]:
    """For every site the first one with which it could change places at no change of any price."""
    found: list[int] = []
    for site in range(len(model.sites)):
        first = (kind for kind in dict.fromkeys(found) if _interchangeable(model, kind, site))
        found.append(next(first, site))
    return found


def _interchangeable(model: CostModel, a: int, b: int) -> bool:
    """Do equal devices, of one memory each, reach one another and all others alike there?"""
    i, j = model.sites[a][0], model.sites[b][0]
    one, other = _figures(model.devices[i]), _figures(model.devices[j])
    return (
        one == other
        and len(one.tiers) == 1
        and model.reached(i, a) == model.reached(j, b)
        and model.reached(i, b) == model.reached(j, a)
        and all(
            model.reached(i, site) == model.reached(j, site)
            for site in range(len(model.sites))
            if site not in (a, b)
        )
        and all(
            model.reached(asker, a) == model.reached(asker, b)
            for asker in range(len(model.devices))
            if asker not in (i, j)
        )
    )


def _figures(device: Device) -> Device:
    """What prices may depend on: neither who it is nor how much it has room for."""
    tiers = tuple(tier._replace(memory_bytes=0) for tier in device.tiers)
    return replace(device, node=NodeId(""), tiers=tiers)


def _extremes(
    movable: dict[tuple[int, Share], int],
) -> Iterator[tuple[tuple[int, Share], int]]:
    """The most and the least used unit of every site."""
    by_site: dict[int, list[tuple[Share, int]]] = {}
    for (site, share), unit in movable.items():
        by_site.setdefault(site, []).append((share, unit))
    for site, found in sorted(by_site.items()):
        for share, unit in {min(found), max(found)}:
            yield (site, share), unit


def _plus(a: Share | None, b: Share) -> Share:
    return b if a is None else Share(a.uses + b.uses, a.bytes_used + b.bytes_used)


def _take(shares: Shares, site: int, share: Share) -> None:
    """Takes `share` off a site, and the site away when nothing is left."""
    left = Share(shares[site].uses - share.uses, shares[site].bytes_used - share.bytes_used)
    if left.uses > 0:
        shares[site] = left
    else:
        del shares[site]
