"""Who may let go of a lot on whose account: somebody always keeps it."""

from random import Random

import pytest

from coeld.deployment.placement import outlasting, winners
from coeld.ids import Lot, NodeId
from coeld.messages import Record

LOT = Lot(0, 0)
NODES = [NodeId(letter * 16) for letter in "abcde"]


def record(node: NodeId, serves: bool) -> Record:
    return Record(origin=node, incarnation=1, seq=1, serving=(LOT,) if serves else ())


@pytest.mark.parametrize("seed", range(100))
def test_when_all_who_may_let_go_do_so_at_once_somebody_still_serves(seed: int) -> None:
    rng = Random(seed)
    servers = {node for node in NODES if rng.random() < 0.6}
    won = {node for node in NODES if rng.random() < 0.3}
    leading = {(LOT, copy): (1, node) for copy, node in enumerate(sorted(won))}
    records = [record(node, node in servers) for node in NODES]
    losers = servers - won
    gone = {node for node in losers if outlasting(winners([LOT], leading), node, records, ())}
    assert bool(servers - gone) == bool(servers)
    left = losers - gone
    assert len(left) <= 1, "nobody else keeps it for nothing"
    assert not (left and won & servers)


def test_who_is_under_suspicion_keeps_nothing_for_others() -> None:
    first, second = NODES[:2]
    records = [record(first, True), record(second, True)]
    assert outlasting({LOT: ()}, second, records, ()) == {LOT}
    assert outlasting({LOT: ()}, second, records, {first}) == set()
