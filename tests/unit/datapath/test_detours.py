"""Ways to a peer: the straight one first, then through others, what failed last last."""

from random import Random

from coeld.datapath.detours import FAILED_S, FORGET_S, Detours
from coeld.ids import NodeId

B, C, D = (NodeId(letter * 16) for letter in "bcd")


def test_the_straight_way_is_taken_until_it_fails_and_again_when_it_works() -> None:
    detours = Detours()
    assert detours.way(B, [B, C, D], 0.0) is None
    detours.failed(B, None, 0.0)
    assert not detours.straight(B)
    assert detours.way(B, [B, C, D], 0.1) == C
    detours.works(B)
    assert detours.straight(B)
    assert detours.way(B, [B, C, D], 0.2) is None


def test_who_cannot_be_reached_either_is_not_asked_to_help() -> None:
    detours = Detours()
    detours.failed(B, None, 0.0)
    detours.failed(C, None, 0.0)
    assert detours.way(B, [B, C, D], 0.1) == D
    assert detours.way(B, [B, C], 0.1) is None  # two devices: nobody can help
    assert detours.way(B, [B, C], FAILED_S) == C


def test_a_peer_is_lost_only_when_every_way_has_just_failed() -> None:
    detours = Detours()
    detours.failed(B, None, 0.0)
    assert detours.another(B, [B, C], 0.0)
    detours.failed(B, C, 0.5)
    assert not detours.another(B, [B, C], 0.6)
    assert detours.another(B, [B, C], FAILED_S)
    assert not detours.another(B, [B], FAILED_S / 2)


def test_all_ways_are_tried_in_turn_while_all_fail() -> None:
    for seed in range(50):
        rng, detours, now_s = Random(seed), Detours(), 0.0
        taken = []
        for _ in range(9):
            via = detours.way(B, [B, C, D], now_s)
            taken.append(via)
            detours.failed(B, via, now_s)
            now_s += rng.uniform(0.001, 2.0)
        assert taken == [None, C, D] * 3, seed


def test_failures_are_forgotten_and_take_no_room() -> None:
    detours = Detours()
    for number in range(1000):
        detours.failed(NodeId(f"{number:016x}"), None, number * 1.0)
    assert detours.straight(NodeId(f"{0:016x}"))
    assert len(detours._failed_at) <= FORGET_S + 1
