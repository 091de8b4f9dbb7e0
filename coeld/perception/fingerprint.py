"""All that a device knows of the swarm, as numbers that are equal when the knowledge is. Pure.

Each present device contributes a hash of (id, incarnation, seq of its record, status); their sum
modulo 2^64 is the fingerprint of the view. It changes in constant time, does not depend on order,
and two devices compare what they know of a thousand others in 16 characters. When it differs, sums
over parts of the ids show where, so that only those parts are named (a hash tree of two levels).
"""

import hashlib
from functools import lru_cache

from coeld.ids import NodeId
from coeld.messages import PARTS_MAX, Status

PART_DEVICES = 16
"""About how many devices to name for a part that differs; fewer parts cost less to compare."""
_MASK = 2**64 - 1


@lru_cache(maxsize=65536)
def _share(node: NodeId, incarnation: int, seq: int, status: Status) -> int:
    text = f"{node}/{incarnation}/{seq}/{status:d}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def part_of(node: NodeId, parts: int) -> int:
    """In which of `parts` (a power of two up to PARTS_MAX) a device is."""
    return int(node[:2], 16) * parts // PARTS_MAX


def parts_for(devices: int) -> int:
    """Into how many parts a view of so many devices is best cut."""
    parts = 1
    while parts < PARTS_MAX and parts * PART_DEVICES < devices:
        parts *= 2
    return parts


class Fingerprints:
    """Of the present devices, this one included."""

    def __init__(self) -> None:
        self.whole = f"{0:016x}"
        self._shares: dict[NodeId, int] = {}
        self._sum = 0
        self._parts = [0] * PARTS_MAX

    def note(self, node: NodeId, incarnation: int, seq: int, status: Status) -> None:
        """What is known of one device now; who is gone counts no more."""
        before = self._shares.pop(node, 0)
        after = 0
        if status <= Status.SUSPECT:
            after = self._shares[node] = _share(node, incarnation, seq, status)
        if after != before:
            self._sum = (self._sum + after - before) & _MASK
            self._parts[part_of(node, PARTS_MAX)] += after - before
            self.whole = f"{self._sum:016x}"

    def parts(self, count: int) -> tuple[int, ...]:
        """32 bits for each of `count` parts."""
        width = PARTS_MAX // count
        return tuple(
            sum(self._parts[at : at + width]) & 0xFFFFFFFF for at in range(0, PARTS_MAX, width)
        )
