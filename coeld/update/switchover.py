"""From who serves what to the route table, with an epoch that devices agree on. Pure.

Owners of a lot are the present devices that serve it and hold the same model: this device first
if it is one, then the auction's owner, suspects last. That order is local and may differ between
devices; the *set* of owners may not, once news has spread. Its fingerprint is gossiped with the
epoch, and a device that reaches content which another already announced under a later epoch
takes that epoch over, else it goes one beyond every epoch it knows. So epochs only grow on each
device, and equal content ends under one number without anybody being in charge.

Spans are announced by those who serve them and belong to that content. The way that this device's
own requests take (legs) does not; nor does it when this device stops to answer single calls for a
layer in its own spans, which its own table tells by naming it (coeld.update.spanning).
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from coeld.ids import Lot, NodeId
from coeld.messages import COUNTER_MAX, Record
from coeld.routes import OWNERS_PER_LOT_MAX, Leg, RouteTable
from coeld.view import ModelDemand

FINGERPRINT_CHARS = 16


class _Content(NamedTuple):
    """What a table says of the swarm, and the fingerprint of that."""

    owners: dict[Lot, tuple[NodeId, ...]]
    addresses: dict[NodeId, tuple[str, int]]
    spans: list[Leg]
    narrow: tuple[int, ...]
    fingerprint: str


class Switchover:
    """The table in use; `table` is None until there is a model."""

    def __init__(self, me: NodeId) -> None:
        self.me = me
        self.table: RouteTable | None = None
        self.fingerprint = ""
        self.epoch = 0
        self._resend = False
        self._seen: object = None
        self._content: _Content | None = None
        """What was last made of what was `_seen`."""

    def forget(self) -> None:
        """A new engine knows no table: hand it over again even if nothing changed."""
        self._resend = True

    def update(
        self,
        demand: ModelDemand,
        records: Sequence[Record],
        suspects: Collection[NodeId],
        winners: Mapping[Lot, NodeId],
        missing_bytes: int,
        closed: Sequence[tuple[int, int]] = (),
        find_legs: Callable[[Sequence[Leg]], tuple[Leg, ...]] = lambda _: (),
    ) -> RouteTable | None:
        """The new table if it differs from the one in use, by content or epoch.

        `records` are those of all present devices; `winners` the owners the auction chose. Every
        device with the model gets an address, owner or not: it may call as a decoder. `closed` are
        own spans that may be one graph; `find_legs` finds the way through given spans.
        """
        serving = [record for record in records if record.model == demand.model]
        told = [(r.origin, r.serving, r.spans, r.narrow, r.data_host, r.data_port) for r in serving]
        seen = demand, told, suspects, winners, missing_bytes
        if self._content is None or self._seen != seen:
            owners = self._owners(demand, serving, suspects, winners)
            self._seen, self._content = seen, _content(demand, serving, owners, missing_bytes)
        owners, addresses, spans, narrow, fingerprint = self._content
        epoch = self._agree(fingerprint, serving)
        self.fingerprint = fingerprint
        mine = [Leg(self.me, *span) for span in closed]
        known = sorted([*mine, *(span for span in spans if span.node != self.me)])
        legs = find_legs(spans)
        return self._swap(
            RouteTable(
                demand.model, epoch, owners, addresses, missing_bytes, legs, tuple(known), narrow
            )
        )

    def agreed(self, records: Sequence[Record]) -> bool:
        """Do all devices with the model announce a table with the content of this one?"""
        table = self.table
        return table is not None and all(
            r.fingerprint == self.fingerprint
            for r in records
            if r.model == table.model and r.origin != self.me
        )

    def agree(self, demand: ModelDemand, records: Sequence[Record]) -> RouteTable | None:
        """The cheaper question when only the epochs of others changed: the table with theirs."""
        if self.table is None:
            return None
        serving = [record for record in records if record.model == demand.model]
        return self._swap(replace(self.table, epoch=self._agree(self.fingerprint, serving)))

    def _swap(self, table: RouteTable) -> RouteTable | None:
        if table == self.table and not self._resend:
            return None
        self.table, self.epoch, self._resend = table, table.epoch, False
        return table

    def _owners(
        self,
        demand: ModelDemand,
        records: Sequence[Record],
        suspects: Collection[NodeId],
        winners: Mapping[Lot, NodeId],
    ) -> dict[Lot, tuple[NodeId, ...]]:
        found: dict[Lot, list[NodeId]] = {}
        for record in records:
            for lot in record.serving:
                if lot.layer < demand.layers and lot.expert < demand.experts:
                    found.setdefault(lot, []).append(record.origin)

        def order(lot: Lot, node: NodeId) -> tuple[bool, bool, bool, NodeId]:
            return node != self.me, node in suspects, winners.get(lot) != node, node

        for lot, nodes in found.items():
            if len(nodes) > 1:
                nodes.sort(key=partial(order, lot))
        return {lot: tuple(nodes[:OWNERS_PER_LOT_MAX]) for lot, nodes in found.items()}

    def _agree(self, fingerprint: str, records: Sequence[Record]) -> int:
        same = [r.epoch for r in records if r.fingerprint == fingerprint and r.epoch > self.epoch]
        if same:
            return max(same)
        if fingerprint == self.fingerprint:
            return self.epoch
        return min(COUNTER_MAX, 1 + max([self.epoch, *(record.epoch for record in records)]))


def _content(
    demand: ModelDemand,
    records: Sequence[Record],
    owners: dict[Lot, tuple[NodeId, ...]],
    missing_bytes: int,
) -> _Content:
    addresses = {record.origin: (record.data_host, record.data_port) for record in records}
    spans, narrow = _spans(demand, records), _narrow(demand, records)
    fingerprint = _fingerprint(demand, owners, addresses, missing_bytes, spans, narrow)
    return _Content(owners, addresses, spans, narrow, fingerprint)


def _spans(demand: ModelDemand, records: Sequence[Record]) -> list[Leg]:
    """Announced spans of layers that exist, as far as their devices serve them whole."""
    found = []
    for record in records:
        if record.spans:
            served = Counter(lot.layer for lot in record.serving if lot.expert < demand.experts)
            whole = {layer for layer, lots in served.items() if lots == demand.experts}
            found += [
                Leg(record.origin, *span)
                for span in record.spans
                if span[1] <= demand.layers and whole.issuperset(range(*span))
            ]
    return sorted(found)


def _narrow(demand: ModelDemand, records: Sequence[Record]) -> tuple[int, ...]:
    """Layers of which somebody holds something, or soon will, in fewer bits than stored."""
    layers = {layer for r in records for run in r.narrow for layer in range(*run)}
    return tuple(sorted(layer for layer in layers if layer < demand.layers))


def _fingerprint(
    demand: ModelDemand,
    owners: Mapping[Lot, tuple[NodeId, ...]],
    addresses: Mapping[NodeId, tuple[str, int]],
    missing_bytes: int,
    spans: Sequence[Leg],
    narrow: Sequence[int],
) -> str:
    """16 hex digits over what must be the same everywhere: sets of owners, without their order."""
    content = [
        demand.model,
        [[*lot, *sorted(nodes)] for lot, nodes in sorted(owners.items())],
        sorted(addresses.items()),
        missing_bytes,
        spans,
        *([narrow] if narrow else []),
    ]
    text = json.dumps(content, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:FINGERPRINT_CHARS]
