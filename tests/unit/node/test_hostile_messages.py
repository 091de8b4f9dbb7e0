"""Messages that nobody honest sends: refused with a typed error, or harmless and counted.

Whatever reaches a node has passed `decode`; what decodes may still be from the far future, a
replay, a contradiction, a lie about lots and models, or far too much. A node must stay itself:
its tables bounded, its own record its own, every message it answers with well formed.
"""

import json
from dataclasses import replace
from random import Random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coeld.asked import RATE_MAX, Asked, Rates
from coeld.errors import FrameError
from coeld.events import EngineStarted, MessageReceived, ResourcesSampled, Tick
from coeld.ids import Lot, ModelHash, NodeId
from coeld.measured import MB_PER_S_MAX, RTT_US_MAX, MeasuredLink
from coeld.messages import (
    BID_MAX,
    COUNTER_MAX,
    CUT_US_MAX,
    Ask,
    Beat,
    Claim,
    Delta,
    Digest,
    Entry,
    Message,
    Record,
    Status,
    decode,
    encode,
)
from coeld.node import Node, NodeConfig
from coeld.perception.admission import BURST
from coeld.perception.membership import MEMBERS_MAX
from coeld.view import ModelDemand, Resources

ME, PEER, THIRD = NodeId("a" * 16), NodeId("b" * 16), NodeId("c" * 16)
MODEL = ModelHash("5e" * 32)
DEMAND = ModelDemand(MODEL, "m", 2, 4, 1000, 5000)
CONFIG = NodeConfig(name="me", mqtt_host="me.local", mqtt_port=1883)

