"""Requests that change their way: beside the answer, because routes changed or a leg is late."""

import threading
from random import Random

import pytest

from coeld.datapath import catch_up, decoder
from coeld.datapath.frames import SpanCall
from coeld.datapath.request import Cancelled, Request
from coeld.engine.measure import Silent
from coeld.routes import Leg
from tests.harness.span_devices import (
    DEADLINE_S,
    PROMPT,
    TOKENS,
    A,
    B,
    C,
    Device,
    guest_bytes_become,
    table,
)


@pytest.mark.parametrize("seed", range(12))
def test_a_request_goes_over_to_new_routes_between_two_tokens(
    device, expected, monkeypatch, seed: int
) -> None:
    monkeypatch.setattr(decoder, "SETTLED_S", 0.0)
    rng = Random(seed)
    devices = [device(node) for node in (A, B, C)]
    ways = [
        [Leg(A, 0, 1), Leg(B, 1, 3)],
        [Leg(A, 0, 1), Leg(C, 1, 3)],
        [Leg(A, 0, 1), Leg(B, 1, 2), Leg(C, 2, 3)],
        [Leg(B, 0, 2), Leg(A, 2, 3)],
        [Leg(C, 0, 3)],
        [Leg(A, 0, 3)],
    ]
    rng.shuffle(ways)
    for each in devices:
        each.follow(table(devices, ways[0]))
    listener = devices[0].submit(120)
    for epoch, way in enumerate(ways[1:], 2):
        for _ in range(rng.randint(1, 5)):
            devices[0].model.scheduler.turn()
        devices[0].follow(table(devices, way, epoch=epoch))
        (request,) = devices[0].model.scheduler.active
        for _ in range(20):
            if request.journey.way == tuple(way):
                break
            assert request.catching is None or request.catching.wait(DEADLINE_S)
            devices[0].model.scheduler.turn()
        assert request.journey.way == tuple(way), f"seed={seed}"
        gone = {B, C} - {leg.node for leg in way}
        assert all(guest_bytes_become(d, 0) for d in devices if d.node in gone)
    devices[0].finish()
    assert (request.stalls_s, devices[0].failed) == ([], [])
    alone = Device(devices[0].model.manifest, device.store, A)
    alone.model.refit()
    alone.close()
    assert listener.tokens == alone.answer(120), f"seed={seed}"
    assert all(guest_bytes_become(each, 0) for each in devices)


class Gate:
    """Holds a device's spans back, or lets so many through."""

    def __init__(self, device: Device, monkeypatch) -> None:
        self.asked: list[SpanCall] = []
        self.came, self.open = threading.Semaphore(0), threading.Semaphore(0)
        welcome = device.model.welcome

        def gated():
            host = welcome()
            span = host.span

            def held(asked: SpanCall, x):
                self.asked.append(asked)
                self.came.release()
                assert self.open.acquire(timeout=DEADLINE_S)
                return span(asked, x)

            host.span = held
            return host

        monkeypatch.setattr(device.server, "_welcome", gated)

    def let(self, count: int = 1 << 20) -> None:
        self.open.release(count)


@pytest.fixture
def late(device, monkeypatch):
    """A asks B for layer 1, which C serves too. Calls of both are held back."""
    monkeypatch.setattr(decoder, "LATE_S_MIN", 0.2)
    devices = [device(A), device(B), device(C)]
    routes = table(devices, [Leg(A, 0, 1), Leg(B, 1, 2), Leg(A, 2, 3)], [Leg(C, 1, 2)])
    for each in devices:
        each.follow(routes)
    gates = [Gate(each, monkeypatch) for each in devices[1:]]
    yield devices, *gates
    for gate in gates:
        gate.let()


def test_a_leg_that_is_late_is_run_elsewhere_and_its_device_is_not_called_dead(
    late, expected
) -> None:
    devices, at_b, at_c = late
    at_b.let(8)
    at_c.let()
    assert devices[0].answer() == expected
    assert devices[0].failed == []
    assert [asked.position for asked in at_b.asked] == [0, *range(len(PROMPT), len(PROMPT) + 8)]
    positions = [0, *range(len(PROMPT), len(PROMPT) + TOKENS - 1)]
    assert [asked.position for asked in at_c.asked] == positions, "each token once"
    at_b.let()
    assert guest_bytes_become(devices[1], 0)
    assert guest_bytes_become(devices[2], 0)


