"""Changing the plan, and loading, while an answer is under way: the decoder waits for neither."""

import gc
import os
import threading
import time
import weakref

import pytest

from coeld.datapath.request import Request
from coeld.engine.measure import ME, NoPeers, Silent
from coeld.engine.open_model import FLOWING_S, OpenModel
from coeld.engine.side_by_side import AHEAD, NICENESS, side_by_side
from coeld.ids import Lot, NodeId
from coeld.model.store import Store
from coeld.routes import RouteTable

PROMPT, TOKENS = list(range(5, 14)), 30
WAIT_S = 30


class Gate:
    """Stops whoever passes until it is opened."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, *_anything) -> None:
        self.reached.set()
        assert self.opened.wait(WAIT_S)


class GatedStore(Store):
    """A store whose disk is as slow as a gate."""

    gate: Gate | None = None

    def damaged(self, refs) -> list:
        if self.gate is not None:
            self.gate()
        return super().damaged(refs)


@pytest.fixture
def model(tiny, tiny_store) -> OpenModel:
    model = OpenModel(tiny, GatedStore(tiny_store.root), me=ME, peers=NoPeers(), context_tokens=256)
    model.hold_everything()
    return model


@pytest.fixture
def expected(model) -> list[int]:
    listener = start(model)
    finish(model)
    return listener.tokens


def start(model: OpenModel) -> Silent:
    listener = Silent()
    model.scheduler.submit(Request("r", PROMPT, TOKENS, listener))
    for _ in range(5):
        model.scheduler.turn()
    return listener


def finish(model: OpenModel) -> None:
    while model.scheduler.active:
        model.scheduler.turn()


def meet_a_peer(model: OpenModel) -> None:
    peer = {NodeId("b" * 16): ("127.0.0.1", 1)}
    model.board.pin(RouteTable(model.manifest.hash, 1, {}, peer))


def test_tokens_keep_coming_while_a_change_is_being_prepared(model, expected) -> None:
    listener, building, changes = start(model), Gate(), []
    meet_a_peer(model)
    loader = threading.Thread(target=lambda: changes.append(model.fitter.prepare(building)))
    loader.start()
    assert building.reached.wait(WAIT_S)
    before = len(listener.tokens)
    for _ in range(10):
        model.scheduler.turn()
    assert not changes, "the change is still being prepared"
    assert len(listener.tokens) == before + 10
    building.opened.set()
    loader.join(WAIT_S)
    model.scheduler.turn()
    assert model.plan == "1 graph, 0 cuts"
    model.fitter.adopt(changes[0])
    model.scheduler.turn()
    assert model.plan == "4 graphs, 3 cuts"
    assert model.fitter.settle()
    finish(model)
    assert listener.tokens == expected


def test_a_change_is_adopted_while_a_load_is_under_way(model, expected) -> None:
    listener, disk = start(model), Gate()
    meet_a_peer(model)
    change = model.fitter.prepare()
    assert change is not None
    model.experts.drop([Lot(1, 0)])
    model.experts._store.gate = disk
    loader = threading.Thread(target=model.experts.load, args=([Lot(1, 0)],))
    loader.start()
    assert disk.reached.wait(WAIT_S)
    model.fitter.adopt(change)
    assert loader.is_alive()
    assert model.plan == "4 graphs, 3 cuts"
    disk.opened.set()
    loader.join(WAIT_S)
    assert model.fitter.settle()
    finish(model)
    assert listener.tokens == expected


def test_old_graphs_are_kept_until_they_are_settled(model) -> None:
    start(model)
    old = weakref.ref(next(iter(model.trunk.plan.sessions.values())))
    meet_a_peer(model)
    change = model.fitter.prepare()
    assert change is not None
    model.fitter.adopt(change)
    model.scheduler.turn()
    gc.collect()
    assert old() is not None
    change = None
    assert model.fitter.settle()
    assert old() is None


def test_a_part_under_way_ends_on_the_graphs_it_began_with(model) -> None:
    """And these are let go of only when it has ended: the loader does not wait, it looks again."""
    lane, cache = model.trunk.lane(), model.trunk.new_cache()
    x = model.trunk.embed(PROMPT)
    meet_a_peer(model)
    change = model.fitter.prepare()
    assert change is not None
    with lane.part(cache, x, 0, 3, [8]) as part:
        model.fitter.adopt(change)
        assert not model.fitter.settle()
        assert model.fitter.prepare() is None
        assert [step.end for step in part.steps] == ["head"]
        part.run(part.steps[0])
        logits = part.out().copy()
    assert model.fitter.settle()
    assert int(logits[0].argmax()) == start(model).tokens[0]


def test_work_side_by_side_comes_back_in_order_and_fails_in_its_turn() -> None:
    gate, checked = Gate(), []

    def work(item: int) -> int:
        assert item in checked
        if item == 0:
            gate()  # finishes after item 1, which runs beside it
        elif item == 1:
            gate.opened.set()
        elif item == 3:
            raise ValueError("three")
        return item * item

    values = side_by_side(checked.append, work, range(1000))
    assert [next(values) for _ in range(3)] == [0, 1, 4]
    with pytest.raises(ValueError, match="three"):
        next(values)
    assert checked == list(range(len(checked)))


def test_what_fails_its_check_is_not_worked_on() -> None:
    worked: list[int] = []

    def check(item: int) -> None:
        if item == 2:
            raise ValueError("two")

    values = side_by_side(check, worked.append, range(1000))
    assert [next(values) for _ in range(2)] == [None, None]
    with pytest.raises(ValueError, match="two"):
        next(values)
    assert 2 not in worked


def test_no_more_is_read_ahead_than_is_allowed() -> None:
    most, checked, done = 0, 0, 0

    def check(_item: int) -> None:
        nonlocal checked
        checked += 1

    def work(_item: int) -> None:
        nonlocal most, done
        most = max(most, checked - done)  # the order of threads can only make it smaller
        done += 1

    assert len(list(side_by_side(check, work, range(200)))) == 200
    assert 1 <= most <= AHEAD


def test_loading_gives_way_while_tokens_flow(model) -> None:
    own = os.getpriority(os.PRIO_PROCESS, os.getpid())

    def nice(_item: int) -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    def niceness() -> set[int]:
        return set(side_by_side(lambda _item: None, nice, range(4), model.is_answering))

    assert niceness() == {own}
    start(model)
    model.turn()
    assert niceness() == {min(own + NICENESS, 19)}
    finish(model)
    assert niceness() == {own}
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == own


def test_a_request_that_waits_is_no_reason_to_give_way(model, monkeypatch) -> None:
    start(model)
    model.turn()
    assert model.is_answering()
    later = time.monotonic() + FLOWING_S
    monkeypatch.setattr("coeld.engine.open_model.time.monotonic", lambda: later)
    assert not model.is_answering()
