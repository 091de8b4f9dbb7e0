"""Which copies of weights a full disk lets go. Pure.

Only copies of what others hold for certain: who serves a lot has read it from its own disk and does
not delete it while it serves. So nothing goes that this device serves, loads or claims, and nothing
that no other device serves, even if the disk then stays too full. What two others serve goes before
what one serves (two holders where disks allow), and among equals what this device would have
fetched last, an order of its own, so that disks too small for everything keep different parts.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from coeld.ids import Lot, NodeId
from coeld.messages import Record


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the swarm does with the model's lots, as far as records tell."""

    kept: Collection[Lot]
    """Lots that this disk is needed for: served, loading or claimed here."""
    servers: Mapping[Lot, int]
    """How many devices with other disks serve a lot; not named: none."""

    def copies(self, lots: Iterable[Lot]) -> int:
        """How often the least held of these lots is certainly on other disks."""
        return min(self.servers.get(lot, 0) for lot in lots)


def wanted(
    ours: Iterable[Lot], records: Iterable[Record], suspects: Collection[NodeId], host: str
) -> Wanted:
    """What `records` tell of lots on disks, beside `ours`. Devices at one address, `host`, may
    share a store: their needs count as ours, their copies do not."""
    kept, others = set(ours), Counter[Lot]()
    for record in records:
        if record.blob_host == host:
            kept.update(record.serving, (claim.lot for claim in record.claims))
        elif record.origin not in suspects:
            others.update(record.serving)
    return Wanted(kept, others)


@dataclass(frozen=True, slots=True)
class Blob:
    """Weights of experts that are on this disk; equal experts share a blob."""

    sha256: str
    bytes: int
    lots: Sequence[Lot]


def to_delete(blobs: Iterable[Blob], wanted: Wanted, excess_bytes: int) -> list[Blob]:
    """Blobs to delete, in this order, so that `excess_bytes` become free, or as many as may.

    `blobs` come in the order in which this device wants them, the dearest first.
    """
    ranked = sorted(
        (-wanted.copies(blob.lots), -place, blob)
        for place, blob in enumerate(blobs)
        if not any(lot in wanted.kept for lot in blob.lots)
    )
    chosen: list[Blob] = []
    for copies, _place, blob in ranked:
        if excess_bytes <= 0 or copies == 0:
            break
        chosen.append(blob)
        excess_bytes -= blob.bytes
    return chosen
