"""Spans and legs: which whole layers are served in one go, and which way a request takes. Pure.

A device that holds consecutive layers whole may serve them to others expert by expert (every layer
is a call, attention stays with the asker) or as a *span*: one call runs them all, attention and
KV cache included, and the layers may be one graph there. A run of n layers at device d costs

    cut    n × (attention at the asker + experts at d + reach)
    span   n × (attention at d + experts at d) + reach

where `reach` is round trip + queue + calls + payload, and at home the graph calls of layers that
must stay callable. So every run can be decided for itself and by its own device. What travels
always returns to the asker: a way through k devices is k round trips.

A *way* leads through all layers: each is run here, or in a span of a device that serves it so.
It is a shortest path from layer to layer.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from coeld.deployment.cost import CHUNK_ROWS, CostModel, Share, kv_cache_bytes
from coeld.view import ModelDemand

CACHE_TOKENS: Final = 2048
"""Context of the requests whose KV cache a device makes room for: one of every asker."""
SPAN_GAIN_PERCENT: Final = 5
"""What a change between cuts and spans, or from one way to another, must gain."""


class Run(NamedTuple):
    """Layers first..stop-1, whole, at one site (device and tier) of the cost model."""

    site: int
    first: int
    stop: int

    @property
    def layers(self) -> int:
        return self.stop - self.first


def runs(sites: Iterable[tuple[int, int]]) -> list[Run]:
    """Maximal runs of (layer, site) pairs; layers ascending."""
    found: list[Run] = []
    for layer, site in sites:
        if found and found[-1].site == site and found[-1].stop == layer:
            found[-1] = Run(site, found[-1].first, layer + 1)
        else:
            found.append(Run(site, layer, layer + 1))
    return found


def span_ns(model: CostModel, asker: int, site: int, layers: int, context_tokens: int = 0) -> int:
    device = model.sites[site][0]
    reach = 0 if device == asker else model.reached(asker, site)
    return layers * (model.attention_ns(device, context_tokens) + model.whole_ns(site)) + reach


def cut_ns(model: CostModel, asker: int, site: int, layers: int, context_tokens: int = 0) -> int:
    attention = model.attention_ns(asker, context_tokens)
    return layers * (attention + model.whole_ns(site) + model.reached(asker, site))


def swarm_span_ns(model: CostModel, site: int, layers: int) -> int:
    """Summed over all devices that ask, by weight."""
    home = model.sites[site][0]
    reach = [0 if asker == home else model.reached(asker, site) for asker in model.askers]
    busy = layers * (model.attention_ns(home) + model.whole_ns(site))
    return _summed(model, [busy + one for one in reach])


def swarm_cut_ns(model: CostModel, site: int, layers: int) -> int:
    whole = model.whole_ns(site)
    each = [model.attention_ns(a) + whole + model.reached(a, site) for a in model.askers]
    return layers * _summed(model, each)


def _summed(model: CostModel, costs: Iterable[int]) -> int:
    """What something costs each asker, by weight."""
    return sum(
        model.devices[asker].weight * cost for asker, cost in zip(model.askers, costs, strict=True)
    )


def swarm_run_ns(model: CostModel, site: int, layers: int) -> int:
    """A run in its cheaper form."""
    if not model.spans:
        return swarm_cut_ns(model, site, layers)
    return min(swarm_span_ns(model, site, layers), swarm_cut_ns(model, site, layers))


def placement_ns(model: CostModel, layers: Sequence[Mapping[int, Share]]) -> int:
    """What a token costs, summed over askers by weight: runs of whole layers in the form that is
    cheaper for all, layers in parts as cuts, and the head."""
    whole, torn = _parted(layers)
    total = sum(swarm_run_ns(model, run.site, run.layers) for run in whole)
    total += sum(model.swarm_layer_ns(shares) for shares in torn)
    for a in model.askers:
        alone = len(torn) * model.attention_ns(a) + model.head_ns(a)
        total += model.devices[a].weight * alone
    return total


def legs(
    model: CostModel, asker: int, layers: Sequence[Mapping[int, Share]], context_tokens: int = 0
) -> list[Run]:
    """An asker's way through the layers, each run of whole ones in the form that is cheaper for it.
    `site` is the device with the attention: the asker, or whose span it is."""
    whole, _ = _parted(layers)
    spans: dict[int, int] = {}
    for run in whole if model.spans else ():
        it = model, asker, run.site, run.layers, context_tokens
        if span_ns(*it) < cut_ns(*it):
            spans |= dict.fromkeys(range(run.first, run.stop), model.sites[run.site][0])
    return runs((layer, spans.get(layer, asker)) for layer in range(len(layers)))


def _hop_ns(
    model: CostModel, asker: int, leg: Run, layers: Sequence[Mapping[int, Share]], rows: int
) -> int:
    """What it takes to reach a leg with so many rows; nothing at home."""
    if leg.site == asker:
        return 0
    reach = model.reached(asker, next(iter(layers[leg.first])))
    return reach + model.carried_ns(asker, leg.site, rows - 1)


def token_us(
    model: CostModel, asker: int, layers: Sequence[Mapping[int, Share]], context_tokens: int = 0
) -> int:
    """Microseconds per decoded token at one asker."""
    total = model.head_ns(asker)
    for leg in legs(model, asker, layers, context_tokens):
        attention = model.attention_ns(leg.site, context_tokens)
        own = layers[leg.first : leg.stop]
        total += sum(attention + model.layer_ns(leg.site, shares) for shares in own)
        total += _hop_ns(model, asker, leg, layers, 1)
    return total // 1000


def prefill_us(
    model: CostModel, asker: int, layers: Sequence[Mapping[int, Share]], rows: int
) -> int:
    """Microseconds until a prompt of `rows` tokens has gone through, in chunks of CHUNK_ROWS.

    Devices are busy with different chunks (coeld.datapath.pipeline): the first one takes the whole
    way, each further one as long as the device that has most to do with it.
    """
    full, rest = divmod(rows, CHUNK_ROWS)
    chunks = [CHUNK_ROWS] * full + ([rest] if rest else [])
    way = legs(model, asker, layers)
    busy = {n: _busy_ns(model, asker, way, layers, n) for n in set(chunks)}
    total = sum(busy[chunks[0]].values()) + sum(max(busy[n].values()) for n in chunks[1:])
    return (total + model.head_ns(asker)) // 1000


def _busy_ns(
    model: CostModel,
    asker: int,
    way: Sequence[Run],
    layers: Sequence[Mapping[int, Share]],
    rows: int,
) -> dict[int, int]:
    """What a chunk of a prompt takes at each device whose legs it goes through."""
    found: dict[int, int] = {}
    for leg in way:
        own = layers[leg.first : leg.stop]
        busy = sum(model.chunk_ns(leg.site, shares, rows) for shares in own)
        busy += _hop_ns(model, asker, leg, layers, rows)
        found[leg.site] = found.get(leg.site, 0) + busy
    return found


def _parted(
    layers: Sequence[Mapping[int, Share]],
) -> tuple[list[Run], list[Mapping[int, Share]]]:
    """Runs of whole layers, and the layers in parts."""
    whole = [(layer, next(iter(shares))) for layer, shares in enumerate(layers) if len(shares) == 1]
    return runs(whole), [shares for shares in layers if len(shares) != 1]


# ---- what a device serves as spans ---------------------------------------------------------------


def spans_worth(
    model: CostModel, device: int, whole: Collection[int], now: Collection[int]
) -> set[int]:
    """Of the layers that `device` holds `whole`, those that it should serve as spans.

    `now` are those that it does serve so: a run changes its form only if that gains 5 %.
    """
    found: set[int] = set()
    if not model.spans:
        return found
    site = model.sites.index((device, 0))
    for run in runs((layer, site) for layer in sorted(whole)):
        span, cut = swarm_span_ns(model, site, run.layers), swarm_cut_ns(model, site, run.layers)
        layers = range(run.first, run.stop)
        present = 2 * sum(layer in now for layer in layers) > run.layers
        gain, before = (span - cut, span) if present else (cut - span, cut)
        if present != (gain * 100 > before * SPAN_GAIN_PERCENT):
            found.update(layers)
    return found


def cache_bytes(demand: ModelDemand, layers: int, askers: int) -> int:
    """KV cache of `layers` served as spans to so many askers, beyond the cache of one decoder.

    That one is not part of the budget: a device always needs it for what it is asked itself.
    """
    one = kv_cache_bytes(demand, CACHE_TOKENS, 1)
    return max(0, one * layers * askers // max(1, demand.layers) - one)


def layers_with_caches(demand: ModelDemand, room_bytes: int, askers: int) -> int:
    """How many whole layers fit beside the trunk with their KV caches, so that all can be spans."""
    layer_bytes = max(1, demand.experts * demand.lot_bytes)
    layers = min(demand.layers, room_bytes // layer_bytes)
    while layers and layers * layer_bytes + cache_bytes(demand, layers, askers) > room_bytes:
        layers -= 1
    return layers


def spans_that_fit(
    demand: ModelDemand,
    wanted: Collection[int],
    mine: Collection[int],
    askers: int,
    free_bytes: int,
) -> set[int]:
    """As many of the wanted layers, first those that are `mine` to serve, as their KV caches have
    room for."""
    ranked = sorted(wanted, key=lambda layer: (layer not in mine, layer))
    while ranked and cache_bytes(demand, len(ranked), askers) > free_bytes:
        ranked.pop()
    return set(ranked)


# ---- the way of a request ------------------------------------------------------------------------


class Way:
    """The ways of one asker: `spans` that devices serve (site: the device), layers that are `here`
    whole. A span is run from its first layer to its last, or several on end.

    Devices to `avoid` are taken where there is no other. A layer that is not here may be run here
    with cuts, cheaply if nobody serves it as a span and as the last resort otherwise.
    """

    def __init__(
        self,
        model: CostModel,
        asker: int,
        here: Collection[int],
        spans: Iterable[Run],
        avoid: Collection[int] = (),
    ) -> None:
        self._model, self._asker, self._here = model, asker, here
        self._avoid = avoid
        self._steps: dict[int, list[Run]] = {}
        self._spanned: set[int] = set()
        for span in sorted(set(spans)):
            if span.site != asker:
                self._steps.setdefault(span.first, []).append(span)
                self._spanned.update(range(span.first, span.stop))

    def cheapest(self, before: Sequence[Run] = ()) -> list[Run]:
        """Legs through all layers. `before` is the way so far: it is kept while it is possible and
        no other gains 5 %, because the KV caches of requests lie along it."""
        best: list[dict[int, tuple[int, tuple[Run, ...]]]]
        best = [{} for _ in range(self._model.demand.layers + 1)]
        best[0][self._asker] = (0, ())
        for layer, ends in enumerate(best[:-1]):
            for step in (Run(self._asker, layer, layer + 1), *self._steps.get(layer, ())):
                busy, hop = self._busy(step), self._hop(step)
                costs = [
                    (cost + busy + (hop if step.site != last else 0), (*path, step))
                    for last, (cost, path) in ends.items()
                ]
                found = best[step.stop]
                found[step.site] = min([*costs, found.get(step.site, (_NEVER, ()))])
        cost, path = min(best[-1].values())
        kept = self._price(before)
        if kept is not None and kept * (100 - SPAN_GAIN_PERCENT) <= cost * 100:
            return list(before)
        return runs((layer, step.site) for step in path for layer in range(step.first, step.stop))

    def _hop(self, step: Run) -> int:
        """What it costs to reach a step from another device's."""
        if step.site == self._asker:
            return 0
        return self._model.reached(self._asker, self._model.sites.index((step.site, 0)))

    def _busy(self, step: Run) -> int:
        model, device = self._model, step.site
        one = model.attention_ns(device) + model.whole_ns(model.sites.index((device, 0)))
        if device != self._asker:
            return step.layers * one + (_AVOIDED if device in self._avoid else 0)
        if step.first in self._here:
            return one
        return _NOT_HERE if step.first in self._spanned else model.attention_ns(device)

    def _price(self, legs: Sequence[Run]) -> int | None:
        """What a way costs, None if it does not lead through all layers (any more)."""
        total, at, last = 0, 0, self._asker
        for leg in legs:
            if leg.first != at:
                return None
            while at < leg.stop:
                step = Run(self._asker, at, at + 1)
                if leg.site != self._asker:
                    found = [s for s in self._steps.get(at, ()) if s.site == leg.site]
                    if not found:
                        return None
                    step = found[0]
                total += self._busy(step) + (self._hop(step) if step.site != last else 0)
                at, last = step.stop, step.site
            if at != leg.stop:
                return None
        return total if at == self._model.demand.layers else None


_AVOIDED: Final = 10**12
_NOT_HERE: Final = 10**15
_NEVER: Final = 1 << 62
