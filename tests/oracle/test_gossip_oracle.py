"""Merging records and news of devices: any order and any repetition end in the same state."""

from dataclasses import replace
from random import Random

import pytest

from coeld.ids import NodeId
from coeld.messages import Beat, Delta, Entry, Message, Record, Status
from coeld.node_config import NodeConfig
from coeld.perception.membership import Membership
from coeld.perception.perceive import Perception

ME = NodeId("ff" * 8)
PEER = NodeId("ee" * 8)


def nodes(count: int) -> list[NodeId]:
    return [NodeId(f"{index:016x}") for index in range(count)]


def random_news(rng: Random, count: int) -> list[Entry]:
    return [
        Entry(
            rng.choice(nodes(4)),
            rng.randrange(3),
            rng.randrange(1, 4),
            rng.randrange(4),
            Status(rng.randrange(4)),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("seed", range(40))
def test_membership_ends_with_the_largest_news_whatever_its_order(seed: int) -> None:
    rng = Random(seed)
    news = random_news(rng, 30)
    best = {
        node: max(entry[1:2] + entry[3:5] for entry in news if entry.node == node)
        for node in {entry.node for entry in news}
    }
    for _ in range(4):
        shuffled = news + rng.sample(news, 10)
        rng.shuffle(shuffled)
        membership = Membership(ME, NodeConfig(), lambda member, before: None)
        for entry in shuffled:
            membership.apply(entry, 0.0)
        found = {
            m.node: (m.incarnation, m.heartbeat, m.status) for m in membership.members.values()
        }
        assert found == best, f"seed={seed}"


@pytest.mark.parametrize("seed", range(40))
def test_records_end_with_the_newest_whatever_the_order_of_deltas(seed: int) -> None:
    rng = Random(seed)
    records = [
        Record(node, rng.randrange(1, 3), rng.randrange(1, 4), name=rng.choice("ab"))
        for node in nodes(4)
        for _ in range(6)
    ]
    ends = []
    for _ in range(4):
        shuffled: list[Record] = records + rng.sample(records, 8)
        rng.shuffle(shuffled)
        perception = Perception(ME, 1, NodeConfig(), Random(0))
        while shuffled:
            batch = tuple(shuffled.pop() for _ in range(min(3, len(shuffled))))
            message: Message = Delta("coeld", PEER, 1, batch)
            perception.hear(PEER, message, 0.0)
        ends.append(perception.held)
    for end in ends:
        assert end == ends[0]
        for node, record in end.items():
            versions = [(r.incarnation, r.seq) for r in records if r.origin == node]
            assert (record.incarnation, record.seq) == max(versions)


def test_hearing_the_same_twice_changes_nothing() -> None:
    perception = Perception(ME, 1, NodeConfig(), Random(0))
    record = Record(PEER, 1, 1, name="peer")
    messages: list[Message] = [
        Delta("coeld", PEER, 1, (record, replace(record, origin=nodes(1)[0]))),
        Beat("coeld", PEER, 1, 1, 5, "0" * 16, (Entry(nodes(1)[0], 1, 1, 3, Status.ALIVE),)),
    ]
    for message in messages:
        perception.hear(PEER, message, 0.0)
    before = (dict(perception.held), perception.market, perception.supply)
    for message in messages * 3:
        perception.hear(PEER, message, 0.0)
    assert (perception.held, perception.market, perception.supply) == before


@pytest.mark.parametrize("seed", range(40))
def test_who_is_present_is_what_members_and_their_records_say_after_any_news(seed: int) -> None:
    rng = Random(seed)
    perception = Perception(ME, 1, NodeConfig(forget_ms=5000), Random(0))
    now = 0.0
    for _ in range(100):
        now += rng.choice([0.0, 0.0, 0.5])
        record = Record(rng.choice(nodes(4)), rng.randrange(1, 3), rng.randrange(1, 6))
        news = tuple({entry.node: entry for entry in random_news(rng, 2)}.values())
        message = rng.choice(
            [Delta("coeld", PEER, 1, (record,)), Beat("coeld", PEER, 1, 1, 5, "0" * 16, news)]
        )
        perception.hear(PEER, message, now)
        perception.tell(cpu_load_percent=rng.randrange(3))
        perception.tick(now)
        perception.flush(now)
        present = [m for m in perception.membership.members.values() if m.status <= Status.SUSPECT]
        records = [record for m in present if (record := perception.record(m)) is not None]
        first, *others = perception.present()
        assert first is perception.me, f"seed={seed}"
        assert {id(record) for record in others} == set(map(id, records)), f"seed={seed}"
        assert len(others) == len(records), f"seed={seed}"
        assert perception.present() is perception.present()
        assert perception.complete == (len(records) == len(present))
        suspects = {m.node for m in present if m.status == Status.SUSPECT}
        assert perception.suspects() == suspects, f"seed={seed}"
