"""The outcome of the auction as this device sees it: who owns what, what is missing, since when.

"Settled" means that no claim has changed for a while and the claims of all present devices are
known. Only then is it true to say that memory is missing: before, the next bid may cover it. A
swarm that never comes to rest must still load, so waiting for rest is bounded.
"""

from collections.abc import Collection, Iterable, Mapping

from coeld.deployment.auction import Offer, Task
from coeld.ids import Lot, NodeId
from coeld.messages import Record

PATIENCE = 10
"""Longest wait for rest before moves, in units of that rest."""
URGENT_PATIENCE = 2
"""The same for lots that nobody serves, in units of the rest before moves: devices that start
together have to hear each other and think first."""


class Quiet:
    """How long the auction has been at rest."""

    def __init__(self) -> None:
        self.changed_at = float("-inf")
        self._unrest_since = float("-inf")

    def disturb(self, now: float, rest_s: float) -> None:
        """A claim changed. Unrest begins anew if there was a rest of `rest_s` before."""
        if now - self.changed_at > rest_s:
            self._unrest_since = now
        self.changed_at = now

    def since(self, rest_s: float, patience_s: float) -> float:
        """The time from which the auction counts as having rested for `rest_s`."""
        return min(self.changed_at + rest_s, self._unrest_since + patience_s)

    def rests(self, quiet_s: float, settle_s: float) -> tuple[float, float]:
        """From when on it counts as quiet, and as settled."""
        urgent_at = self.since(quiet_s, URGENT_PATIENCE * settle_s)
        return urgent_at, self.since(settle_s, PATIENCE * settle_s)


def owners(leading: Mapping[Task, Offer]) -> dict[Lot, NodeId]:
    """The winner of copy 0 of every lot that somebody claims."""
    return {lot: offer[1] for (lot, copy), offer in leading.items() if copy == 0}


def won(me: Record, leading: Mapping[Task, Offer]) -> dict[Lot, int]:
    """What this device has won, and which copy."""
    return {c.lot: c.copy for c in me.claims if leading[c.lot, c.copy][1] == me.origin}


def elsewhere(records: Iterable[Record], me: NodeId, suspects: Collection[NodeId]) -> set[Lot]:
    """Lots that another device serves beyond suspicion."""
    others = (r for r in records if r.origin != me and r.origin not in suspects)
    return {lot for record in others for lot in record.serving}


def winners(lots: Iterable[Lot], leading: Mapping[Task, Offer]) -> dict[Lot, set[NodeId]]:
    """Of every copy of these lots."""
    found: dict[Lot, set[NodeId]] = {lot: set() for lot in lots}
    for (lot, _copy), (_bid, node) in leading.items():
        if lot in found:
            found[lot].add(node)
    return found


def outlasting(
    lost: Mapping[Lot, Collection[NodeId]],
    me: NodeId,
    records: Iterable[Record],
    suspects: Collection[NodeId],
) -> set[Lot]:
    """Of lots held here and `lost` to their winners, those that a device serves beyond suspicion
    which does not let go of them on our account: one that won them, or, of those who lost them too,
    one that comes before us. Without an order two would let go at once, each because of the other.
    """
    others = [r for r in records if r.origin != me and r.origin not in suspects]
    return {
        lot
        for record in others
        for lot in lost.keys() & set(record.serving)
        if record.origin < me or record.origin in lost[lot]
    }


def replaced(
    lost: Mapping[Lot, Collection[NodeId]],
    records: Iterable[Record],
    suspects: Collection[NodeId],
) -> set[Lot]:
    """Of lots `lost` to their winners, those that have some, all of whom serve them beyond
    suspicion."""
    serving = {r.origin: set(r.serving) for r in records if r.origin not in suspects}
    return {
        lot
        for lot, nodes in lost.items()
        if nodes and all(lot in serving.get(node, ()) for node in nodes)
    }


def unclaimed(lots: Iterable[Lot], leading: Mapping[Task, Offer]) -> list[Lot]:
    """Lots that nobody can take: everybody who is there is full."""
    return [lot for lot in lots if (lot, 0) not in leading]


def serving(records: Iterable[Record], winners: Mapping[Lot, NodeId]) -> dict[Lot, NodeId]:
    """Of those who serve a lot, the one who counts: the auction's winner, or the first."""
    served: dict[Lot, NodeId] = {}
    last_to_first = sorted(records, key=lambda record: record.origin, reverse=True)
    for record in last_to_first:
        served |= dict.fromkeys(record.serving, record.origin)
    for record in last_to_first:
        won = (lot for lot in record.serving if winners.get(lot) == record.origin)
        served |= dict.fromkeys(won, record.origin)
    return served
