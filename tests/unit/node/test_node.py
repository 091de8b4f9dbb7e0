"""One node by itself, and against a peer that is written by hand."""

import json
from dataclasses import replace
from random import Random
from typing import TypeVar

from coeld.effects import Connect, DropLots, Effect, LoadLots, Publish, Report, Send, SwapRoutes
from coeld.events import (
    CallFailed,
    EngineStarted,
    EngineStopped,
    Event,
    LoadFailed,
    LotsLoaded,
    MessageReceived,
    NeighbourLost,
    ResourcesSampled,
    Tick,
)
from coeld.ids import Lot, ModelHash, NodeId
from coeld.messages import (
    Ask,
    Beat,
    Claim,
    Delta,
    Digest,
    Entry,
    Message,
    Record,
    Status,
    encode,
)
from coeld.node import Node, NodeConfig
from coeld.view import ModelDemand, Resources

T = TypeVar("T")
ME, PEER, THIRD = NodeId("a" * 16), NodeId("b" * 16), NodeId("c" * 16)
MODEL = ModelHash("5e" * 32)
DEMAND = ModelDemand(MODEL, "m", 2, 4, 1000, 5000)
CONFIG = NodeConfig(name="me", mqtt_host="me.local", mqtt_port=1883)
BIG = Resources(20_000, 20_000, 5, 4000)


class Bench:
    """A node with a clock; collects its effects."""

    def __init__(self, config: NodeConfig = CONFIG, start: float = 5000.0) -> None:
        self.node = Node(ME, 3, config, Random(7))
        self.now = start
        self.effects: list[Effect] = []

    def feed(self, *events: Event) -> list[Effect]:
        out = [effect for event in events for effect in self.node.step(event, self.now)]
        self.effects += out
        return out

    def hear(self, message: Message) -> list[Effect]:
        return self.feed(MessageReceived(message.sender, message))

    def pass_time(self, seconds: float) -> list[Effect]:
        out = []
        end = self.now + seconds
        while self.node.deadline <= end:
            self.now = max(self.now, self.node.deadline)
            out += self.feed(Tick())
        self.now = end
        return out

    def engine(self) -> None:
        self.feed(ResourcesSampled(BIG), EngineStarted(DEMAND, "10.0.0.1", 9000))

    def loaded(self) -> None:
        """Run until everything that was asked for is loaded."""
        self.engine()
        loads = [e for e in self.pass_time(1.0) if isinstance(e, LoadLots)]
        for load in loads:
            self.feed(LotsLoaded(load.lots))

    def meet(self, record: Record) -> list[Effect]:
        return self.hear(Delta("coeld", record.origin, record.incarnation, (record,)))

    def beat(self, node: NodeId, heartbeat: int, *news: Entry, view: str = "") -> list[Effect]:
        """A heartbeat of a device that knows the same as this node, or has another view."""
        view = view or self.node.perception.view
        return self.hear(Beat("coeld", node, 1, 1, heartbeat, view, news))


def of(kind: type[T], effects: list[Effect]) -> list[T]:
    return [effect for effect in effects if isinstance(effect, kind)]


def peer(*serving: Lot, node: NodeId = PEER, bid: int = 2**60, copy: int = 0) -> Record:
    claims = tuple(Claim(lot, copy, bid) for lot in sorted(serving))
    return Record(
        node, 1, 1, "peer", f"{node}.local", 1883, 10**6, 5, 4000, MODEL, "10.0.0.2", 9000,
        claims, tuple(sorted(serving)),
    )  # fmt: skip


def test_one_device_with_enough_memory_loads_everything_and_routes_to_itself() -> None:
    bench = Bench()
    bench.loaded()
    table = of(SwapRoutes, bench.effects)[-1].table
    assert set(table.owners) == set(DEMAND.lots())
    assert set(table.owners.values()) == {(ME,)}
    assert table.addresses == {ME: ("10.0.0.1", 9000)}
    assert table.missing_bytes == 0