counters = st.one_of(
    st.integers(0, 5), st.integers(0, COUNTER_MAX), st.sampled_from([COUNTER_MAX - 1, COUNTER_MAX])
)
nodes = st.one_of(
    st.sampled_from([ME, PEER, THIRD]),
    st.integers(0, 2**64 - 1).map(lambda number: NodeId(f"{number:016x}")),
)
statuses = st.sampled_from(list(Status))
entries = st.builds(Entry, nodes, counters, counters, counters, statuses, st.none()).flatmap(
    lambda entry: (
        st.one_of(st.just(entry), nodes.map(lambda node: entry._replace(accuser=node)))
        if entry.status == Status.SUSPECT
        else st.just(entry)
    )
)
news = st.lists(entries, max_size=8, unique_by=lambda entry: entry.node).map(tuple)
lots = st.builds(Lot, st.integers(0, 1023), st.integers(0, 4095))
claims = st.lists(
    st.builds(Claim, lots, st.integers(0, 7), st.integers(0, BID_MAX)),
    max_size=6,
    unique_by=lambda claim: claim.lot,
).map(lambda found: tuple(sorted(found)))
links = st.lists(
    st.builds(
        lambda node, rtt_us, more_us, rate: MeasuredLink(node, rtt_us, rtt_us + more_us, rate),
        nodes,
        st.integers(1, RTT_US_MAX // 2),
        st.integers(0, RTT_US_MAX // 2),
        st.integers(1, MB_PER_S_MAX),
    ),
    max_size=4,
    unique_by=lambda link: link.node,
).map(lambda found: tuple(sorted(found)))
names = st.text(max_size=64).filter(str.isprintable)
records = st.builds(
    Record,
    origin=nodes,
    incarnation=counters,
    seq=counters,
    name=names,
    mqtt_port=st.integers(0, 65535),
    memory_budget_bytes=counters,
    cpu_load_percent=st.integers(0, 100),
    kernel_mb_per_s=counters,
    row_mb_per_s=counters,
    cut_us=st.integers(0, CUT_US_MAX),
    sparing=st.booleans(),
    asked=st.builds(
        Asked,
        st.builds(Rates, *[st.integers(0, RATE_MAX)] * 3),
        st.one_of(
            st.just(()),
            st.lists(
                st.lists(st.integers(0, 7), min_size=4, max_size=4).map(bytes), min_size=1
            ).map(lambda rows: (b"", *rows)),
        ),
    ),
    links=links,
    model=st.sampled_from([MODEL, ModelHash("00" * 32)]),
    claims=claims,
    serving=st.lists(lots, max_size=6, unique=True).map(lambda found: tuple(sorted(found))),
    epoch=counters,
    fingerprint=st.sampled_from(["", "0" * 16]),
)
heads = st.tuples(st.just("coeld"), st.sampled_from([PEER, THIRD, ME]), counters)
beats = st.builds(
    lambda head, seq, beat, view, told: Beat(*head, seq, beat, f"{view:016x}", told),
    heads,
    counters,
    counters,
    st.integers(0, 2**64 - 1),
    news,
)
asks = st.builds(
    lambda head, power, wanted: Ask(*head, (7,) * 2**power if power >= 0 else (), tuple(wanted)),
    heads,
    st.integers(-1, 8),
    st.lists(nodes, max_size=5, unique=True),
)
digests = st.builds(
    lambda head, told, power, some: Digest(
        *head, told, 2**power, tuple(sorted(part for part in some if part < 2**power))
    ),
    heads,
    news,
    st.integers(0, 8),
    st.sets(st.integers(0, 255), max_size=6),
)
deltas = st.builds(
    lambda head, found: Delta(*head, tuple(found)), heads, st.lists(records, max_size=4)
)
messages = st.one_of(beats, asks, digests, deltas)


class Victim:
    """A node with a model, and everything it says, checked."""

    def __init__(self) -> None:
        self.node = Node(ME, 3, CONFIG, Random(7))
        self.now = 5000.0
        self.said = 0
        self.feed(ResourcesSampled(Resources(20_000, 20_000, 5, 4000)))
        self.feed(EngineStarted(DEMAND, "10.0.0.1", 9000))

    def feed(self, event: object) -> None:
        for effect in self.node.step(event, self.now):  # type: ignore[arg-type]
            if message := getattr(effect, "message", None):
                self.said += 1
                assert decode(encode(message)) == message

    def hear(self, message: Message) -> None:
        self.feed(MessageReceived(message.sender, message))

    def pass_time(self, seconds: float) -> None:
        end = self.now + seconds
        while self.node.deadline <= end:
            self.now = max(self.now, self.node.deadline)
            self.feed(Tick())
        self.now = end

    def check(self) -> None:
        json.dumps(self.node.status())
        perception = self.node.perception
        assert perception.me.origin == ME
        assert perception.me.name == "me"
        assert ME not in perception.held
        assert len(perception.membership.members) <= MEMBERS_MAX
        table = self.node.switchover.table
        assert table is None or set(table.owners) <= set(DEMAND.lots())
        assert {claim.lot for claim in perception.me.claims} <= set(DEMAND.lots())


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(messages)
def test_every_kind_of_message_survives_the_wire(message: Message) -> None:
    assert decode(encode(message)) == message


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(messages, max_size=12))
def test_no_well_formed_message_harms_a_node(heard: list[Message]) -> None:
    victim = Victim()
    for message in heard:
        victim.hear(message)
        victim.now += 0.05
    victim.pass_time(6.0)
    victim.check()


def originals() -> list[bytes]:
    record = Record(
        PEER, 1, 5, "peer", "peer.local", 1883, 10**6, 5, 4000, MODEL, "10.0.0.2", 9000,
        (Claim(Lot(0, 1), 0, 2**40), Claim(Lot(1, 0), 1, 7)), (Lot(0, 1), Lot(1, 0)), 4, "0" * 16,
    )  # fmt: skip
    told = (Entry(THIRD, 1, 1, 9, Status.SUSPECT, PEER), Entry(ME, 3, 1, 1, Status.DEAD))
    return [
        encode(Delta("coeld", PEER, 1, (record, replace(record, origin=THIRD)))),
        encode(Beat("coeld", PEER, 1, 5, 77, "0123456789abcdef", told)),
        encode(Ask("coeld", PEER, 1, (1, 2, 3, 4), (THIRD, ME))),
        encode(Digest("coeld", PEER, 1, told, 4, (0, 2))),
    ]


def mutated(data: bytes, rng: Random) -> bytes:
    """Bytes changed, cut, repeated; or one value of the JSON replaced by another kind of value."""
    if rng.random() < 0.5:
        damaged = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(damaged))
            damaged[at : at + rng.randrange(4)] = rng.randbytes(rng.randrange(4))
        return bytes(damaged)
    value = json.loads(data)
    place = value
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = rng.choice(keys)
        if not isinstance(place[key], dict | list) or not place[key] or rng.random() < 0.2:
            break
        place = place[key]
    odd = [0, 1, -1, 2**53, 2**64, 1.5, True, None, "", "x", "f" * 16, [], {}, [[]], "\x00", ME]
    place[key] = rng.choice(odd)
    return json.dumps(value).encode()


def test_a_hundred_thousand_mutations_are_refused_with_a_typed_error_or_harmless() -> None:
    rng, victim, sources = Random(5), Victim(), originals()
    refused = 0
    for _ in range(100_000):
        data = mutated(rng.choice(sources), rng)
        try:
            message = decode(data)
        except FrameError:
            refused += 1
            continue
        victim.now += 0.01
        victim.hear(message)
    victim.check()
    assert 50_000 < refused < 99_000, "most are refused, and some get through to the node"
    assert victim.node.status()["incarnation"] >= 3


# ---- well formed, and wrong ----------------------------------------------------------------


def meet(victim: Victim, *served: Lot, node: NodeId = PEER, seq: int = 1, **more: object) -> Record:
    claims = tuple(Claim(lot, 0, 2**60) for lot in served)
    record = Record(
        node, 1, seq, "peer", f"{node}.local", 1883, 10**6, 5, 4000, MODEL, "10.0.0.2", 9000,
        claims, served,
    )  # fmt: skip
    record = replace(record, **more)  # type: ignore[arg-type]
    victim.hear(Delta("coeld", PEER, 1, (record,)))
    return record


