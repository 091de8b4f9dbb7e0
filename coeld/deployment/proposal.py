"""The placement a device would choose for the whole swarm, found alike by all who know the same.

What a layer costs is a maximum over devices, so what one lot is worth here depends on where the
others are, and no price per lot can say that. Instead every device works out the same whole
placement from the same gossiped facts and bids highest for its own part of it (coeld.deployment.
pricing): the proposal is advice, the auction is law. Where views differ for a moment, a device is
missing or a lot does not load, the law still gives every lot one owner.

While the whole layers of all devices cover the model they are placed in blocks of consecutive
layers (coeld.deployment.blocks), served as spans or with cuts, whichever is cheaper. A layer that
is together gives the bits of one device, so layers are placed in parts, by search, only if that is
predicted to gain clearly (PARTS_GAIN_PERCENT), over links all of which have been measured, or if
whole ones do not fit.
What fits only if some layers lose bits is placed in blocks as well (coeld.deployment.widths).

What is served now is priced as well, completed where there are holes. Moving costs time, so whether
the fresh placement is worth it is decided elsewhere (coeld.update.worth).
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NamedTuple

from coeld.deployment.blocks import block_ns, blocks, completed
from coeld.deployment.chains import layers_with_caches, placement_ns
from coeld.deployment.cost import PPM, CostModel, Device, Link, Share
from coeld.deployment.naming import named
from coeld.deployment.search import Search
from coeld.deployment.widths import quotas
from coeld.ids import Lot, NodeId
from coeld.view import ModelDemand

SITES_MAX: Final = 16
"""Devices (and tiers) that are considered for layers in parts, the cheapest first."""
PARTS_GAIN_PERCENT: Final = 10
"""What layers in parts must gain over whole ones, which have the bits of one device."""


@dataclass(frozen=True, slots=True)
class Facts:
    """All that a proposal depends on, equal at all devices once news has spread."""

    demand: ModelDemand
    devices: tuple[Device, ...]
    """By id. The tiers' memory is what is left for lots."""
    links: tuple[tuple[Link, ...], ...]
    """From each device (row) to each other."""
    split: bool = False
    """Place layers in parts without asking whether whole ones would do as well."""
    spans: bool = True
    """Devices serve runs of whole layers in one go where that is cheaper. Without, layers are
    placed in parts only where whole ones do not fit."""
    narrow: bool = False
    """The lots fit these devices only if some are held in fewer bits."""
    measured: bool = True
    """All links are. What is assumed of the others is too good for a slow network or a device whose
    one core is busy, and layers in parts call most: they wait until it is known."""

    def measured_anew(self, before: "Facts") -> bool:
        """Has nothing changed since but what is measured of the same devices?"""
        return self._given() == before._given()

    def _given(self) -> tuple[object, ...]:
        rooms = [(device.node, device.tiers[0].memory_bytes) for device in self.devices]
        return self.demand.model, self.split, self.spans, self.narrow, rooms

    def model(self) -> CostModel:
        index = {device.node: i for i, device in enumerate(self.devices)}

        def link(a: NodeId, b: NodeId) -> Link:
            return self.links[index[a]][index[b]]

        return CostModel(self.demand, self.devices, link, spans=self.spans)


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
        self.model = facts.model()
        demand = facts.demand
        self._rooms = [tier.memory_bytes // max(1, demand.lot_bytes) for tier in self.model.tiers]
        self._layers = [room // demand.experts for room in self._rooms]
        """Whole layers that fit at each site, or that it takes if some are narrow; with the KV
        caches of spans if all layers fit so: one that cannot be in a span costs a call of its own.
        """
        if facts.spans:
            askers, rooms = len(self.model.askers), [t.memory_bytes for t in self.model.tiers]
            roomy = [layers_with_caches(demand, room, askers) for room in rooms]
            if sum(roomy) >= demand.layers:
                self._layers = roomy
        if facts.narrow:
            rooms = [tier.memory_bytes for tier in self.model.tiers]
            self._layers = quotas(demand, rooms, self._order())
        self.whole = facts.narrow or (sum(self._layers) >= demand.layers and not facts.split)
        """Layers are whole, and parts of some are worth nothing. Certain once all is thought."""
        self._placed: dict[Lot, int] | None = None
        self._blocks: Proposal | None = None
        """What is `_placed`, priced."""
        self._search: Search | None = None
        self._slices: Iterator[None] = iter(())
        if self.whole:
            self._placed = self._in_blocks()
        fits = sum(self._rooms) >= demand.layers * demand.experts
        parts = facts.spans and facts.measured
        if fits and not (self.whole and (not parts or self._hopeless())):
            self._search, self._slices = _searched(facts).again()

    def advance(self) -> bool:
        """A few milliseconds of work; True when there is nothing more to find."""
        if next(self._slices, self) is not self:
            return False
        self._compare()
        return True

    def fresh(self, served: Mapping[Lot, NodeId]) -> Proposal | None:
        """The best placement, as close to what is `served` by whom as its equals can be.

        None: the model does not fit, or no placement was found; then bids alone decide.
        """
        if not self.whole and self._search is not None and self._search.found is not None:
            return self._proposal(named(self._search, self._sites_of(served)))
        if self._blocks is None and self._placed is not None:
            self._blocks = self._proposal(self._placed)
        return self._blocks

    def kept(self, served: Mapping[Lot, NodeId], fresh: Proposal) -> Proposal | None:
        """What is `served`, with the owners of `fresh`, or whoever has room, where nobody does.

        While layers are whole, one that is not served whole counts as not served, unless most are
        in parts: then the swarm lives with that, and a change has to pay. None: it does not fit.
        """
        placed = self._kept(served, fresh)
        return self._proposal(placed) if placed is not None else None

    # ---- whole layers ----------------------------------------------------------------------

    def _order(self) -> list[tuple[int, int]]:
        """Each site's place along the layers."""
        return [(tie(self._node(site), 0), site) for site in range(len(self._rooms))]

    def _in_blocks(self) -> dict[Lot, int]:
        placed = blocks(self.model, self._layers, self._order())
        return {lot: placed[lot.layer] for lot in self.facts.demand.lots()}

    def _hopeless(self) -> bool:
        """Dealt out as they come layers gain so little over whole ones that no search finds enough.
        A search takes seconds of a slow processor, and each measurement that is told asks for one.
        """
        enough = dealt_ns(self.model) * (100 + PARTS_GAIN_PERCENT // 2)
        return self._price(self._placed) * 100 <= enough

    def _compare(self) -> None:
        """Layers in parts replace whole ones only if they gain clearly."""
        if not self.whole or self._search is None or self._search.found is None:
            return
        search, self._search = self._search, None
        parts = self._price(named(search, {}))
        if self._price(self._placed) * 100 > parts * (100 + PARTS_GAIN_PERCENT):
            self.whole, self._search = False, search

    # ---- what is served --------------------------------------------------------------------

    def _sites_of(self, served: Mapping[Lot, NodeId]) -> dict[Lot, int]:
        """Nothing is expected to stay where there is no room for anything."""
        rooms = zip(self._rooms, self._layers, strict=True)
        sites = [site for site, room in enumerate(rooms) if any(room)]
        first = {self._node(site): site for site in reversed(sites)}
        return {lot: first[node] for lot, node in served.items() if node in first}

    def _kept(self, served: Mapping[Lot, NodeId], fresh: Proposal) -> dict[Lot, int] | None:
        """The site of every lot, or None: it does not fit."""
        sites, wanted = self._sites_of(served), self._sites_of(fresh.owners)
        if self.whole and (self.facts.narrow or not self._in_parts(sites)):
            return self._kept_whole(sites, wanted)
        lots = self.facts.demand.lots()
        left, placed = list(self._rooms), {lot: sites[lot] for lot in lots if lot in sites}
        for site in placed.values():
            left[site] -= 1
        if min(left) < 0:
            return None
        cheapest = _cheapest(self.model)
        for lot in lots:
            if lot not in placed:
                free = [site for site in (wanted[lot], *cheapest) if left[site] > 0]
                if not free:
                    return None
                left[free[0]] -= 1
                placed[lot] = free[0]
        return placed

    def _kept_whole(
        self, sites: Mapping[Lot, int], wanted: Mapping[Lot, int]
    ) -> dict[Lot, int] | None:
        demand = self.facts.demand
        left = list(self._layers)
        there: list[int | None] = []
        for layer in range(demand.layers):
            found = {sites.get(lot) for lot in demand.lots_of(layer)}
            there.append(found.pop() if len(found) == 1 else None)
        for layer, site in enumerate(there):
            if site is not None and left[site] == 0:
                there[layer] = None  # more than it has room for now
            elif site is not None:
                left[site] -= 1
        first = [wanted[Lot(layer, 0)] for layer in range(demand.layers)]
        placed = completed(self.model, there, left, first)
        return {lot: placed[lot.layer] for lot in demand.lots()} if placed is not None else None

    def _in_parts(self, sites: Mapping[Lot, int]) -> bool:
        """Does the swarm live with layers in parts: is everything served, and most of it torn?"""
        demand, torn = self.facts.demand, 0
        for layer in range(demand.layers):
            found = {sites.get(lot) for lot in demand.lots_of(layer)}
            if None in found:
                return False
            torn += len(found) > 1
        return 2 * torn > demand.layers

    # ---- both ------------------------------------------------------------------------------

    def _node(self, site: int) -> NodeId:
        return self.facts.devices[self.model.sites[site][0]].node

    def _price(self, placed: Mapping[Lot, int] | None) -> int:
        assert placed is not None
        return placement_ns(self.model, shares_of(self.model, placed))

    def _proposal(self, placed: Mapping[Lot, int]) -> Proposal:
        owners = {lot: self._node(site) for lot, site in placed.items()}
        return Proposal(owners, self._price(placed))


class _Searched:
    """One search for all who know the same facts: whoever comes later repeats its slices."""

    def __init__(self, facts: Facts) -> None:
        model, demand = facts.model(), facts.demand
        rooms = [tier.memory_bytes // max(1, demand.lot_bytes) for tier in model.tiers]
        self._search = Search(model, _narrowed(model, rooms))
        self._run = self._search.run()
        self._done = 0

    def again(self) -> tuple[Search, Iterator[None]]:
        """The search, and what has to be run through until its result may be read."""
        return self._search, self._slices()

    def _slices(self) -> Iterator[None]:
        slices = 0
        while slices < self._done or next(self._run, self) is not self:
            slices += 1
            self._done = max(self._done, slices)
            yield


_searched = lru_cache(maxsize=16)(_Searched)


def _narrowed(model: CostModel, rooms: list[int]) -> list[int]:
    """The rooms, of the cheapest SITES_MAX sites only if those are enough."""
    few = set(_cheapest(model)[:SITES_MAX])
    narrow = [room if s in few else 0 for s, room in enumerate(rooms)]
    return narrow if sum(narrow) >= model.demand.layers * model.demand.experts else rooms


def dealt_ns(model: CostModel) -> int:
    """What a token costs, summed over askers by weight, if every layer is dealt out in proportion
    to speed over as many of the cheapest sites as cost least. Their memory is not looked at."""
    demand, ranked = model.demand, _cheapest(model)[:SITES_MAX]
    best = None
    for count in range(2, len(ranked) + 1):
        speed = sum(model.tiers[site].mb_per_s for site in ranked[:count])
        shares = {}
        for site in ranked[:count]:
            uses = demand.used * PPM * model.tiers[site].mb_per_s // max(1, speed)
            shares[site] = Share(uses, uses * demand.lot_bytes)
        price = model.swarm_layer_ns(shares)
        best = price if best is None else min(best, price)
    trunks = (
        model.devices[a].weight * (demand.layers * model.attention_ns(a) + model.head_ns(a))
        for a in model.askers
    )
    return demand.layers * (best or 0) + sum(trunks)


def _cheapest(model: CostModel) -> list[int]:
    """Sites by what a whole layer costs there."""
    return sorted(range(len(model.sites)), key=lambda site: (block_ns(model, site, 1), site))


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