def test_one_device_with_too_little_memory_says_how_many_bytes_are_missing() -> None:
    bench = Bench()
    bench.feed(ResourcesSampled(replace(BIG, memory_budget_bytes=8000)))
    bench.feed(EngineStarted(DEMAND, "10.0.0.1", 9000))
    effects = bench.pass_time(0.9)
    assert all(swap.table.missing_bytes == 0 for swap in of(SwapRoutes, effects))
    bench.pass_time(1.0)
    assert bench.node.status()["routes"]["missing_bytes"] == 5 * 1000


def test_missing_bytes_vanish_as_soon_as_somebody_claims_the_lots() -> None:
    bench = Bench()
    bench.feed(ResourcesSampled(replace(BIG, memory_budget_bytes=8000)))
    bench.feed(EngineStarted(DEMAND, "10.0.0.1", 9000))
    bench.pass_time(2.0)
    bench.meet(peer(*DEMAND.lots()))
    assert bench.node.status()["routes"]["missing_bytes"] == 0


def test_a_device_without_a_model_is_a_member_that_holds_nothing() -> None:
    bench = Bench()
    bench.feed(ResourcesSampled(BIG), EngineStarted(None, "10.0.0.1", 9000))
    effects = bench.pass_time(3.0)
    assert not of(LoadLots, effects) + of(SwapRoutes, effects)  # type: ignore[operator]
    assert bench.node.status()["model"] is None


def test_a_dead_engine_withdraws_its_lots_in_the_same_step_and_reloads_after_restart() -> None:
    bench = Bench()
    bench.loaded()
    effects = bench.feed(EngineStopped())
    record = of(Publish, effects)[0].message.records[0]  # type: ignore[union-attr]
    assert (record.model, record.claims, record.serving) == (None, (), ())
    assert of(SwapRoutes, effects)[-1].table.owners == {}
    bench.effects.clear()
    bench.loaded()
    assert of(SwapRoutes, bench.effects)[-1].table.owners_of(Lot(1, 3)) == (ME,)


def test_a_new_engine_is_handed_the_table_even_if_nothing_changed() -> None:
    bench = Bench()
    bench.feed(EngineStarted(DEMAND, "10.0.0.1", 9000))
    bench.pass_time(2.0)
    effects = bench.feed(EngineStarted(DEMAND, "10.0.0.1", 9000))
    assert of(SwapRoutes, effects)


def test_lots_of_a_dead_owner_are_loaded_within_150_ms_of_its_death() -> None:
    bench = Bench(replace(CONFIG, replicas_max=1))
    bench.meet(peer(*DEMAND.lots()))
    bench.engine()
    for beat in range(1, 8):
        bench.beat(PEER, beat)
        bench.pass_time(0.5)
    bench.feed(NeighbourLost(PEER))
    bench.effects.clear()
    bench.pass_time(1.0 + 0.15)
    assert any("dead" in report.text for report in of(Report, bench.effects))
    assert set(of(LoadLots, bench.effects)[0].lots) == set(DEMAND.lots())


def test_what_a_device_served_in_an_earlier_life_is_void() -> None:
    bench = Bench()
    bench.meet(peer(*DEMAND.lots()))
    bench.feed(EngineStarted(DEMAND, "10.0.0.1", 9000))
    effects = bench.hear(Beat("coeld", PEER, 2, 0, 1, "0" * 16))
    assert of(SwapRoutes, effects)[-1].table.owners == {}


