"""Alive, suspect, dead, left: who may turn into what, when, and on whose word."""

from coeld.ids import NodeId
from coeld.messages import DigestEntry, Status
from coeld.node_config import NodeConfig
from coeld.perception.membership import MEMBERS_MAX, Membership
from coeld.perception.suspicion import LocalHealth

A = NodeId("a" * 16)
CONFIG = NodeConfig(heartbeat_ms=500, silence_ms=3000, suspicion_ms=1000, forget_ms=60_000)


def news(
    status: Status = Status.ALIVE, heartbeat: int = 1, incarnation: int = 1, node: NodeId = A
) -> DigestEntry:
    return DigestEntry(node, incarnation, 1, heartbeat, status)


def membership() -> Membership:
    members = Membership(CONFIG, lambda member, before: None)
    members.apply(news(), 0.0)
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


def test_the_dead_return_only_with_a_higher_incarnation() -> None:
    members = membership()
    members.apply(news(Status.DEAD), 1.0)
    members.apply(news(heartbeat=99), 1.1)
    assert status(members) == Status.DEAD
    members.apply(news(incarnation=2, heartbeat=0), 1.2)
    assert status(members) == Status.ALIVE


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


def test_the_table_is_bounded_and_says_what_it_ignored() -> None:
    members = membership()
    for index in range(MEMBERS_MAX + 10):
        members.apply(news(node=NodeId(f"{index:016x}")), 0.0)
    assert len(members.members) == MEMBERS_MAX
    assert members.ignored_full == 11
