"""Make before break, never above the budget, and the order in which room is made."""

from collections.abc import Collection
from dataclasses import replace

import pytest

from coeld.ids import Lot
from coeld.update.migration import TRANSITIONS, LotState, Migration, Move, Plan, Wish

LOTS = [Lot(layer, e) for layer in range(4) for e in range(2)]


def wish(
    won: dict[Lot, int],
    elsewhere: Collection[Lot] = (),
    capacity: int = 8,
    settled: bool = True,
    replaced: Collection[Lot] | None = None,
) -> Wish:
    there = set(elsewhere)
    gone = there if replaced is None else set(replaced)
    return Wish(won, there, capacity, capacity, urgent=True, settled=settled, replaced=gone)


def holding(lots: Collection[Lot]) -> Migration:
    migration = Migration(batch_bytes=10**9)
    migration.apply(Move.LOAD, lots)
    migration.apply(Move.LOADED, lots)
    return migration


def test_the_table_has_no_way_from_loading_to_draining() -> None:
    assert (LotState.LOADING, Move.DROP) not in TRANSITIONS
    migration = Migration(1)
    with pytest.raises(KeyError):
        migration.apply(Move.LOADED, LOTS[:1])


def test_lots_that_nobody_serves_are_loaded_first_and_replicas_when_settled() -> None:
    migration = Migration(10**9)
    want = wish({LOTS[0]: 1, LOTS[1]: 0, LOTS[2]: 0}, elsewhere=[LOTS[0], LOTS[2]])
    assert migration.plan(want, 1) == Plan(load=(LOTS[1],))
    assert migration.plan(want, 1) == Plan()
    migration.apply(Move.LOADED, [LOTS[1]])
    assert migration.plan(want, 1) == Plan(load=(LOTS[2], LOTS[0]))


def test_replicas_wait_until_the_auction_has_settled() -> None:
    migration = Migration(10**9)
    want = wish({LOTS[0]: 1}, elsewhere=[LOTS[0]], settled=False)
    assert migration.plan(want, 1) == Plan()


def test_batches_are_bounded_by_bytes_but_hold_at_least_one_whole_layer() -> None:
    migration = Migration(batch_bytes=300)
    won = dict.fromkeys(LOTS, 0)
    assert migration.plan(wish(won, capacity=800), 100).load == tuple(LOTS[:4])
    assert Migration(1).plan(wish(won, capacity=800), 100).load == tuple(LOTS[:2])


def test_a_lot_that_another_won_is_kept_until_that_device_serves_it() -> None:
    migration = holding(LOTS[:2])
    assert migration.plan(wish({LOTS[0]: 0}), 1) == Plan()
    assert migration.plan(wish({LOTS[0]: 0}, elsewhere=[LOTS[1]]), 1) == Plan(drop=(LOTS[1],))


def test_a_lot_that_two_others_won_is_kept_until_both_serve_it_unless_its_room_is_needed() -> None:
    migration = holding(LOTS[:2])
    there = LOTS[1:4]
    assert migration.plan(wish({LOTS[0]: 0}, there, replaced=[]), 1) == Plan()
    more = {LOTS[0]: 0, LOTS[2]: 1}
    assert migration.plan(wish(more, there, 3, replaced=[]), 1) == Plan(load=(LOTS[2],))
    migration.apply(Move.LOADED, [LOTS[2]])
    more[LOTS[3]] = 1
    assert migration.plan(wish(more, there, 3, replaced=[]), 1) == Plan(drop=(LOTS[1],))
    migration = holding(LOTS[:2])
    gone = wish({LOTS[0]: 0}, there, replaced=[LOTS[1]])
    assert migration.plan(gone, 1) == Plan(drop=(LOTS[1],))


def test_room_for_a_hole_costs_replicas_before_it_opens_another_hole() -> None:
    migration = holding(LOTS[:3])
    want = wish({LOTS[1]: 1, LOTS[2]: 0, LOTS[3]: 0}, elsewhere=[LOTS[1]], capacity=3)
    assert migration.plan(want, 1).drop == (LOTS[1],)
    migration = holding(LOTS[:3])
    want = wish({LOTS[1]: 0, LOTS[2]: 0, LOTS[3]: 0}, capacity=3)
    assert migration.plan(want, 1).drop == (LOTS[0],)