def test_failed_calls_put_an_owner_last_and_never_kill_it_while_it_beats() -> None:
    bench = Bench()
    bench.meet(peer(*DEMAND.lots()))
    bench.meet(peer(*DEMAND.lots(), node=THIRD, bid=1, copy=1))
    bench.feed(EngineStarted(DEMAND, "10.0.0.1", 9000))
    assert of(SwapRoutes, bench.effects)[-1].table.owners_of(Lot(0, 0)) == (PEER, THIRD)
    effects = bench.feed(CallFailed(PEER))
    assert of(SwapRoutes, effects)[-1].table.owners_of(Lot(0, 0)) == (THIRD, PEER)
    for beat in range(1, 40):
        bench.beat(PEER, beat)
        bench.beat(THIRD, beat)
        bench.feed(CallFailed(PEER))
        bench.pass_time(0.5)
    assert not any("dead" in report.text for report in of(Report, bench.effects))


def test_a_suspicion_of_oneself_is_refuted_by_an_early_heartbeat_at_a_bounded_rate() -> None:
    bench = Bench()
    bench.pass_time(5.2)
    bench.effects.clear()
    for _ in range(100):
        bench.beat(PEER, 1, Entry(ME, 3, 1, 1, Status.SUSPECT, PEER))
        bench.pass_time(0.01)
    beats = [p for p in of(Publish, bench.effects) if isinstance(p.message, Beat)]
    assert 4 <= len(beats) <= 9
    assert bench.node.status()["incarnation"] == 3


def test_who_was_declared_dead_returns_with_a_heartbeat_and_its_record_stays_valid() -> None:
    bench = Bench()
    bench.loaded()
    bench.pass_time(5.0)
    bench.effects.clear()
    bench.beat(PEER, 1, Entry(ME, 3, 1, 2, Status.DEAD))
    bench.pass_time(0.15)
    beats = [p.message for p in of(Publish, bench.effects) if isinstance(p.message, Beat)]
    assert [beat.incarnation for beat in beats] == [3]
    assert beats[0].heartbeat > 2


def test_whoever_heard_a_later_heartbeat_speaks_for_the_accused() -> None:
    bench = Bench()
    bench.meet(peer())
    bench.meet(peer(node=THIRD))
    bench.beat(THIRD, 9)
    accusation = Entry(THIRD, 1, 1, 8, Status.SUSPECT, PEER)
    bench.effects.clear()
    bench.beat(PEER, 1, accusation)
    bench.pass_time(0.1)
    beats = [p.message for p in of(Publish, bench.effects) if isinstance(p.message, Beat)]
    assert beats[0].news == (Entry(THIRD, 1, 1, 9, Status.ALIVE),)
    for _ in range(20):
        bench.beat(PEER, 2, accusation)
    assert len(of(Publish, bench.pass_time(0.2))) <= 1, "once per heartbeat"


def test_news_of_an_earlier_life_raises_the_incarnation_above_it() -> None:
    bench = Bench()
    bench.pass_time(1.0)
    bench.beat(PEER, 1, Entry(ME, 8, 100, 5000, Status.ALIVE))
    assert bench.node.status()["incarnation"] == 9


def test_two_devices_with_one_identity_are_reported_and_do_not_race() -> None:
    bench = Bench()
    bench.pass_time(20.0)
    bench.effects.clear()
    for round_number in range(200):
        incarnation = bench.node.status()["incarnation"] + 1
        entry = Entry(ME, incarnation, 1, round_number, Status.ALIVE)
        bench.hear(Beat("coeld", ME, incarnation, 1, round_number, "0" * 16))
        bench.beat(PEER, round_number, entry)
        bench.pass_time(0.05)
    assert len([r for r in of(Report, bench.effects) if "identity" in r.text]) == 1
    assert bench.node.status()["counters"]["twin"] >= 200
    assert bench.node.status()["incarnation"] <= 3 + 2 * 22, "one jump per heartbeat"
    assert len(of(Publish, bench.effects)) <= 4 * 22


def test_messages_of_other_swarms_and_with_forged_senders_are_counted_and_ignored() -> None:
    bench = Bench()
    bench.hear(Delta("other", PEER, 1, (replace(peer(), origin=PEER),)))
    bench.feed(MessageReceived(THIRD, Delta("coeld", PEER, 1, (peer(),))))
    status = bench.node.status()
    assert status["counters"]["other_swarm"] == status["counters"]["forged_sender"] == 1
    assert [member["node"] for member in status["members"]] == [ME]


