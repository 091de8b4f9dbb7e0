"""This device's part in spans: which layers to serve so, and which way its own requests take. Pure.

Prices are those of the market (coeld.deployment.chains) on the facts of the devices concerned.
Unlike a proposal this is nobody else's business: others read in the record what is served, and
ways are never told. So they may follow a suspicion, and stay as they are while little is gained.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from coeld.deployment.chains import Run, Way, cache_bytes, spans_that_fit, spans_worth
from coeld.deployment.cost import CostModel
from coeld.deployment.pricing import capacity
from coeld.deployment.proposal import Facts
from coeld.deployment.supply import CONSIDERED_MAX, facts_among
from coeld.ids import Lot, NodeId
from coeld.messages import Record
from coeld.routes import Leg
from coeld.view import ModelDemand


class OwnSpans:
    """Remembers the model of prices and the way so far."""

    def __init__(self, me: NodeId) -> None:
        self.me = me
        self._facts: Facts | None = None
        self._model: CostModel | None = None
        self._before: tuple[Leg, ...] = ()
        self._asked: object = None
        """What the way so far was found for."""

    def wanted(
        self,
        facts: Facts,
        records: Sequence[Record],
        winners: Mapping[Lot, NodeId],
        now: Collection[int],
        held_bytes: int,
    ) -> frozenset[int]:
        """Of the layers that are here whole, those to serve as spans; `now` are already. Not those
        that the auction put in parts: their other owners could not be called for them. No more
        than have room for their KV caches beside lots of `held_bytes`. None while another device's
        requests may be longer than the context here: they could not end on that way, and single
        calls fit requests of any length."""
        demand = facts.demand
        me = next(record for record in records if record.origin == self.me)
        if any(record.context_tokens > me.context_tokens for record in records):
            return frozenset()
        if all(device.node != self.me for device in facts.devices):
            known = {device.node for device in facts.devices} | {self.me}
            some = (record for record in records if record.origin in known)
            facts = facts_among(demand, some, facts.spans)
        device = [device.node for device in facts.devices].index(self.me)
        owned = _owners(winners)
        torn = {layer for layer, nodes in owned.items() if len(nodes) > 1}
        mine = {layer for layer, nodes in owned.items() if nodes == {self.me}}
        whole = whole_layers(demand, me.serving) - torn
        found = spans_worth(facts.model(), device, whole, now)
        free_bytes = me.memory_budget_bytes - demand.trunk_bytes - held_bytes
        return frozenset(spans_that_fit(demand, found, mine, len(records), free_bytes))

    def borders(self, winners: Mapping[Lot, NodeId]) -> frozenset[int]:
        """Where the auction's owner changes: no span crosses it, so that others who hold what is on
        one side of it need not have it run again."""
        owned = _owners(winners)
        return frozenset(layer for layer in owned if owned[layer] != owned.get(layer - 1))

    def legs(
        self,
        demand: ModelDemand,
        records: Sequence[Record],
        suspects: Collection[NodeId],
        here: Collection[int],
        spans: Sequence[Leg],
    ) -> tuple[Leg, ...]:
        """The cheapest way through all layers; empty: every layer's attention here.

        Layers that are not whole `here`, to stay, and that somebody serves as a span must be asked
        there.
        """
        if all(span.node == self.me for span in spans):
            self._before, self._asked = (), None
            return ()
        facts = self._facts_of(demand, records, spans)
        here = whole_layers(demand, next(r for r in records if r.origin == self.me).serving)
        if self._asked != (facts, here, suspects, spans):
            self._asked = facts, here, suspects, spans
            self._before = self._way(facts, here, suspects, spans)
        return self._before if any(leg.node != self.me for leg in self._before) else ()

    def _way(
        self,
        facts: Facts,
        here: Collection[int],
        suspects: Collection[NodeId],
        spans: Sequence[Leg],
    ) -> tuple[Leg, ...]:
        assert self._model is not None
        index = {device.node: i for i, device in enumerate(facts.devices)}
        ways = Way(
            self._model,
            index[self.me],
            here,
            [Run(index[s.node], s.first, s.stop) for s in spans if s.node in index],
            {index[node] for node in suspects if node in index},
        )
        before = [Run(index.get(leg.node, -1), leg.first, leg.stop) for leg in self._before]
        return tuple(
            Leg(facts.devices[run.site].node, run.first, run.stop) for run in ways.cheapest(before)
        )

    def _facts_of(
        self, demand: ModelDemand, records: Sequence[Record], spans: Sequence[Leg]
    ) -> Facts:
        nodes = {span.node for span in spans} - {self.me}
        ranked = sorted(
            (r for r in records if r.origin in nodes), key=lambda r: (-r.kernel_mb_per_s, r.origin)
        )
        mine = [record for record in records if record.origin == self.me]
        facts = facts_among(demand, [*mine, *ranked[:CONSIDERED_MAX]])
        if facts != self._facts:
            self._facts, self._model = facts, facts.model()
        return facts


def roomy(model: CostModel, me: Record, owners: Mapping[Lot, NodeId]) -> int:
    """How many lots to claim at most: the KV caches of layers that a proposal would have this
    device serve as spans need room too, before replicas do."""
    demand, budget_bytes = model.demand, me.memory_budget_bytes
    mine = [lot for lot, node in owners.items() if node == me.origin]
    device = {d.node: i for i, d in enumerate(model.devices)}.get(me.origin)
    if device is not None:
        layers = spans_worth(model, device, whole_layers(demand, mine), ())
        budget_bytes -= cache_bytes(demand, len(layers), len(model.askers))
    return max(capacity(budget_bytes, demand), len(mine))


def _owners(winners: Mapping[Lot, NodeId]) -> dict[int, set[NodeId]]:
    found: dict[int, set[NodeId]] = {}
    for lot, node in winners.items():
        found.setdefault(lot.layer, set()).add(node)
    return found


def whole_layers(demand: ModelDemand, lots: Iterable[Lot]) -> set[int]:
    """Layers of which all lots are there."""
    counts = Counter(lot.layer for lot in lots)
    return {layer for layer, count in counts.items() if count >= demand.experts}
