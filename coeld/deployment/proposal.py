"""The placement a device would choose for the whole swarm, found alike by all who know the same.

What a layer costs is a maximum over devices, so what one lot is worth here depends on where the
others are, and no price per lot can say that. Instead every device works out the same whole
placement from the same gossiped facts and bids highest for its own part of it (coeld.deployment.
pricing): the proposal is advice, the auction is law. Where views differ for a moment, a device is
missing or a lot does not load, the law still gives every lot one owner.

Whole layers are placed first, dearest device last and equal ones by rendezvous hash, as long as
the whole layers of all devices cover the model: a layer that is together gives the bits of one
device. If they do not, or if the swarm prefers speed, layers are placed in parts by search.

What is served now is priced as well, completed where there are holes. Moving costs time, so whether
the fresh placement is worth it is decided elsewhere (coeld.update.worth).
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NamedTuple

from coeld.deployment.cost import CostModel, Device, Link, Share
from coeld.deployment.naming import named
from coeld.deployment.search import Search
from coeld.ids import Lot, NodeId
from coeld.view import ModelDemand

SITES_MAX: Final = 16
"""Devices (and tiers) that are considered for layers in parts, the cheapest first."""


@dataclass(frozen=True, slots=True)
class Facts:
    """All that a proposal depends on, equal at all devices once news has spread."""

    demand: ModelDemand
    devices: tuple[Device, ...]
    """By id. The tiers' memory is what is left for lots."""
    links: tuple[tuple[Link, ...], ...]
    """From each device (row) to each other."""
    split: bool = False
    """Place layers in parts where that is faster, also when whole layers would fit."""

    def model(self) -> CostModel:
        index = {device.node: i for i, device in enumerate(self.devices)}
        return CostModel(self.demand, self.devices, lambda a, b: self.links[index[a]][index[b]])


class Proposal(NamedTuple):
    """Who should own every lot, and what a token then costs, summed over askers by weight."""

    owners: Mapping[Lot, NodeId]
    price_ns: int


@lru_cache(maxsize=65536)
def tie(node: NodeId, layer: int) -> int:
    """Highest random weight (Thaler, Ravishankar, 1998) of a device for a layer, 16 bits."""
    return int.from_bytes(hashlib.sha256(f"{node}/{layer}".encode()).digest()[:2], "big")