def test_nothing_is_loaded_before_the_drained_lots_are_gone() -> None:
    migration = holding(LOTS[:2])
    want = wish({LOTS[1]: 0, LOTS[2]: 0}, capacity=2)
    assert migration.plan(want, 1) == Plan(drop=(LOTS[0],))
    assert migration.plan(want, 1) == Plan()
    migration.apply(Move.DROPPED, [LOTS[0]])
    assert migration.plan(want, 1) == Plan(load=(LOTS[2],))


def test_a_move_that_serves_nobody_new_does_not_open_a_hole() -> None:
    migration = holding(LOTS[:2])
    want = wish({LOTS[1]: 0, LOTS[2]: 0}, elsewhere=[LOTS[2]], capacity=2)
    assert migration.plan(want, 1) == Plan()


def test_a_replica_gives_way_to_a_move_but_not_to_a_replica() -> None:
    """Else devices that are full wait for each other: what each waits for is at the next one."""
    layer = LOTS[4:6]
    migration = holding(LOTS[:6])
    won = dict.fromkeys(LOTS[:2], 0) | dict.fromkeys(layer, 1)
    there = [*layer, *LOTS[6:]]
    want = wish(won | dict.fromkeys(LOTS[6:], 1), there, capacity=6)
    assert migration.plan(want, 1) == Plan(), "LOTS[2:4] are served by nobody else yet"
    want = wish(won | dict.fromkeys(LOTS[6:], 0), there, capacity=6)
    assert migration.plan(want, 1) == Plan(drop=tuple(layer))
    migration.apply(Move.DROPPED, layer)
    assert migration.plan(want, 1) == Plan(load=tuple(LOTS[6:]))


def test_a_shrunken_budget_is_obeyed_at_once() -> None:
    migration = holding(LOTS[:4])
    want = wish({LOTS[0]: 0, LOTS[1]: 0}, capacity=2, settled=False)
    assert migration.plan(want, 1).drop == (LOTS[2], LOTS[3])
    assert migration.plan(want, 1).drop == ()


def test_failed_lots_are_tried_again_later_and_later() -> None:
    migration = Migration(1)
    waits = []
    for _ in range(10):
        migration.apply(Move.LOAD, LOTS[:1])
        waits.append(migration.failed(LOTS[:1], now=0.0, why="a blob is damaged"))
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]
    assert migration.barred(59.0) == {LOTS[0]}
    assert migration.retry_at(0.0) == 60.0
    assert migration.trouble(59.0) == "a blob is damaged"
    assert migration.barred(60.0) == set()
    assert migration.trouble(60.0) == ""


def test_room_is_made_and_filled_by_whole_layers_where_there_is_room_for_one_lot_more() -> None:
    migration = holding(LOTS[:4])
    want = Wish(dict.fromkeys(LOTS[2:6], 0), set(LOTS[:2]), 5, 4, urgent=True, settled=False)
    assert migration.plan(want, 1) == Plan(drop=tuple(LOTS[:2]))
    migration.apply(Move.DROPPED, LOTS[:2])
    assert migration.plan(want, 1) == Plan(load=tuple(LOTS[4:6]))


SIZES = 100, 55


def narrowing(
    won: Collection[Lot], room: int, layers: Collection[int], settled: bool = True
) -> Wish:
    return Wish(dict.fromkeys(won, 0), set(), room, room, True, settled, frozenset(layers))