def asks(effects: list[Effect]) -> list[tuple[NodeId, Ask]]:
    return [(s.to, s.message) for s in of(Send, effects) if isinstance(s.message, Ask)]


def test_a_device_that_is_behind_asks_one_of_those_that_are_ahead() -> None:
    bench = Bench()
    news = Entry(THIRD, 1, 5, 9, Status.ALIVE)
    bench.meet(peer())
    bench.pass_time(0.2)
    bench.beat(PEER, 1)
    asked = asks(bench.beat(PEER, 2, news))
    assert [(to, ask.wanted) for to, ask in asked] == [(PEER, (THIRD,))]
    assert asks(bench.beat(PEER, 3, news)) == [], "it has just asked"
    bench.pass_time(0.3)
    assert asks(bench.beat(PEER, 4, news)), "no answer came"


def test_who_asks_is_given_the_records_it_wants_and_only_those() -> None:
    bench = Bench()
    bench.meet(peer())
    bench.meet(peer(node=THIRD))
    answers = of(Send, bench.hear(Ask("coeld", PEER, 1, wanted=(THIRD, NodeId("9" * 16)))))
    assert [answer.to for answer in answers] == [PEER]
    records = answers[0].message.records  # type: ignore[union-attr]
    assert [record.origin for record in records] == [THIRD]


def test_a_view_that_is_another_twice_is_compared_and_a_first_contact_at_once() -> None:
    bench = Bench()
    bench.pass_time(1.0)
    assert asks(bench.beat(PEER, 1, view="0" * 16))[0][1].sums
    bench.meet(peer())
    bench.pass_time(0.5)
    assert asks(bench.beat(PEER, 2, view="1" * 16)) == [], "news may be under way"
    bench.pass_time(0.5)
    assert asks(bench.beat(PEER, 3, view="2" * 16))[0][1].sums
    bench.beat(PEER, 4)
    bench.pass_time(0.6)
    assert asks(bench.beat(PEER, 5, view="3" * 16)) == [], "they agreed in between"


def test_who_compares_is_told_of_everybody_in_the_parts_that_differ() -> None:
    bench = Bench()
    bench.meet(peer())
    bench.meet(peer(node=THIRD))
    answers = of(Send, bench.hear(Ask("coeld", PEER, 1, sums=(0,))))
    (digest,) = [a.message for a in answers if isinstance(a.message, Digest)]
    assert {entry.node for entry in digest.entries} == {ME, PEER, THIRD}
    assert digest.parts == len(digest.differing) == 1


def test_a_digest_is_answered_with_what_is_newer_here() -> None:
    bench = Bench()
    bench.meet(peer())
    bench.meet(peer(node=THIRD))
    mine = bench.node.perception.me
    shown = (Entry(ME, 3, mine.seq, 1, Status.ALIVE), Entry(PEER, 1, 1, 1, Status.ALIVE))
    sent = of(Send, bench.hear(Digest("coeld", PEER, 1, shown, 1, (0,))))
    assert [[e.node for e in s.message.entries] for s in sent] == [[THIRD]]  # type: ignore[union-attr]
    assert of(Send, bench.hear(Digest("coeld", PEER, 1, shown))) == [], "complete for no part"


def test_a_broker_is_connected_once_per_life_of_its_device() -> None:
    bench = Bench()
    record = peer()
    assert of(Connect, bench.meet(record)) == [Connect(PEER, f"{PEER}.local", 1883)]
    assert not of(Connect, bench.meet(replace(record, seq=2)))
    assert not of(Connect, bench.pass_time(1.0))
    assert of(Connect, bench.meet(replace(record, incarnation=2))) == [
        Connect(PEER, f"{PEER}.local", 1883)
    ]


