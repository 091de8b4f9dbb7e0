"""Announce, agree, close; open, wait, withdraw."""

from coeld.update.spanning import CLOSE_S, OPEN_S, Spanning, ranges

NONE: frozenset[int] = frozenset()


def layers(*found: int) -> frozenset[int]:
    return frozenset(found)


def announced(*found: int) -> Spanning:
    """CLOSE_S ago."""
    spanning = Spanning()
    spanning.want(found, found, -CLOSE_S)
    spanning.want(found, found, 0.0)
    return spanning


def test_what_was_announced_just_now_stays_open_whoever_knows_it() -> None:
    spanning = Spanning()
    spanning.want({1}, {1, 2}, 0.0)
    spanning.want({1, 2}, {1, 2}, 1.0)
    assert not spanning.agreed()
    assert (spanning.announced, spanning.closed) == (layers(1, 2), NONE)
    assert spanning.due == CLOSE_S
    spanning.want({1, 2}, {1, 2}, CLOSE_S)
    assert spanning.agreed()
    assert (spanning.closed, spanning.due) == (layers(1), 1.0 + CLOSE_S)
    spanning.want({1, 2}, {1, 2}, 1.0 + CLOSE_S)
    assert spanning.agreed()
    assert (spanning.closed, spanning.due) == (layers(1, 2), float("inf"))


def test_a_layer_is_closed_only_when_all_know_and_withdrawn_only_after_it_was_opened() -> None:
    spanning = announced(1, 2)
    assert (spanning.announced, spanning.closed) == (layers(1, 2), NONE)
    spanning.agreed()
    assert spanning.closed == {1, 2}
    spanning.want({1}, {1, 2, 3}, 10.0)
    assert (spanning.announced, spanning.closed) == (layers(1, 2), layers(1))
    assert spanning.due == 10 + OPEN_S
    spanning.agreed()
    assert spanning.closed == {1}, "it is to be withdrawn: it stays open"
    spanning.want({1}, {1, 2, 3}, 10 + OPEN_S)
    assert (spanning.announced, spanning.due) == (layers(1), float("inf"))


def test_what_was_never_closed_or_leaves_memory_is_withdrawn_at_once() -> None:
    spanning = announced(1, 2)
    spanning.want({2}, {1, 2}, 1.0)
    assert spanning.announced == {2}
    spanning.agreed()
    spanning.want({2}, {1}, 2.0)
    assert (spanning.announced, spanning.closed) == (NONE, NONE)


def test_a_change_of_mind_closes_again_only_when_all_agree_again() -> None:
    spanning = announced(1)
    spanning.agreed()
    spanning.want((), {1}, 1.0)
    spanning.want({1}, {1}, 2.0)
    assert (spanning.announced, spanning.closed) == (layers(1), NONE)
    spanning.agreed()
    assert spanning.closed == {1}


def test_ranges_are_of_consecutive_layers() -> None:
    assert ranges({5, 1, 2, 7, 6}) == ((1, 3), (5, 8))
    assert ranges({1, 2, 3, 4}, {0, 3, 9}) == ((1, 3), (3, 5))
    assert ranges(()) == ()
