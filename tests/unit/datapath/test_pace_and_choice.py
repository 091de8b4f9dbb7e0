"""What a peer usually takes, and which of several is asked: in made-up time."""

from random import Random

import pytest

from coeld.datapath.choice import CLEARLY, LOSSY_S_MIN, PROBE_S, RETRY_S, Seconds, choose
from coeld.datapath.losses import LOSSY_S
from coeld.datapath.pace import LATE_S_MIN, ROW_LAYER_S, ROW_LAYER_S_MAX, Paces
from coeld.ids import NodeId

A, B, C = NodeId("a" * 16), NodeId("b" * 16), NodeId("c" * 16)
INF = float("inf")


def heard(**took_s: float) -> Paces:
    """Peers that have answered 30 calls of one row by time 0, and one of 256 rows."""
    paces = Paces()
    for name, seconds in took_s.items():
        for n in range(30):
            paces.took(NodeId(name * 16), 1, seconds, -0.03 + n * 0.001)
        paces.took(NodeId(name * 16), 256, 100 * seconds, 0.0)
    return paces


def test_a_steady_peer_is_late_after_twice_its_time_and_a_restless_one_after_four_deviations() -> (
    None
):
    paces = heard(a=0.010)
    steady = paces.of(A, 1)
    assert steady is not None
    assert steady.mean_s == pytest.approx(0.010)
    assert steady.late_s == pytest.approx(0.020, rel=0.01)
    rng = Random(1)
    for n in range(300):
        paces.took(B, 1, 0.010 + rng.uniform(0, 0.020), n * 0.001)
    restless = paces.of(B, 1)
    assert restless is not None
    assert 0.030 < restless.late_s < 0.060  # above nearly all that it ever took


def test_short_calls_are_not_late_within_what_an_operating_system_takes() -> None:
    pace = heard(a=0.0001).of(A, 1)
    assert pace is not None
    assert pace.late_s >= LATE_S_MIN


def test_a_slowdown_is_believed_after_one_or_two_calls_and_a_rare_call_at_once() -> None:
    paces = heard(a=0.001)
    paces.took(A, 1, 0.010, 0.01)
    assert paces.expected_s(A, 1, 0.01) > CLEARLY * 0.001
    paces.took(A, 1, 0.001, 5.0)
    assert paces.expected_s(A, 1, 5.0) == pytest.approx(0.001, rel=0.1)


def test_calls_of_other_sizes_are_another_matter() -> None:
    paces = heard(a=0.001)
    assert paces.expected_s(A, 200, 0.0) == pytest.approx(0.1)
    assert paces.expected_s(A, 8, 0.0) is None


def test_who_owes_an_answer_is_expected_to_stay_silent_at_least_as_long_again() -> None:
    paces = heard(a=0.001)
    paces.owes(A, 0.0)
    paces.owes(A, 0.4)
    assert paces.expected_s(A, 1, 0.5) == pytest.approx(0.501)
    paces.settled(A)
    assert paces.expected_s(A, 1, 0.5) == pytest.approx(0.001)


def test_the_route_tables_order_stands_unless_another_is_clearly_quicker() -> None:
    assert choose([A, B], 1, heard(a=0.0012, b=0.001), 0.1).nodes == (A, B)
    assert choose([A, B], 1, heard(a=0.0014, b=0.001), 0.1).nodes == (B, A)
    assert choose([A, B, C], 1, heard(a=0.003, b=0.002, c=0.001), 0.1).nodes == (C, B, A)


def test_one_owner_is_never_asked_twice() -> None:
    choice = choose([A], 1, heard(a=0.001), 0.1)
    assert (choice.nodes, choice.along, choice.late_s) == ((A,), False, INF)


def test_nothing_is_late_while_nobody_was_measured() -> None:
    choice = choose([A, B], 256, Paces(), 0.0)
    assert (choice.nodes, choice.late_s) == ((A, B), INF)


def test_an_owner_that_was_never_measured_is_asked_along_with_few_rows_only() -> None:
    assert choose([A, B], 1, heard(a=0.001), 0.1).along
    assert not choose([A, B], 256, heard(a=0.001), 0.1).along
    assert not choose([A, B], 1, heard(a=0.001, b=0.001), 0.1).along


def test_who_was_passed_over_is_heard_again_once_a_second() -> None:
    paces = heard(a=0.010, b=0.001)
    assert not choose([A, B], 1, paces, PROBE_S / 2).along
    probe = choose([A, B], 1, paces, 2 * PROBE_S)
    assert (probe.nodes, probe.along) == ((B, A), True)
    paces.owes(A, 2 * PROBE_S)
    assert not choose([A, B], 1, paces, 2.1 * PROBE_S).along
    paces.settled(A)
    paces.took(A, 1, 0.001, 2.2 * PROBE_S)
    paces.took(A, 1, 0.001, 3.3 * PROBE_S)
    assert choose([A, B], 1, paces, 3.3 * PROBE_S).nodes == (A, B)


def test_with_many_rows_who_was_passed_over_is_tried_first_after_ten_seconds() -> None:
    paces = heard(a=0.010, b=0.001)
    assert choose([A, B], 256, paces, RETRY_S / 2).nodes == (B, A)
    again = choose([A, B], 256, paces, 2 * RETRY_S)
    assert again.nodes == (A, B)
    assert again.late_s < 0.5  # by the pace of the quick one, not by its own


