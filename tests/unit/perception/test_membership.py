"""Alive, suspect, dead, left: who may turn into what, when, and on whose word."""

from coeld.ids import NodeId
from coeld.messages import Entry, Status
from coeld.node_config import NodeConfig
from coeld.perception.membership import MEMBERS_MAX, Membership
from coeld.perception.suspicion import LocalHealth

A, B, C, ME = (NodeId(letter * 16) for letter in "abcf")
CONFIG = NodeConfig(heartbeat_ms=500, silence_ms=3000, suspicion_ms=1000, forget_ms=60_000)


def news(
    status: Status = Status.ALIVE, heartbeat: int = 1, incarnation: int = 1, node: NodeId = A
) -> Entry:
    return Entry(node, incarnation, 1, heartbeat, status)


def membership(others: int = 0) -> Membership:
    """Knows A, watches it, and knows of some others."""
    members = Membership(ME, CONFIG, lambda member, before: None)
    members.apply(news(), 0.0)
    members.watch(A, True, 0.0)
    for index in range(others):
        members.apply(news(node=NodeId(f"{index:016x}")), 0.0)
    return members


def status(members: Membership) -> Status:
    return members.members[A].status


def test_a_silent_device_becomes_suspect_then_dead_then_forgotten() -> None:
    members = membership()
    members.tick(2.9)
    assert status(members) == Status.ALIVE
    members.tick(3.0)
    assert status(members) == Status.SUSPECT
    members.tick(3.9)
    assert status(members) == Status.SUSPECT
    members.tick(4.0)
    assert status(members) == Status.DEAD
    assert members.tick(63.9) == []
    assert members.tick(64.0) == [A]
    assert A not in members.members


def test_a_newer_heartbeat_refutes_a_suspicion_and_an_older_one_does_not() -> None:
    members = membership()
    members.apply(news(heartbeat=5), 1.0)
    members.suspect(A, 1.0)
    members.apply(news(heartbeat=5), 1.1)
    members.apply(news(heartbeat=4), 1.1)
    assert status(members) == Status.SUSPECT
    members.apply(news(heartbeat=6), 1.2)
    assert status(members) == Status.ALIVE


def test_a_suspicion_based_on_an_older_heartbeat_is_ignored() -> None:
    members = membership()
    members.apply(news(heartbeat=5), 1.0)
    members.apply(news(Status.SUSPECT, heartbeat=4), 1.1)
    assert status(members) == Status.ALIVE


def test_a_second_suspicion_does_not_start_the_clock_again() -> None:
    members = membership()
    members.suspect(A, 1.0)
    members.apply(news(Status.SUSPECT, heartbeat=1), 1.9)
    members.apply(news(Status.SUSPECT, heartbeat=2), 1.9)
    members.tick(2.0)
    assert status(members) == Status.DEAD


def test_a_verdict_yields_to_later_evidence_and_to_a_new_life_and_to_nothing_else() -> None:
    members = membership()
    members.apply(news(Status.DEAD, heartbeat=5), 1.0)
    members.apply(news(heartbeat=5), 1.1)
    assert status(members) == Status.DEAD
    members.apply(news(heartbeat=6), 1.2)
    assert status(members) == Status.ALIVE
    members.apply(news(Status.DEAD, heartbeat=5), 1.3)
    assert status(members) == Status.ALIVE, "somebody who did not hear the sixth heartbeat"
    members.apply(news(Status.DEAD, heartbeat=7), 1.4)
    members.apply(news(incarnation=2, heartbeat=0), 1.5)
    assert status(members) == Status.ALIVE


def test_silence_of_a_device_that_is_no_neighbour_says_nothing() -> None:
    members = membership()
    members.watch(A, False, 0.0)
    members.tick(1000.0)
    assert status(members) == Status.ALIVE
    members.watch(A, True, 1000.0)
    members.tick(1002.9)
    assert status(members) == Status.ALIVE, "it has just begun to listen"
    members.tick(1003.0)
    assert status(members) == Status.SUSPECT


def test_a_lone_accuser_is_believed_late_and_three_at_once() -> None:
    waits = {}
    for accusers in (1, 2, 3):
        members = membership(others=8)
        members.watch(A, False, 0.0)
        for accuser in (B, C, ME)[:accusers]:
            told = Entry(A, 1, 1, 1, Status.SUSPECT, accuser)
            assert members.apply(told, 10.0), "a confirmation is news"
            assert not members.apply(told, 10.0), "once"
        members.tick(10.0)
        waits[accusers] = members.due - 10.0
    assert waits[1] == 3.0
    assert round(waits[2], 2) == 1.74
    assert waits[3] == 1.0


def test_a_neighbour_that_is_suspected_already_is_accused_again_by_its_silence_here() -> None:
    members = membership(others=8)
    members.apply(Entry(A, 1, 1, 1, Status.SUSPECT, B), 2.5)
    members.tick(2.9)
    assert members.verdicts == []
    members.tick(3.0)
    assert members.verdicts == [A]
    assert members.members[A].accusers == {B, ME}


def test_in_a_swarm_of_three_nobody_waits_for_confirmations_that_cannot_come() -> None:
    members = membership(others=1)
    members.suspect(A, 1.0)
    members.tick(2.0)
    assert status(members) == Status.DEAD


def test_who_left_is_not_suspected() -> None:
    members = membership()
    members.apply(news(Status.LEFT), 1.0)
    members.suspect(A, 1.1)
    assert status(members) == Status.LEFT


def test_time_in_which_this_device_slept_is_not_silence_of_others() -> None:
    members = membership()
    members.woke(60.0, 60.5)
    members.tick(60.5)
    assert status(members) == Status.ALIVE


def test_a_device_that_keeps_being_late_waits_up_to_eight_times_longer() -> None:
    health = LocalHealth(heartbeat_s=0.5)
    assert health.patience == 1
    for _ in range(20):
        health.woke(1.0)
    assert health.patience == 8
    for _ in range(7):
        health.woke(0.0)
    assert health.patience == 1


def test_who_is_accused_doubts_itself() -> None:
    health = LocalHealth(heartbeat_s=0.5)
    for _ in range(20):
        health.accused()
    assert health.patience == 8


def test_the_table_is_bounded_and_says_what_it_ignored() -> None:
    members = membership()
    for index in range(MEMBERS_MAX + 10):
        members.apply(news(node=NodeId(f"{index:016x}")), 0.0)
    assert len(members.members) == MEMBERS_MAX
    assert members.ignored_full == 11


def test_who_can_hear_nobody_accuses_nobody_and_counts_anew_afterwards() -> None:
    members = membership()
    members.apply(news(node=B), 0.0)
    members.apply(news(node=C), 0.0)
    members.apply(news(Status.DEAD, heartbeat=2, node=C), 0.5)
    members.suspect(B, 1.0)  # a failed call still counts as a reason
    members.listen(False, 1.5)
    for second in range(2, 600):
        assert members.tick(second) == []
    assert members.due == float("inf")
    found = [members.members[node].status for node in (A, B, C)]
    assert found == [Status.ALIVE, Status.SUSPECT, Status.DEAD]
    members.listen(True, 600.0)
    members.tick(600.9)
    assert members.members[B].status == Status.SUSPECT
    members.tick(602.9)
    assert status(members) == Status.ALIVE
    members.tick(603.0)
    assert status(members) == Status.SUSPECT
    members.tick(604.0)
    assert (status(members), members.members[B].status) == (Status.DEAD, Status.DEAD)
