"""Records: one per device, written by it alone, spread until everybody holds the newest. Pure.

Merging keeps the record with the larger (incarnation, seq): commutative, associative, idempotent,
so loss, repetition and any order are harmless. Versions travel ahead of records: whoever sees that
it is behind asks one of those who are ahead, and nobody is told what nobody missed (Scuttlebutt
reconciliation: van Renesse et al., 2008).
"""

from collections.abc import Iterable

from coeld.ids import ModelHash
from coeld.messages import (
    ENTRIES_MAX,
    LOTS_PER_DELTA_MAX,
    MESSAGE_BYTES_MAX,
    RECORDS_MAX,
    Entry,
    Record,
    Status,
)
from coeld.perception.fingerprint import part_of
from coeld.perception.membership import precedence
from coeld.releases import Progress, Release

DELTA_BYTES_MAX = MESSAGE_BYTES_MAX - 1024  # beside its head

Version = tuple[int, int]
NOTHING: Version = (0, 0)


def version(what: Record | Entry) -> Version:
    return what.incarnation, what.seq


def newer(fresh: Record, held: Record | None) -> bool:
    """Does `fresh` replace `held`?

    Equal versions with different content come only from two devices with one identity; the larger
    content wins, so that even then everybody ends up with the same.
    """
    if held is None or version(fresh) != version(held):
        return held is None or version(fresh) > version(held)
    return fresh != held and fresh.to_json() > held.to_json()


def parcels(records: Iterable[Record]) -> list[tuple[Record, ...]]:
    """Records in groups that each fit into one message. One that does not even fit alone, which no
    honest device writes, is not passed on."""
    groups: list[list[Record]] = []
    room = lots_room = 0
    for record in records:
        size, lots = len(record.to_json()) + 1, len(record.claims) + len(record.serving)
        if size > DELTA_BYTES_MAX:
            continue
        if not groups or size > room or lots > lots_room or len(groups[-1]) >= RECORDS_MAX:
            groups.append([])
            room, lots_room = DELTA_BYTES_MAX, LOTS_PER_DELTA_MAX
        groups[-1].append(record)
        room, lots_room = room - size, lots_room - lots
    return [tuple(group) for group in groups]


def market(record: Record) -> tuple[object, ...]:
    """What the auction looks at."""
    return (
        record.incarnation,
        record.model,
        record.claims,
        record.memory_budget_bytes,
        record.kernel_mb_per_s,
        record.row_mb_per_s,
        record.cut_us,
        record.sparing,
        record.asked,
        record.stays_wide,
        record.links,
        record.probed,
    )


def supply(record: Record) -> tuple[object, ...]:
    """What routes and links are made of."""
    return (
        record.incarnation,
        record.model,
        record.serving,
        record.spans,
        record.narrow,
        record.data_host,
        record.data_port,
        record.mqtt_host,
        record.mqtt_port,
    )


def marks(record: Record) -> tuple[object, ...]:
    """Which route table it uses, and how far it is from one version of the model to the next."""
    return record.epoch, record.fingerprint, record.versions


def holders(records: Iterable[Record]) -> list[tuple[ModelHash, str, int]]:
    """Which models each device has, and where it serves its blobs."""
    held: list[tuple[ModelHash, str, int]] = []
    for record in records:
        if record.blob_port:
            models = [record.model] if record.model else []
            models += [release.model for release in _ready(record)]
            held += [(model, record.blob_host, record.blob_port) for model in models]
    return held


def releases(records: Iterable[Record], name: str) -> list[tuple[Release, str, int]]:
    """Which versions of a model each device has, and where it serves their blobs."""
    found: list[tuple[Release, str, int]] = []
    for record in records:
        if record.versions.name == name and record.blob_port:
            opened = [Release(record.versions.version, record.model)] if record.model else []
            had = [*opened, *_ready(record)]
            found += [(release, record.blob_host, record.blob_port) for release in had]
    return found


def _ready(record: Record) -> list[Release]:
    """The next version, if it is on the device's disk."""
    versions = record.versions
    return [versions.next] if versions.next and versions.progress is Progress.READY else []


def improves(ours: Entry, theirs: Entry | None) -> bool:
    """Would whoever showed `theirs` learn from `ours`? A later heartbeat alone is no news."""
    if theirs is None or version(ours) > version(theirs):
        return True
    return ours.status != theirs.status and precedence(*_state(ours)) > precedence(*_state(theirs))


def _state(entry: Entry) -> tuple[int, int, Status]:
    return entry.incarnation, entry.heartbeat, entry.status


def sections(
    entries: Iterable[Entry], parts: int, differing: Iterable[int]
) -> list[tuple[list[int], list[Entry]]]:
    """Entries grouped by part, in groups of whole parts of at most ENTRIES_MAX entries."""
    inside: dict[int, list[Entry]] = {part: [] for part in differing}
    for entry in entries:
        inside[part_of(entry.node, parts)].append(entry)
    groups: list[tuple[list[int], list[Entry]]] = []
    for part, found in inside.items():
        if not groups or len(groups[-1][1]) + len(found) > ENTRIES_MAX:
            groups.append(([], []))
        groups[-1][0].append(part)
        groups[-1][1].extend(found[:ENTRIES_MAX])
    return groups