def test_second_calls_are_a_tenth_of_the_first() -> None:
    seconds = Seconds()
    allowed = 0
    for _ in range(1000):
        seconds.first()
        allowed += seconds.take()
    assert 100 <= allowed <= 110


def test_lost_packets_earn_second_calls_once() -> None:
    seconds = Seconds(saved=0.0)
    assert not seconds.take()
    seconds.lost(2)
    seconds.lost(2)
    assert [seconds.take() for _ in range(9)] == [True] * 8 + [False]


def test_what_a_quarter_of_the_calls_take_is_not_moved_by_those_whose_packets_were_lost() -> None:
    rng, paces = Random(1), heard(a=0.001)
    pace = paces.of(A, 1)
    assert pace is not None
    for number in range(1000):
        took_s = rng.uniform(0.0008, 0.0012) if rng.random() < 0.5 else rng.uniform(0.02, 0.5)
        paces.took(A, 1, took_s, number * 0.1)
        assert pace.quarter_s < 0.002
    assert pace.late_s > 0.1
    for number in range(200):
        paces.took(A, 1, 0.010, 100 + number * 0.1)
    assert pace.quarter_s == pytest.approx(0.010, rel=0.15)


def test_where_packets_get_lost_small_calls_are_late_sooner_and_again_and_again() -> None:
    paces = heard(a=0.030, b=0.020)
    paces.losses.note(B, 1, 1.0)
    lossy = choose([A, B], 1, paces, 1.1)
    assert lossy.late_s == lossy.again_s == pytest.approx(0.040, rel=0.02)
    alone = choose([B], 1, paces, 1.1)
    assert alone.late_s == alone.again_s == pytest.approx(0.040, rel=0.02)
    assert choose([A], 1, paces, 1.1).late_s == INF  # nothing was lost on the way to A
    assert choose([A, B], 256, paces, 1.1).again_s == INF
    assert choose([A, B], 1, paces, 1.0 + LOSSY_S).again_s == INF
    quick = heard(a=0.001, b=0.001)
    quick.losses.note(B, 1, 1.0)
    assert choose([A, B], 1, quick, 1.1).again_s == LOSSY_S_MIN


@pytest.mark.parametrize("seed", range(20))
def test_a_device_that_turns_ten_times_slower_costs_little_after_it_is_known(seed: int) -> None:
    """Two owners in made-up time: A answers in 1 ms until it turns slow, B always in 1.1 ms."""
    rng = Random(seed)
    paces, now_s, seconds = heard(a=0.001, b=0.0011), 0.05, Seconds()
    owed: list[tuple[float, float]] = []  # answers of A that nobody waits for: when, how long
    spent_s = []
    for _ in range(3000):
        for at_s, took_s in [answer for answer in owed if answer[0] <= now_s]:
            owed.remove((at_s, took_s))
            paces.settled(A)
            paces.took(A, 1, took_s, now_s)
        seconds.first()
        choice = choose([A, B], 1, paces, now_s)
        takes = {A: 0.010 * rng.uniform(0.8, 1.2), B: 0.0011 * rng.uniform(0.8, 1.2)}
        first = choice.nodes[0]
        asked_s = {first: 0.0}
        if choice.along:
            asked_s[choice.nodes[1]] = 0.0
        elif takes[first] > choice.late_s and seconds.take():
            asked_s[choice.nodes[1]] = choice.late_s
        answers = {node: after_s + takes[node] for node, after_s in asked_s.items()}
        winner = min(answers, key=lambda node: answers[node])
        paces.took(winner, 1, takes[winner], now_s + answers[winner])
        if A in answers and winner != A:
            paces.owes(A, now_s + asked_s[A])
            owed.append((now_s + answers[A], takes[A]))
        now_s += answers[winner]
        spent_s.append(answers[winner])
    assert sum(spent_s[:30]) < 30 * 0.0011 * 2.5, f"seed={seed}"
    assert sum(spent_s[30:]) / len(spent_s[30:]) < 0.0011 * 1.05, f"seed={seed}"


def test_a_peer_gets_the_time_that_its_rows_take_however_slow_it_is() -> None:
    """One that needs 40 ms per row and layer answers at the fourth attempt, and then at once."""
    paces, need_s, attempts = Paces(), 0.040 * 9 * 128, 0
    while paces.allowed_s(A, 9 * 128) < need_s:
        paces.overran(A, 9 * 128)
        attempts += 1
    assert attempts == 3
    paces.needed(A, need_s, 9 * 128)
    assert paces.allowed_s(A, 1000) == pytest.approx(2 * 40.0)
    assert paces.allowed_s(B, 1000) == 1000 * ROW_LAYER_S
    paces.needed(A, 9.0, 1)  # one row, a second of the link's
    assert paces.allowed_s(A, 1000) == pytest.approx(2 * 40.0)
    paces.needed(A, 0.010, 128)
    assert paces.allowed_s(A, 1000) == 1000 * ROW_LAYER_S
    paces.overran(A, 1)  # it was frozen: rows are no reason
    assert paces.allowed_s(A, 1000) == 1000 * ROW_LAYER_S
    for _ in range(50):
        paces.overran(A, 128)
    assert paces.allowed_s(A, 1) == ROW_LAYER_S_MAX