def test_a_lot_that_cannot_be_loaded_is_reported_offered_to_others_and_tried_again() -> None:
    bench = Bench()
    bench.engine()
    load = of(LoadLots, bench.pass_time(1.0))[0]
    effects = bench.feed(LoadFailed(load.lots[:1], "bad block"), LotsLoaded(load.lots[1:]))
    assert any("bad block" in report.text for report in of(Report, effects))
    bench.pass_time(0.1)
    assert bench.node.status()["members"][0]["claimed"] == 7
    assert of(LoadLots, bench.pass_time(2.0))[0].lots == load.lots[:1]


def test_reports_of_an_engine_that_is_gone_are_counted_and_ignored() -> None:
    bench = Bench()
    bench.feed(LotsLoaded((Lot(0, 0),)), LoadFailed((Lot(0, 1),), "late"))
    assert bench.node.status()["counters"]["stale_engine_reports"] == 2


def test_a_smaller_budget_drops_lots_at_once() -> None:
    bench = Bench()
    bench.loaded()
    bench.feed(ResourcesSampled(replace(BIG, memory_budget_bytes=10_000)))
    drops = of(DropLots, bench.effects + bench.pass_time(0.1))
    assert sum(len(drop.lots) for drop in drops) == 3


def test_leaving_withdraws_everything_and_ends_the_node() -> None:
    bench = Bench()
    bench.loaded()
    delta, beat = (effect.message for effect in bench.node.leave())  # type: ignore[union-attr]
    assert isinstance(delta, Delta)
    assert delta.records[0].serving == ()
    assert isinstance(beat, Beat)
    assert [(entry.node, entry.status) for entry in beat.news] == [(ME, Status.LEFT)]
    assert bench.feed(Tick()) == []


def test_status_is_plain_json() -> None:
    bench = Bench()
    bench.meet(peer(Lot(0, 0)))
    bench.loaded()
    status = json.loads(json.dumps(bench.node.status()))
    assert status["me"] == ME
    assert [member["name"] for member in status["members"]] == ["me", "peer"]
    assert status["owners"][PEER] == [[0, 0, 1]]
    assert status["routes"]["covered"] == status["routes"]["total"] == 8


def test_every_published_message_passes_the_codec() -> None:
    bench = Bench()
    bench.loaded()
    bench.pass_time(3.0)
    for effect in bench.effects:
        if isinstance(effect, Publish | Send):
            encode(effect.message)


def test_the_deadline_is_never_in_the_past_after_a_step() -> None:
    bench = Bench()
    bench.loaded()
    for _ in range(200):
        bench.now = bench.node.deadline
        bench.feed(Tick())
        assert bench.node.deadline > bench.now


def test_a_budget_below_the_trunk_is_said_once_and_claims_nothing() -> None:
    bench = Bench()
    small = Resources(DEMAND.trunk_bytes - 1, 20_000, 5, 4000)
    bench.feed(ResourcesSampled(small), EngineStarted(DEMAND, "10.0.0.1", 9000))
    bench.pass_time(5.0)
    told = [report.text for report in of(Report, bench.effects) if "smaller" in report.text]
    assert len(told) == 1
    assert str(DEMAND.trunk_bytes) in told[0]
    assert bench.node.perception.me.claims == ()


def test_a_device_that_is_gone_owns_nothing_in_the_status() -> None:
    bench = Bench()
    bench.engine()
    bench.meet(peer(Lot(0, 0)))
    bench.beat(PEER, 2)

    def row() -> dict[str, object]:
        return next(m for m in bench.node.status()["members"] if m["node"] == PEER)

    assert (row()["serving"], row()["claimed"], row()["engine"]) == (1, 1, True)
    bench.feed(NeighbourLost(PEER))
    bench.pass_time(5.0)
    assert row()["status"] == "dead"
    assert (row()["serving"], row()["claimed"], row()["engine"]) == (0, 0, False)
