"""Which of equals is which: a placement's layers and lots are named so that most stays put. Pure.

A search says how many lots of which kind each site holds of a layer that looks like this. Layers of
one kind may trade looks, and equal lots of a layer may trade sites; what is served decides. The
looks are matched exactly: the largest total overlap, ties broken by a hash. Loading a lot where it
was named adds as much to that matching as to any other, and dropping one that was not named there
takes nothing from it, so while a placement is carried out, its names do not change.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence

from coeld.deployment.cost import Share
from coeld.deployment.search import Search, Unit
from coeld.ids import Lot

TIE_BITS = 24

Look = tuple[tuple[tuple[int, Share], int], ...]
"""((site, share of a lot's unit), lots), sorted: what a layer looks like."""


def named(search: Search, served: Mapping[Lot, int]) -> dict[Lot, int]:
    """The site of every lot; `served` is the one site where a lot counts as being now, if any."""
    assert search.found is not None
    kinds: dict[tuple[tuple[int, Share], ...], list[int]] = {}
    for layer, units in enumerate(search.units):
        kinds.setdefault(tuple((len(u.experts), u.share) for u in units), []).append(layer)
    placed: dict[Lot, int] = {}
    for layers in kinds.values():
        looks = [_look(search.units[layer], search.found[layer]) for layer in layers]
        distinct = sorted(set(looks))
        weights = [
            [_overlap(there, look) << TIE_BITS | _tie(layer, look) for look in distinct]
            for layer in layers
            for there in [_there(search.units[layer], layer, served)]
        ]
        bins = assign(weights, [looks.count(look) for look in distinct])
        for layer, bin_ in zip(layers, bins, strict=True):
            placed.update(_lots(search.units[layer], layer, distinct[bin_], served))
    return placed


def _overlap(there: Mapping[tuple[int, Share], int], look: Look) -> int:
    """Lots that stay where they are."""
    return sum(min(count, there.get(key, 0)) for key, count in look)


def _look(units: Sequence[Unit], row: Sequence[int]) -> Look:
    counts: dict[tuple[int, Share], int] = {}
    for unit, site in zip(units, row, strict=True):
        counts[site, unit.share] = counts.get((site, unit.share), 0) + len(unit.experts)
    return tuple(sorted(counts.items()))


def _there(
    units: Sequence[Unit], layer: int, served: Mapping[Lot, int]
) -> dict[tuple[int, Share], int]:
    found: dict[tuple[int, Share], int] = {}
    for unit in units:
        for expert in unit.experts:
            site = served.get(Lot(layer, expert))
            if site is not None:
                found[site, unit.share] = found.get((site, unit.share), 0) + 1
    return found


def _tie(layer: int, look: Look) -> int:
    digest = hashlib.sha256(f"{layer}/{look}".encode()).digest()
    return int.from_bytes(digest[: TIE_BITS // 8], "big")


def _lots(
    units: Sequence[Unit], layer: int, look: Look, served: Mapping[Lot, int]
) -> Iterator[tuple[Lot, int]]:
    """Lots stay where they are served, as many as the look wants there; the rest fill up."""
    left = dict(look)
    rest = []
    for unit in units:
        for expert in unit.experts:
            key = (served.get(Lot(layer, expert), -1), unit.share)
            if left.get(key, 0) > 0:
                left[key] -= 1
                yield Lot(layer, expert), key[0]
            else:
                rest.append((unit.share, expert))
    for share, expert in rest:
        site = next(site for (site, kind), n in sorted(left.items()) if n and kind == share)
        left[site, share] -= 1
        yield Lot(layer, expert), site


def assign(weights: Sequence[Sequence[int]], rooms: Sequence[int]) -> list[int]:
    """The bin of every item, with the largest sum of weights[item][bin]; as many as rooms.

    A transportation problem: start greedily, then cancel cycles of bins along which items can move
    on and the sum grows (Klein, 1967). Bins are few, items are not.
    """
    found, left = [-1] * len(weights), list(rooms)
    order = sorted((-w, i, b) for i, row in enumerate(weights) for b, w in enumerate(row))
    for _, item, bin_ in order:
        if found[item] < 0 and left[bin_] > 0:
            found[item] = bin_
            left[bin_] -= 1
    while cycle := _gaining_cycle(weights, found, len(rooms)):
        for item, bin_ in cycle:
            found[item] = bin_
    return found


def _gaining_cycle(
    weights: Sequence[Sequence[int]], found: Sequence[int], bins: int
) -> list[tuple[int, int]]:
    """Items to move on in a circle of bins with a gain, as (item, to); empty: there is none."""
    gains: dict[tuple[int, int], tuple[int, int]] = {}
    for item, source in enumerate(found):
        for target in range(bins):
            if target != source:
                offer = (weights[item][target] - weights[item][source], item)
                gains[source, target] = max(offer, gains.get((source, target), offer))
    best = [0] * bins  # Bellman-Ford from everywhere: a node that still improves is on a cycle
    via: list[tuple[int, int]] = [(-1, -1)] * bins
    last = -1
    for _ in range(bins):
        last = -1
        for (source, target), (gain, item) in gains.items():
            if best[source] + gain > best[target]:
                best[target], via[target], last = best[source] + gain, (source, item), target
        if last < 0:
            return []
    for _ in range(bins):
        last = via[last][0]
    cycle: list[tuple[int, int]] = []
    at = last
    while not cycle or at != last:
        source, item = via[at]
        cycle.append((item, at))
        at = source
    return cycle
