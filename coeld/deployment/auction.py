"""What to bid for, given what everybody else bids: the consensus-based bundle algorithm. Pure.

CBBA (Choi, Brunet, How: "Consensus-Based Decentralized Auctions for Robust Task Allocation",
IEEE T-RO 2009) with two simplifications that this problem allows. Every device publishes only its
own claims, so there is no news of third parties to reconcile and a dead device's claims vanish
with it; and values are additive over lots of equal size, so both phases (bundle, release what
was outbid) are one greedy pass. Tasks are copies of lots, copy 0 the owner, higher ones replicas;
every copy 0 comes before any copy 1, so memory is spent on coverage first. All bids of all
devices are in one total order (copy, bid, node, lot), hence there is exactly one stable outcome,
the one a central greedy would find, whatever the order in which claims travel.
"""

from collections.abc import Callable, Collection, Iterable, Mapping

from coeld.ids import Lot, NodeId
from coeld.messages import Claim, Record

Task = tuple[Lot, int]
"""A lot and which copy of it."""
Offer = tuple[int, NodeId]
"""A bid and who bids: larger wins."""


def leaders(records: Iterable[Record], rivals: Mapping[Task, Offer] = {}) -> dict[Task, Offer]:
    """The best claim on every task among these devices and `rivals`, the leaders of others."""
    best = dict(rivals)
    for record in records:
        origin = record.origin
        for lot, copy, bid in record.claims:
            task, offer = (lot, copy), (bid, origin)
            if offer > best.setdefault(task, offer):
                best[task] = offer
    return best


def bundle(
    me: NodeId,
    lots: Iterable[Lot],
    bid: Callable[[Lot], int],
    rivals: Mapping[Task, Offer],
    capacity: int,
    copies: int,
    barred: Collection[Lot],
) -> tuple[Claim, ...]:
    """This device's best claims that no rival beats, at most `capacity`, sorted by lot.

    `rivals` are the leaders among the others; lots in `barred` could not be loaded here lately.
    """
    ranked = sorted((-bid(lot), lot) for lot in lots if lot not in barred)
    won: dict[Lot, Claim] = {}
    for copy in range(copies):
        for negative, lot in ranked:
            if len(won) >= capacity:
                return tuple(sorted(won.values()))
            if lot not in won and (-negative, me) > rivals.get((lot, copy), (-1, me)):
                won[lot] = Claim(lot, copy, -negative)
    return tuple(sorted(won.values()))