def test_news_of_ourselves_from_the_far_future_are_outranked() -> None:
    victim = Victim()
    victim.pass_time(10)
    for incarnation in (1000, 2**40):
        entry = Entry(ME, incarnation, 2**50, 2**50, Status.DEAD)
        victim.hear(Beat("coeld", PEER, 1, 1, 1, "0" * 16, (entry,)))
        victim.pass_time(1)
        assert victim.node.status()["incarnation"] == incarnation + 1
    entry = Entry(ME, COUNTER_MAX, 1, 1, Status.DEAD)
    victim.hear(Beat("coeld", PEER, 1, 1, 2, "0" * 16, (entry,)))
    assert victim.node.status()["incarnation"] == 2**40 + 1, "nothing is above the last number"


def test_a_device_recovers_from_what_a_liar_said_of_its_future() -> None:
    victim = Victim()
    meet(victim, Lot(0, 0))
    meet(victim, incarnation=500, seq=9, name="forged")
    assert victim.node.perception.held[PEER].name == "forged"
    meet(victim, Lot(0, 0), incarnation=501, seq=10)
    assert victim.node.perception.held[PEER].name == "peer"


def test_records_of_the_past_and_repeated_ones_change_nothing_and_are_counted() -> None:
    victim = Victim()
    past = meet(victim, Lot(0, 0), seq=1)
    now = meet(victim, Lot(0, 1), seq=2)
    before = (victim.node.perception.view, victim.node.perception.me)
    for _ in range(50):
        victim.hear(Delta("coeld", THIRD, 1, (past, now)))
    assert (victim.node.perception.view, victim.node.perception.me) == before
    assert victim.node.status()["counters"]["stale"] == 100


def test_two_records_of_one_version_end_as_the_same_one_in_any_order() -> None:
    ends = set()
    for order in (("one", "two"), ("two", "one")):
        victim = Victim()
        for name in order:
            meet(victim, name=name)
        ends.add(victim.node.perception.held[PEER].name)
    assert len(ends) == 1


def test_claims_and_owners_of_lots_that_do_not_exist_reach_no_route() -> None:
    victim = Victim()
    meet(victim, Lot(0, 0), Lot(0, 4000), Lot(1000, 0))
    victim.pass_time(3)
    victim.check()
    table = victim.node.switchover.table
    assert table is not None
    assert table.owners_of(Lot(0, 0)) == (PEER,)


def test_a_device_with_an_unknown_model_takes_no_part_in_the_auction() -> None:
    victim = Victim()
    meet(victim, *DEMAND.lots(), model=ModelHash("00" * 32))
    victim.pass_time(3)
    assert len(victim.node.perception.me.claims) == 8
    assert all(PEER not in owners for owners in victim.node.switchover.table.owners.values())  # type: ignore[union-attr]


def test_a_neighbour_that_floods_is_cut_short_and_others_are_still_heard() -> None:
    victim = Victim()
    victim.pass_time(1.0)
    said = victim.said
    for number in range(50_000):
        told = Entry(NodeId(f"{number:016x}"), 1, 1, 1, Status.ALIVE)
        victim.hear(Beat("coeld", PEER, 1, 1, number, "0" * 16, (told,)))
        victim.now += 1e-5
    victim.check()
    assert victim.node.status()["counters"]["flooded"] > 50_000 - 1.2 * BURST - 200
    assert len(victim.node.perception.membership.members) <= 1.2 * BURST + 200
    assert victim.said - said <= 1.2 * BURST + 200, "one question for each that was let in"
    victim.hear(Beat("coeld", THIRD, 1, 1, 1, "0" * 16))
    assert THIRD in victim.node.perception.membership.members


def test_a_table_full_of_inventions_is_bounded_and_told_in_messages_that_are() -> None:
    victim = Victim()
    for batch in range(20):
        entries = tuple(
            Entry(NodeId(f"{batch * 1000 + number:016x}"), 1, 1, 1, Status.ALIVE)
            for number in range(1000)
        )
        victim.hear(Digest("coeld", PEER, 1, entries))
    victim.hear(Beat("coeld", PEER, 1, 1, 1, "0" * 16))
    victim.hear(Ask("coeld", PEER, 1, (0,)))
    victim.pass_time(5)
    victim.check()
    assert victim.node.status()["counters"]["table_full"] > 0


def test_a_clock_that_jumps_kills_nobody_and_silences_nobody() -> None:
    victim = Victim()
    meet(victim, Lot(0, 0))
    for beat in range(1, 10):
        victim.hear(Beat("coeld", PEER, 1, 1, beat, victim.node.perception.view))
        victim.pass_time(0.5)
    for jump in (3600.0, -7200.0, 86_400.0):
        victim.now += jump
        victim.feed(Tick())
        said = victim.said
        for _ in range(6):
            beat += 1
            victim.hear(Beat("coeld", PEER, 1, 1, beat, victim.node.perception.view))
            victim.pass_time(0.5)
        assert victim.said >= said + 4, f"it fell silent after a jump of {jump} s"
        assert [m["status"] for m in victim.node.status()["members"]] == ["alive", "alive"]