def test_a_layer_becomes_narrow_beside_itself_before_what_it_makes_room_for() -> None:
    migration = holding(LOTS[:4])
    want = narrowing(LOTS[:6], 500, [1, 2])
    assert migration.plan(want, *SIZES) == Plan(load=tuple(LOTS[2:3]), narrow=True)
    assert migration.bytes(*SIZES) == 455  # both forms of one lot
    assert migration.serving == tuple(LOTS[:4])
    assert migration.narrow_layers == {1}, "told before it answers so"
    assert migration.plan(want, *SIZES) == Plan()
    migration.apply(Move.LOADED, LOTS[2:3])
    assert migration.plan(want, *SIZES) == Plan(load=tuple(LOTS[3:4]), narrow=True)
    migration.apply(Move.LOADED, LOTS[3:4])
    assert migration.bytes(*SIZES) == 310
    assert migration.plan(want, *SIZES) == Plan(load=tuple(LOTS[4:6]), narrow=True)
    migration.apply(Move.LOADED, LOTS[4:6])
    assert migration.bytes(*SIZES) == 420
    assert migration.plan(want, *SIZES) == Plan()


def test_where_not_one_lot_fits_beside_itself_a_layer_is_dropped_first() -> None:
    migration = holding(LOTS[:4])
    want = narrowing(LOTS[:4], 430, [1])
    assert migration.plan(want, *SIZES) == Plan(drop=tuple(LOTS[2:4]))
    assert migration.plan(want, *SIZES) == Plan()
    migration.apply(Move.DROPPED, LOTS[2:4])
    assert migration.plan(want, *SIZES) == Plan(load=tuple(LOTS[2:4]), narrow=True)


def test_bits_come_back_last_and_only_in_quiet() -> None:
    migration = holding(LOTS[:4])
    migration.plan(narrowing(LOTS[:4], 1000, [0]), *SIZES)
    migration.apply(Move.LOADED, LOTS[:2])
    assert migration.plan(narrowing(LOTS[:4], 1000, [], settled=False), *SIZES) == Plan()
    assert migration.plan(narrowing(LOTS[:5], 1000, []), *SIZES) == Plan(load=(LOTS[4],))
    migration.apply(Move.LOADED, LOTS[4:5])
    assert migration.plan(narrowing(LOTS[:5], 1000, []), *SIZES) == Plan(load=tuple(LOTS[:2]))
    assert migration.narrow_layers == {0}
    assert migration.bytes(*SIZES) == 300 + 2 * 155
    migration.apply(Move.LOADED, LOTS[:2])
    assert (migration.narrow_layers, migration.bytes(*SIZES)) == (set(), 500)


def test_a_change_that_fails_leaves_the_lot_as_it_was() -> None:
    migration = holding(LOTS[:2])
    migration.plan(narrowing(LOTS[:2], 1000, [0]), *SIZES)
    assert migration.failed(LOTS[:2], now=0.0) == 1.0
    assert migration.serving == tuple(LOTS[:2])
    assert (migration.narrow_layers, migration.bytes(*SIZES)) == (set(), 200)
    migration.engine_lost()
    assert migration.bytes(*SIZES) == 0


def test_what_others_took_over_lingers_and_is_no_span_meanwhile() -> None:
    migration = Migration(10**9, linger_s=3.0)
    migration.apply(Move.LOAD, LOTS[:4])
    migration.apply(Move.LOADED, LOTS[:4])

    def plan(now: float, elsewhere: Collection[Lot], capacity: int = 8) -> Plan:
        want = wish(dict.fromkeys(LOTS[:2], 0), elsewhere, capacity)
        return migration.plan(replace(want, now=now), 1)

    assert plan(0.0, []) == Plan()
    assert (migration.staying(2), migration.due) == ({0, 1}, float("inf"))
    assert plan(1.0, LOTS[2:3]) == Plan()
    assert (migration.staying(2), migration.due) == ({0}, 4.0)
    assert plan(2.0, LOTS[2:4]) == Plan()
    assert plan(3.9, LOTS[2:4]) == Plan()
    assert plan(4.0, LOTS[2:4]) == Plan(drop=(LOTS[2],))
    assert migration.due == 5.0
    assert plan(4.5, LOTS[3:4], capacity=3) == Plan(), "what drains makes room enough"
    assert plan(4.5, LOTS[3:4], capacity=2) == Plan(drop=(LOTS[3],)), "the budget is not exceeded"
