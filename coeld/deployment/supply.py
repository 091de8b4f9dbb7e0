"""What the market knows of the devices, from what they say of themselves. Pure.

A proposal must come out alike at all devices, so it depends on gossiped records alone. Measured
figures in them are steps, not wobbling numbers (coeld.perception.resources). When more devices
hold the model than are needed for it twice, the fastest are considered and the others only bid;
so does a device that is far slower than those that suffice. Of the others, those that are asked for
much count as askers: where lots should be depends on who asks.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final

from coeld.deployment.cost import CUT_US, LAN, Device, Link, Tier
from coeld.deployment.popularity import observed, weight
from coeld.deployment.pricing import capacity
from coeld.deployment.proposal import Facts, tie
from coeld.deployment.widths import must_narrow, narrow_capacity
from coeld.measured import MeasuredLink
from coeld.messages import Record
from coeld.view import ModelDemand

CONSIDERED_MAX: Final = 64
"""Devices in a proposal."""
ENOUGH: Final = 2
"""Times the model's lots: room beyond this is not considered."""
UNNEEDED: Final = 5
"""Times slower than the slowest of those that have room for the model: such a device only bids."""
SPARING: Final = 16
"""How much slower a device on a low battery counts: it takes what nobody else can."""


def facts_of(demand: ModelDemand, records: Iterable[Record], spans: bool = True) -> Facts:
    """The facts behind a proposal, from the records of the devices that have the model open."""
    everybody = list(records)
    chosen = considered(demand, everybody)
    known = {record.origin for record in chosen}
    rest = [(-weight(r.asked.rates), r.origin, r) for r in everybody if r.origin not in known]
    askers = [
        replace(record, memory_budget_bytes=0)
        for negative, _, record in sorted(rest)[: CONSIDERED_MAX - len(chosen)]
        if negative < -1
    ]
    return facts_among(observed(demand, everybody), [*chosen, *askers], spans)


def facts_among(demand: ModelDemand, records: Iterable[Record], spans: bool = True) -> Facts:
    """The facts about exactly these devices."""
    some = sorted(records, key=lambda record: record.origin)
    rooms = [max(0, record.memory_budget_bytes - demand.trunk_bytes) for record in some]
    narrow = not any(record.stays_wide for record in some) and must_narrow(demand, rooms)
    devices = tuple(
        _device(record, room if narrow else _lots_bytes(record, demand))
        for record, room in zip(some, rooms, strict=True)
    )
    measured = all(record.probed for record in some)
    return Facts(demand, devices, links_among(some), spans=spans, narrow=narrow, measured=measured)


def links_among(records: Sequence[Record]) -> tuple[tuple[Link, ...], ...]:
    """From each device (row) to each other; LAN where nobody told of the link."""
    index = {record.origin: i for i, record in enumerate(records)}
    told = {
        (i, index[link.node]): link
        for i, record in enumerate(records)
        for link in record.links
        if link.node in index
    }
    rows = [[LAN] * len(records)] * len(records)
    if told:
        rows = [list(row) for row in rows]
    for i, j in told:
        for a, b in ((i, j), (j, i)):
            rows[a][b] = both_ways(told.get((a, b)), told.get((b, a))) or LAN
    return tuple(map(tuple, rows))


def both_ways(out: MeasuredLink | None, back: MeasuredLink | None) -> Link | None:
    """The link of a device that measured `out`, to one that measured `back`. The round trip is the
    asker's own if it knows one; bandwidth is the mean of both directions. None: nobody knows."""
    one, other = out or back, back or out
    if one is None or other is None:
        return None
    rate = 2 * one.mb_per_s * other.mb_per_s // (one.mb_per_s + other.mb_per_s)
    return Link(one.rtt_us, rate)


def considered(demand: ModelDemand, records: Iterable[Record]) -> list[Record]:
    """Whom a proposal may give lots: the fastest, until there is room enough.

    Where the fast ones have room for the model, be it in fewer bits, who is far slower could only
    make it slower: with its room whole layers might fit where parts did, or lots as they are
    stored, and be placed at it.
    """
    ranked = sorted(records, key=lambda r: (-_speeds(r)[0], -tie(r.origin, 0), r.origin))
    lots, rooms, least_rooms = demand.layers * demand.experts, 0, 0
    least = capacity if any(record.stays_wide for record in ranked) else narrow_capacity
    chosen: list[Record] = []
    for record in ranked[:CONSIDERED_MAX]:
        if rooms >= ENOUGH * lots and len(chosen) >= ENOUGH:
            break
        suffices = max(rooms, least_rooms) >= lots and chosen
        if suffices and UNNEEDED * _speeds(record)[0] < _speeds(chosen[-1])[0]:
            break
        chosen.append(record)
        rooms += capacity(record.memory_budget_bytes, demand)
        least_rooms += least(record.memory_budget_bytes, demand)
    return chosen


def _device(record: Record, room_bytes: int) -> Device:
    tier = Tier("ram", room_bytes, *_speeds(record))
    cut_us = record.cut_us or CUT_US
    return Device(record.origin, (tier,), weight=weight(record.asked.rates), cut_us=cut_us)


def _lots_bytes(record: Record, demand: ModelDemand) -> int:
    """What fits beside the trunk, in whole lots."""
    return capacity(record.memory_budget_bytes, demand) * demand.lot_bytes


def _speeds(record: Record) -> tuple[int, int]:
    """In decode, and with many rows (0: unknown), at the price of a device's energy."""
    price = SPARING if record.sparing else 1
    return record.kernel_mb_per_s // price, record.row_mb_per_s // price


def trunk_complaint(demand: ModelDemand | None, budget_bytes: int) -> str:
    """What to say when not even the trunk fits; it is loaded all the same, to answer with."""
    if demand is None or budget_bytes >= demand.trunk_bytes:
        return ""
    return (
        f"the memory budget of {budget_bytes} bytes is smaller than what {demand.name} needs on"
        f" every device that answers ({demand.trunk_bytes} bytes, held anyway): this device takes"
        " no experts. Raise memory.budget_mb"
    )
