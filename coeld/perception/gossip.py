"""Records: one per device, written by it alone, spread until everybody holds the newest. Pure.

Merging keeps the record with the larger (incarnation, seq): commutative, associative, idempotent,
so loss, repetition and any order are harmless. A digest names the versions that its sender holds
(Scuttlebutt reconciliation: van Renesse et al., 2008); whoever sees that it is behind asks one of
those who are ahead, and nobody is told what nobody missed.
"""

from collections.abc import Iterable, Mapping
from dataclasses import astuple

from coeld.ids import NodeId
from coeld.messages import RECORDS_MAX, DigestEntry, Record

DELTA_BYTES_MAX = 200 * 1024  # estimated; leaves room below MESSAGE_BYTES_MAX
RECORD_BYTES = 700
LOT_BYTES = 40  # more than one run of one lot takes

Version = tuple[int, int]
NOTHING: Version = (0, 0)  # a digest shows seq 0 for a device of which it has no record


def version(record: Record) -> Version:
    return record.incarnation, record.seq


def newer(fresh: Record, held: Record | None) -> bool:
    """Does `fresh` replace `held`?

    Equal versions with different content come only from two devices with one identity; the larger
    content wins, so that even then everybody ends up with the same.
    """
    if held is None or version(fresh) != version(held):
        return held is None or version(fresh) > version(held)
    return fresh != held and repr(astuple(fresh)) > repr(astuple(held))


def behind(
    entries: Iterable[DigestEntry], held: Mapping[NodeId, Record], me: NodeId
) -> dict[NodeId, Version]:
    """Devices of which a digest shows newer records than `held`, with the version there."""
    return {
        entry.node: (entry.incarnation, entry.seq)
        for entry in entries
        if entry.node != me
        and entry.seq > 0
        and (entry.incarnation, entry.seq)
        > (version(held[entry.node]) if entry.node in held else NOTHING)
    }


def ahead(entries: Iterable[DigestEntry], held: Mapping[NodeId, Record]) -> list[Record]:
    """Records that are newer here than a digest shows."""
    shown = {entry.node: (entry.incarnation, entry.seq) for entry in entries}
    return [
        record
        for origin, record in sorted(held.items())
        if version(record) > shown.get(origin, NOTHING)
    ]


def parcels(records: Iterable[Record]) -> list[tuple[Record, ...]]:
    """Records in groups that each fit into one message."""
    groups: list[list[Record]] = []
    room = 0
    for record in records:
        size = RECORD_BYTES + LOT_BYTES * (len(record.claims) + len(record.serving))
        if not groups or size > room or len(groups[-1]) >= RECORDS_MAX:
            groups.append([])
            room = DELTA_BYTES_MAX
        groups[-1].append(record)
        room -= size
    return [tuple(group) for group in groups]
