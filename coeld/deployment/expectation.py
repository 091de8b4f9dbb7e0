"""What a token should take at one device along its present routes, to hold against what it took.

The sum of the cost model (coeld.deployment.cost), layer by layer as requests run: legs elsewhere,
layers fused here, cuts to whoever is asked for their lots. Each part costs what this device has
learned of it (coeld.datapath.costs) or, where it has decoded nothing that would tell, what the
devices told of themselves and their links. Pure.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from coeld.deployment.cost import CostModel, Device, Link, Share, Tier
from coeld.deployment.popularity import observed
from coeld.deployment.supply import facts_among
from coeld.errors import FrameError
from coeld.ids import Lot, NodeId
from coeld.messages import Record
from coeld.routes import Leg, RouteTable
from coeld.view import ModelDemand

Learned = Mapping[tuple[str, str], int]
"""Nanoseconds by kind of part and device, "" for the one that has learned it."""
PAYLOAD_MB_PER_S: Final = 10**9
"""What was learned of reaching a device has the payload in it."""


def learned(rows: Iterable[Any]) -> dict[tuple[str, str], int]:
    """From what an engine said: rows [kind, device or "", microseconds]. Raises FrameError."""
    try:
        return {(str(kind), str(node)): round(us * 1000) for kind, node, us in rows}
    except (TypeError, ValueError) as exc:
        raise FrameError(f"costs of an engine are malformed: {exc}") from exc


def expected_us(
    demand: ModelDemand,
    table: RouteTable,
    me: NodeId,
    records: Iterable[Record],
    costs: Learned,
) -> int | None:
    """Microseconds per decoded token of one request at `me`; None: a lot has no owner, or a leg
    leads to a device that cannot be called."""
    there = [record for record in records if record.origin == me or record.data_port]
    demand = observed(demand, there)
    told = facts_among(demand, there).model()
    index = {device.node: i for i, device in enumerate(told.devices)}
    if me not in index or any(not set(nodes) & index.keys() for nodes in table.owners.values()):
        return None
    if len(table.owners) < demand.layers * demand.experts:
        return None
    if any(leg.node not in index for leg in table.legs):
        return None
    return _Expectation(demand, table, me, told, costs).token_ns() // 1000


class _Expectation:
    def __init__(
        self, demand: ModelDemand, table: RouteTable, me: NodeId, told: CostModel, costs: Learned
    ) -> None:
        self._demand, self._table, self._me, self._told, self._costs = (
            demand,
            table,
            me,
            told,
            costs,
        )
        self._index = {device.node: i for i, device in enumerate(told.devices)}
        devices = [self._device(device) for device in told.devices]
        self._model = CostModel(demand, devices, self._link)

    def token_ns(self) -> int:
        here = self._cost("head", self._told.head_ns(self._index[self._me]))
        legs = self._table.legs or (Leg(self._me, 0, self._demand.layers),)
        return here + self._cost("token", 0) + sum(map(self._leg_ns, legs))

    def _leg_ns(self, leg: Leg) -> int:
        layers = range(leg.first, leg.stop)
        if leg.node == self._me:
            return sum(map(self._layer_ns, layers))
        one = self._whole_ns(leg.node)
        told = self._told.reach_ns(self._index[self._me], self._index[leg.node])
        return len(layers) * one + self._cost("reach", told, leg.node)

    def _layer_ns(self, layer: int) -> int:
        """A layer whose attention runs here."""
        table, me = self._table, self._me
        alone = all(node == me for node in table.addresses)
        spanned = any(s.node == me and s.first <= layer < s.stop for s in table.spans)
        shares = self._shares(layer)
        if (alone or spanned) and shares.keys() == {self._index[me]}:
            return self._whole_ns("")
        here = self._index[me]
        attention = self._cost("attention", self._told.attention_ns(here))
        total = attention + self._cost("cut", self._told.devices[here].cut_us * 1000)
        if shares.keys() == {here}:
            total += self._model.devices[here].call_us * 1000
        return total + self._model.layer_ns(here, shares)

    def _shares(self, layer: int) -> dict[int, Share]:
        """Who is asked for how much of a layer, as coeld.datapath.dispatch asks: whoever serves
        all of it, this device first; else this device for what is here, the first owner for the
        rest."""
        owners = {lot: self._owners(lot) for lot in self._demand.lots_of(layer)}
        first, *rest = owners.values()
        whole = [node for node in first if all(node in nodes for nodes in rest)]
        found: dict[int, Share] = {}
        for lot, nodes in owners.items():
            site = self._index[(whole or nodes)[0]]
            before, more = found.get(site, Share(0, 0)), self._model.share(lot)
            found[site] = Share(before.uses + more.uses, before.bytes_used + more.bytes_used)
        return found

    def _owners(self, lot: Lot) -> Sequence[NodeId]:
        """This device first."""
        nodes = [node for node in self._table.owners_of(lot) if node in self._index]
        return sorted(nodes, key=lambda node: node != self._me)

    # ---- parts -----------------------------------------------------------------------------

    def _cost(self, kind: str, otherwise: int, node: str = "") -> int:
        return self._costs.get((kind, node), otherwise)

    def _whole_ns(self, node: NodeId | str) -> int:
        """A layer with its lots where it runs in one graph."""
        device = self._index[NodeId(node or self._me)]
        told = self._told.attention_ns(device) + self._told.whole_ns(device)
        return self._cost("layer", told, node)

    def _device(self, device: Device) -> Device:
        """With the speed that its lots were learned to have."""
        node = "" if device.node == self._me else device.node
        (tier,) = device.tiers
        lot_ns = self._cost("lot", tier.lot_ns(self._demand.lot_bytes), node)
        speed = max(1, self._demand.lot_bytes * 1000 // max(1, lot_ns))
        call_us = self._cost("call", device.call_us * 1000, node) // 1000
        fast = Tier(tier.name, tier.memory_bytes, speed)
        return Device(device.node, (fast,), device.queue_us, device.weight, call_us, cut_us=0)

    def _link(self, a: NodeId, b: NodeId) -> Link:
        learned_ns = self._costs.get(("reach", b)) if a == self._me else None
        told = self._told.links(a, b)
        return told if learned_ns is None else Link(learned_ns // 1000, PAYLOAD_MB_PER_S)