def test_an_answer_that_comes_late_but_first_is_taken(late, expected) -> None:
    devices, at_b, at_c = late
    at_b.let(8)

    def release() -> None:
        assert at_c.came.acquire(timeout=DEADLINE_S)
        at_b.let()

    releasing = threading.Thread(target=release)
    releasing.start()
    assert devices[0].answer() == expected
    releasing.join()
    assert devices[0].failed == []
    assert len(at_b.asked) == TOKENS
    assert len(at_c.asked) == 1
    at_c.let()
    assert guest_bytes_become(devices[2], 0)


def catching_up_at_c(devices: list[Device], at_b: Gate, monkeypatch) -> tuple[Silent, Request]:
    """An answer over B, after nine tokens, to which another way is told; that one waits for C."""
    monkeypatch.setattr(decoder, "SETTLED_S", 0.0)
    monkeypatch.setattr(decoder, "LATE_S_MIN", DEADLINE_S)
    at_b.let()
    listener = devices[0].submit()
    turn, (request,) = devices[0].model.scheduler.turn, devices[0].model.scheduler.active
    while len(listener.tokens) < 9:
        turn()
    devices[0].follow(table(devices, [Leg(A, 0, 1), Leg(C, 1, 2), Leg(A, 2, 3)], epoch=2))
    turn()
    return listener, request


def test_what_has_caught_up_mends_a_way_that_is_lost_meanwhile(late, expected, monkeypatch) -> None:
    devices, at_b, at_c = late
    listener, request = catching_up_at_c(devices, at_b, monkeypatch)
    at_c.let(5)
    for _ in range(6):
        assert at_c.came.acquire(timeout=DEADLINE_S)
    devices[1].server.close()
    at_c.let()
    devices[0].finish()
    assert listener.tokens == expected
    assert len(request.stalls_s) == 1
    positions = [0, *range(len(PROMPT), len(PROMPT) + TOKENS - 1)]
    assert [asked.position for asked in at_c.asked] == positions, "none of five is run again"
    assert guest_bytes_become(devices[2], 0)


def test_a_device_that_does_not_answer_a_catch_up_holds_no_other_answer_up(
    late, expected, monkeypatch
) -> None:
    devices, at_b, at_c = late
    monkeypatch.setattr(catch_up, "PASS_S", 0.05)
    listener, request = catching_up_at_c(devices, at_b, monkeypatch)
    assert at_c.came.acquire(timeout=DEADLINE_S)
    devices[1].server.close()
    devices[0].follow(table(devices, [Leg(A, 0, 3)], epoch=3))
    devices[0].finish()
    assert listener.tokens == expected
    assert request.catching is None
    assert len(at_c.asked) == 1
    at_c.let()
    assert guest_bytes_become(devices[2], 0)


def test_who_leaves_while_it_goes_over_leaves_nothing_behind(device, monkeypatch) -> None:
    monkeypatch.setattr(decoder, "SETTLED_S", 0.0)
    devices = [device(node) for node in (A, B, C)]
    for each in devices:
        each.follow(table(devices, [Leg(A, 0, 1), Leg(B, 1, 2), Leg(A, 2, 3)]))
    devices[0].submit(100)
    scheduler = devices[0].model.scheduler
    (request,) = scheduler.active
    for _ in range(6):
        scheduler.turn()
    devices[0].follow(table(devices, [Leg(C, 0, 1), Leg(A, 1, 3)], epoch=2))
    scheduler.turn()
    assert request.catching is not None
    assert request.catching.wait(DEADLINE_S)
    front, forward = request.journey, devices[0].model.decoder.forward

    def leave(journey, *rest):
        if journey is not front:
            assert devices[2].model.guests.bytes > 0
            request.cancelled.set()
            raise Cancelled
        return forward(journey, *rest)

    monkeypatch.setattr(devices[0].model.decoder, "forward", leave)
    scheduler.turn()
    assert scheduler.active == []
    assert all(guest_bytes_become(each, 0) for each in devices)
