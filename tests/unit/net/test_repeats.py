"""Which messages count as repeated."""

from coeld.net.repeats import REMEMBERED_MAX, WINDOW_S, Repeats


def test_the_same_bytes_on_the_same_topic_are_repeats_for_a_moment() -> None:
    repeats = Repeats()
    assert [repeats.seen("a", b"x", at) for at in (0.0, 0.1, 0.2)] == [0, 1, 2]
    assert repeats.seen("b", b"x", 0.2) == 0
    assert repeats.seen("a", b"y", 0.2) == 0
    assert repeats.dropped == 2
    assert repeats.seen("a", b"x", WINDOW_S + 0.01) == 0  # said again on purpose


def test_a_storm_of_different_messages_is_forgotten_in_order() -> None:
    repeats = Repeats()
    for number in range(3 * REMEMBERED_MAX):
        assert repeats.seen("a", b"%d" % number, 0.0) == 0
    assert len(repeats._seen) <= REMEMBERED_MAX
    assert repeats.seen("a", b"%d" % number, 0.0) == 1
