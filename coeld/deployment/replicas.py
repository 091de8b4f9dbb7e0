"""Spare memory: which whole layers a device holds besides its own, by what that saves. Pure.

A copy of a layer saves an asker what the layer costs it now less what it costs with that copy: most
of all the device itself, which need not call any more. Summed over askers by weight, that is the
copy's value. Copies are given out in rounds, one more of each layer in a round, the most valuable
first; a further one is worth what it saves beyond those there are, which is less. A hop to layers
that are served in one call is shared by these, so a short run is worth most per layer, and of
equals a run's layers stay together: hops are saved by whole runs. Even a copy that saves nothing
keeps answers going when another device fails. What is served there already counts a quarter more.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from coeld.deployment.chains import Run, runs, swarm_cut_ns, swarm_span_ns
from coeld.deployment.cost import CostModel
from coeld.deployment.own_spans import whole_layers
from coeld.deployment.proposal import is_whole, tie
from coeld.ids import Lot, NodeId
from coeld.messages import Record

HELD_WORTH: Final = (5, 4)


class Layer(NamedTuple):
    """One layer as its owner serves it."""

    run: Run
    span: bool
    """In one call with the rest of its run."""


def replicas(
    model: CostModel,
    owners: Mapping[Lot, NodeId],
    records: Iterable[Record],
    copies: int,
) -> dict[NodeId, set[int]]:
    """The layers each device should hold besides those it owns, so that each has `copies` in all.

    Empty while layers are in parts: then bids alone decide.
    """
    demand = model.demand
    if copies < 2 or len(owners) < demand.layers * demand.experts or not is_whole(owners):
        return {}
    site_of = {device.node: model.sites.index((i, 0)) for i, device in enumerate(model.devices)}
    owned = [site_of[owners[Lot(layer, 0)]] for layer in range(demand.layers)]
    held = {
        site_of[record.origin]: whole_layers(demand, record.serving)
        for record in records
        if record.origin in site_of
    }
    found: dict[NodeId, set[int]] = {}
    for site, layer in _given(model, owned, held, copies):
        node = model.devices[model.sites[site][0]].node
        found.setdefault(node, set()).add(layer)
    return found


def _given(
    model: CostModel, owned: Sequence[int], held: Mapping[int, Collection[int]], copies: int
) -> list[tuple[int, int]]:
    """(site, layer) of every copy beyond the first."""
    demand = model.demand
    left = [tier.memory_bytes // max(1, demand.lot_bytes) // demand.experts for tier in model.tiers]
    for site in owned:
        left[site] -= 1
    layers = layers_served(model, owned)
    holders: list[tuple[int, ...]] = [(site,) for site in owned]
    given = []
    for _ in range(1, copies):
        values = _values(model, layers, holders, [s for s, room in enumerate(left) if room > 0])
        ranked = sorted(
            (-value * HELD_WORTH[layer not in held.get(site, ())], -order, site, layer)
            for (site, layer), (value, order) in values.items()
        )
        fresh: dict[int, int] = {}
        for *_, site, layer in ranked:
            if left[site] > 0 and layer not in fresh:
                fresh[layer] = site
                left[site] -= 1
        for layer, site in fresh.items():
            holders[layer] = (*holders[layer], site)
            given.append((site, layer))
    return given


def layers_served(model: CostModel, owned: Sequence[int]) -> list[Layer]:
    """`owned`: the site of every layer."""
    found = []
    for run in runs(enumerate(owned)):
        span = model.spans and swarm_span_ns(model, run.site, run.layers) < swarm_cut_ns(
            model, run.site, run.layers
        )
        found += [Layer(run, span)] * run.layers
    return found


def _values(
    model: CostModel,
    layers: Sequence[Layer],
    holders: Sequence[tuple[int, ...]],
    sites: Sequence[int],
) -> dict[tuple[int, int], tuple[int, int]]:
    """By (site, layer) that is not there yet: nanoseconds per token that a copy saves all askers, 1
    at least, and its order among equals."""
    found: dict[tuple[int, int], tuple[int, int]] = {}
    known: dict[tuple[Run, tuple[int, ...]], dict[int, int]] = {}
    for index, (layer, there) in enumerate(zip(layers, holders, strict=True)):
        key = layer.run, there
        if key not in known:
            known[key] = _saved_ns(model, layer, there, sites)
        for site in sites:
            if site in there:
                continue
            node = model.devices[model.sites[site][0]].node
            found[site, index] = max(1, known[key][site]), tie(node, layer.run.first)
    return found


def _saved_ns(
    model: CostModel, layer: Layer, there: Sequence[int], sites: Sequence[int]
) -> dict[int, int]:
    """What a copy at each of these sites saves all askers."""
    now = least_layer_ns(model, there, layer)
    weights = [model.devices[asker].weight for asker in model.askers]
    return {
        site: sum(
            weight * max(0, before - then)
            for weight, before, then in zip(weights, now, layer_ns(model, site, layer), strict=True)
        )
        for site in sites
    }


def least_layer_ns(model: CostModel, sites: Iterable[int], layer: Layer) -> list[int]:
    """What it costs each asker at the one of these sites where it is quickest for that one."""
    return list(map(min, zip(*(layer_ns(model, site, layer) for site in sites), strict=True)))


def layer_ns(model: CostModel, site: int, layer: Layer) -> list[int]:
    """What one layer costs each asker at a site that serves it as its owner does."""
    home, whole = model.sites[site][0], model.whole_ns(site)
    if not layer.span:
        return [model.attention_ns(a) + whole + model.reached(a, site) for a in model.askers]
    busy, layers = model.attention_ns(home) + whole, layer.run.layers
    return [busy + (0 if a == home else model.reached(a, site) // layers) for a in model.askers]