class Deliberation:
    """Works in slices, so that a large model does not silence its device. Use it once."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self._model = facts.model()
        demand = facts.demand
        self._rooms = [tier.memory_bytes // max(1, demand.lot_bytes) for tier in self._model.tiers]
        whole = [room // demand.experts for room in self._rooms]
        self.whole = sum(whole) >= demand.layers and not facts.split
        """Whole layers cover the model, and nobody asked to split them."""
        self._placed: dict[Lot, int] | None = None
        self._search: Search | None = None
        self._slices: Iterator[None] = iter(())
        if self.whole:
            self._placed = self._by_layer(whole)
        elif sum(self._rooms) >= demand.layers * demand.experts:
            self._search = Search(self._model, self._narrowed())
            self._slices = self._search.run()

    def advance(self) -> bool:
        """A few milliseconds of work; True when there is nothing more to find."""
        return next(self._slices, self) is self

    def fresh(self, served: Mapping[Lot, NodeId]) -> Proposal | None:
        """The best placement, as close to what is `served` by whom as its equals can be.

        None: the model does not fit, or no placement was found; then bids alone decide.
        """
        if self._search is not None and self._search.found is not None:
            return self._proposal(named(self._search, self._sites_of(served)))
        return self._proposal(self._placed) if self._placed is not None else None

    def kept(self, served: Mapping[Lot, NodeId], fresh: Proposal) -> Proposal | None:
        """What is `served`, with the owners of `fresh`, or whoever has room, where nobody does.

        While layers are whole, one that is not served whole counts as not served. None where it
        does not fit.
        """
        placed = self._kept(served, fresh)
        return self._proposal(placed) if placed is not None else None

    # ---- whole layers ----------------------------------------------------------------------

    def _whole_price(self, site: int) -> int:
        demand = self.facts.demand
        shares = [self._model.share(Lot(0, expert)) for expert in range(demand.experts)]
        whole = Share(sum(s.uses for s in shares), sum(s.bytes_used for s in shares))
        return self._model.swarm_layer_ns({site: whole})

    def _by_layer(self, whole: list[int]) -> dict[Lot, int]:
        """Each layer to the cheapest site with room, by hash among sites that cost the same."""
        demand, left = self.facts.demand, list(whole)
        alike: dict[int, list[int]] = {}
        for site in range(len(whole)):
            alike.setdefault(self._whole_price(site), []).append(site)
        placed: dict[int, int] = {}
        for _, sites in sorted(alike.items()):
            offers = sorted(
                (-tie(self._node(site), layer), site, layer)
                for site in sites
                for layer in range(demand.layers)
                if layer not in placed
            )
            for _, site, layer in offers:
                if layer not in placed and left[site] > 0:
                    placed[layer] = site
                    left[site] -= 1
        return {lot: placed[lot.layer] for lot in demand.lots()}

    # ---- layers in parts -------------------------------------------------------------------

    def _narrowed(self) -> list[int]:
        """The rooms, of the cheapest SITES_MAX sites only if those are enough."""
        demand = self.facts.demand
        ranked = sorted(range(len(self._rooms)), key=lambda s: (self._whole_price(s), s))
        few = set(ranked[:SITES_MAX])
        rooms = [room if s in few else 0 for s, room in enumerate(self._rooms)]
        return rooms if sum(rooms) >= demand.layers * demand.experts else self._rooms

    # ---- what is served --------------------------------------------------------------------

    def _sites_of(self, served: Mapping[Lot, NodeId]) -> dict[Lot, int]:
        first = {self._node(site): site for site in reversed(range(len(self._rooms)))}
        return {lot: first[node] for lot, node in served.items() if node in first}

    def _kept(self, served: Mapping[Lot, NodeId], fresh: Proposal) -> dict[Lot, int] | None:
        """The site of every lot, or None: it does not fit."""
        demand = self.facts.demand
        layers = [demand.lots_of(layer) for layer in range(demand.layers)]
        parts = layers if self.whole else [[lot] for lots in layers for lot in lots]
        size = demand.experts if self.whole else 1
        left, placed = [room // size for room in self._rooms], {}
        sites = self._sites_of(served)
        holes = []
        for part in parts:
            found = {sites.get(lot) for lot in part}
            site = found.pop()
            if found or site is None:
                holes.append(part)
                continue
            left[site] -= 1
            placed.update(dict.fromkeys(part, site))
        if min(left) < 0:
            return None
        wanted = self._sites_of(fresh.owners)
        cheapest = sorted(range(len(left)), key=lambda site: (self._whole_price(site), site))
        for part in holes:
            free = [site for site in (wanted[part[0]], *cheapest) if left[site] > 0]
            if not free:
                return None
            left[free[0]] -= 1
            placed.update(dict.fromkeys(part, free[0]))
        return placed

    # ---- both ------------------------------------------------------------------------------

    def _node(self, site: int) -> NodeId:
        return self.facts.devices[self._model.sites[site][0]].node

    def _proposal(self, placed: Mapping[Lot, int]) -> Proposal:
        layers = sum(map(self._model.swarm_layer_ns, shares_of(self._model, placed)))
        owners = {lot: self._node(site) for lot, site in placed.items()}
        return Proposal(owners, layers + self._model.swarm_trunk_ns())


def shares_of(model: CostModel, placed: Mapping[Lot, int]) -> list[dict[int, Share]]:
    """Per layer, what each site holds of it; `placed` gives the site of every lot."""
    layers: list[dict[int, Share]] = [{} for _ in range(model.demand.layers)]
    for lot, site in placed.items():
        share, more = layers[lot.layer].get(site, Share(0, 0)), model.share(lot)
        both = Share(share.uses + more.uses, share.bytes_used + more.bytes_used)
        layers[lot.layer][site] = both
    return layers


def is_whole(owners: Mapping[Lot, NodeId]) -> bool:
    """Is every layer at one device?"""
    first: dict[int, NodeId] = {}
    return all(first.setdefault(lot.layer, node) == node for lot, node in owners.items())
