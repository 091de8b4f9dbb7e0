"""Requests along legs at other devices: real engines on a tiny model, with real sockets."""

import threading
import time
from random import Random

import numpy as np
import pytest

from coeld.datapath import doors
from coeld.datapath.frames import SpanCall
from coeld.datapath.request import Request
from coeld.engine.measure import Silent
from coeld.errors import CacheLost, PeerRefused
from coeld.ids import NodeId
from coeld.routes import Leg
from tests.harness.span_devices import (
    DEADLINE_S,
    EXPERTS,
    LAYERS,
    LOTS,
    PROMPT,
    TOKENS,
    A,
    B,
    C,
    Device,
    forget,
    guest_bytes_become,
    table,
)


@pytest.mark.parametrize("seed", range(12))
def test_any_legs_give_the_tokens_of_one_device(device, expected, seed: int) -> None:
    rng = Random(seed)
    devices = [device(node) for node in (A, B, C)]
    stops = sorted({rng.randint(1, LAYERS) for _ in range(2)} | {LAYERS})
    legs = [
        Leg(rng.choice((A, B, C)), first, stop)
        for first, stop in zip([0, *stops], stops, strict=False)
    ]
    spans = [leg for leg in legs if rng.random() < 0.5]
    routes = table(devices, legs, spans)
    for each in devices:
        each.follow(routes)
    assert devices[0].answer() == expected, f"seed={seed} {legs} {spans}"
    asked = {leg.node for leg in legs} - {A}
    assert {n for n, stats in devices[0].pool.stats().items() if stats.calls} == asked
    assert all(guest_bytes_become(each, 0) for each in devices)


def test_a_span_dispatches_the_experts_that_its_device_lacks(device, expected) -> None:
    here = [lot for lot in LOTS if lot.expert < 3]
    devices = [device(A), device(B, lots=here), device(C, lots=sorted(set(LOTS) - set(here)))]
    routes = table(devices, [Leg(B, 0, 2), Leg(C, 2, 3)])
    for each in devices:
        each.follow(routes)
    assert devices[0].answer() == expected
    assert devices[1].pool.stats()[A].calls > TOKENS  # A has all: whole layers go to it


def test_single_calls_fit_requests_that_are_longer_than_the_context_of_who_is_called(
    device, expected
) -> None:
    """Which is why a device whose context is shorter than another's offers no spans."""
    here = [lot for lot in LOTS if lot.layer == 0]
    short = len(PROMPT) + 5
    devices = [device(A, lots=here), device(B, lots=sorted(set(LOTS) - set(here)), context=short)]
    for each in devices:
        each.follow(table(devices))
    assert len(expected) > 5
    assert devices[0].answer() == expected


def test_the_time_of_an_answer_is_told_by_where_it_went(device, tiny) -> None:
    """With everything here and with a leg elsewhere: nothing is counted twice, and bytes are those
    of the rows."""
    devices = [device(A), device(B)]
    row_bytes = 4 * tiny.shape.hidden
    for legs, sent_rows in (((), 0), ((Leg(A, 0, 1), Leg(B, 1, 3)), 1)):
        routes = table(devices, legs)
        for each in devices:
            each.follow(routes)
        request = Request("r", PROMPT, 5, Silent())
        devices[0].model.scheduler.submit(request)
        devices[0].finish()
        for split, took_s, rows, answered in (
            (request.prefill_split, request.prefill_s, len(PROMPT), 1),
            (request.split, request.decode_s, 4, 4),
        ):
            parts = (split.trunk_s, split.experts_s, split.wire_s, split.wait_s)
            assert min(parts) >= 0
            assert sum(parts) <= took_s
            assert split.trunk_s > 0
            assert split.sent_bytes == sent_rows * rows * row_bytes
            assert split.received_bytes == sent_rows * answered * row_bytes
            assert (split.wire_s > 0) == bool(sent_rows)


@pytest.mark.parametrize("when", [0, 1, 2, 7, 19])
def test_a_device_that_goes_takes_nothing_of_the_answer_along(device, expected, when) -> None:
    devices = [device(A), device(B), device(C)]
    routes = table(devices, [Leg(A, 0, 1), Leg(B, 1, 2), Leg(C, 2, 3)], [Leg(B, 1, 2)])
    for each in devices:
        each.follow(routes)
    listener = devices[0].submit()
    for _ in range(when):
        devices[0].model.scheduler.turn()
    devices[1].server.close()
    devices[0].finish()
    assert listener.tokens == expected
    assert devices[0].failed == [B]
    assert guest_bytes_become(devices[2], 0)


def test_only_what_was_lost_is_run_again(device, expected) -> None:
    devices = [device(A), device(B), device(C)]
    legs = [Leg(A, 0, 1), Leg(B, 1, 2), Leg(C, 2, 3)]
    routes = table(devices, legs)
    for each in devices:
        each.follow(routes)
    listener = devices[0].submit()
    for _ in range(12):
        devices[0].model.scheduler.turn()
    request = devices[0].model.scheduler.active[0]
    devices[1].server.close()
    while len(listener.tokens) < 13:
        devices[0].model.scheduler.turn()
        assert request.journey.behind <= 1 / LAYERS + 1e-9
    devices[0].finish()
    assert listener.tokens == expected
    calls = {node: stats.calls for node, stats in devices[0].pool.stats().items()}
    assert calls == {B: 12, C: TOKENS}, "a call for each pass, none twice"


@pytest.mark.parametrize("seed", range(12))
def test_ways_that_change_and_devices_that_forget_leave_the_answer_as_it_is(
    device, expected, seed: int
) -> None:
    rng = Random(seed)
    devices = [device(node) for node in (A, B, C)]

    def legs() -> list[Leg]:
        stops = sorted({rng.randint(1, LAYERS) for _ in range(2)} | {LAYERS})
        ends = zip([0, *stops], stops, strict=False)
        found: list[Leg] = []
        for first, stop in ends:
            node = rng.choice((A, B, C))
            if found and found[-1].node == node:
                first = found.pop().first
            found.append(Leg(node, first, stop))
        return found

    for each in devices:
        each.follow(table(devices, legs()))
    listener = devices[0].submit()
    for epoch in range(2, 7):
        for _ in range(rng.randint(0, 12)):
            devices[0].model.scheduler.turn()
        for request in devices[0].model.scheduler.active:
            devices[0].follow(table(devices, legs(), epoch=epoch))
            request.astray = request.journey is not None  # as after a call that failed
            if request.astray and rng.random() < 0.3:
                node = rng.choice((B, C))
                request.journey.lose(node)
                forget(devices[0], request, node)
    devices[0].finish()
    assert listener.tokens == expected, f"seed={seed}"
    assert all(guest_bytes_become(each, 0) for each in devices)


def test_a_closed_layer_that_is_called_opens_again_and_closes_when_it_is_not(
    device, expected, monkeypatch
) -> None:
    devices = [device(A, lots=LOTS[:EXPERTS]), device(B)]
    routes = table(devices, spans=[Leg(B, 1, 3)])
    for each in devices:
        each.follow(routes)
    x = rows(1, devices[1].model.manifest.shape.hidden)
    run = devices[1].model.run_for_peer
    with pytest.raises(PeerRefused):
        run(1, range(EXPERTS), x, None)
    devices[1].model.refit()
    assert run(2, range(EXPERTS), x, None).shape == x.shape
    assert devices[0].answer() == expected
    left_s = devices[1].model.doors.shuts_in_s()
    assert 0 < left_s <= doors.OPEN_S
    monkeypatch.setattr(time, "monotonic", lambda now=time.monotonic: now() + doors.OPEN_S)
    assert devices[1].model.doors.shuts_in_s() is None
    devices[1].model.refit()
    with pytest.raises(PeerRefused):
        run(1, range(EXPERTS), x, None)


def test_a_device_that_forgot_is_given_the_tokens_again(device, expected) -> None:
    devices = [device(A), device(B)]
    routes = table(devices, [Leg(A, 0, 1), Leg(B, 1, 3)], [Leg(B, 1, 3)])
    for each in devices:
        each.follow(routes)
    listener = devices[0].submit()
    for _ in range(6):
        devices[0].model.scheduler.turn()
    request = devices[0].model.scheduler.active[0]
    forget(devices[0], request, B)
    devices[0].finish()
    assert (listener.tokens, devices[0].failed) == (expected, [])
    assert len(request.stalls_s) == 1


def test_a_leg_under_way_keeps_its_borders_whatever_newer_routes_say(device, expected) -> None:
    devices = [device(A), device(B)]
    routes = table(devices, [Leg(A, 0, 1), Leg(B, 1, 3)], [Leg(B, 1, 3)])
    for each in devices:
        each.follow(routes)
    listener = devices[0].submit()
    for _ in range(6):
        devices[0].model.scheduler.turn()
    devices[1].follow(table(devices, spans=[Leg(B, 0, 3)], epoch=2))  # needs no border at 1
    request = devices[0].model.scheduler.active[0]
    devices[0].finish()
    assert (listener.tokens, devices[0].failed, request.stalls_s) == (expected, [], [])
    assert guest_bytes_become(devices[1], 0)
    devices[1].follow(table(devices, spans=[Leg(B, 0, 3)], epoch=3))
    with pytest.raises(PeerRefused, match="no span"):
        devices[1].model.welcome().span(
            SpanCall(1, 0, 1, 3, 1), rows(1, devices[1].model.manifest.shape.hidden)
        )


def test_a_guest_whose_experts_cannot_be_reached_is_told_so_before_its_caller_gives_up(
    device, tiny
) -> None:
    devices = [device(A, lots=()), device(B, lots=LOTS[:EXPERTS])]
    for each in devices:
        each.follow(table(devices))
    began_s = time.monotonic()
    with pytest.raises(PeerRefused, match="cannot be reached"):
        devices[1].model.welcome().span(SpanCall(1, 0, 0, 3, 1), rows(1, tiny.shape.hidden))
    assert time.monotonic() - began_s < devices[1].model.dispatcher.patience_s


def test_a_request_that_set_out_by_cuts_finds_the_span_when_its_experts_are_fused(
    device, expected
) -> None:
    """As when a swarm forms: the routes name spans, their devices are still building graphs."""
    devices = [device(A, lots=LOTS[:EXPERTS]), device(B)]
    for each in devices:
        each.follow(table(devices))
    listener = devices[0].submit()
    for _ in range(6):
        devices[0].model.scheduler.turn()
    spans = [Leg(A, 0, 1), Leg(B, 1, 3)]
    routes = table(devices, spans, spans, epoch=2)
    devices[1].follow(routes)  # from now on nobody can call its experts
    devices[0].model.board.pin(routes)
    devices[0].finish()
    assert (listener.tokens, devices[0].failed) == (expected, [])


def test_two_devices_that_run_each_others_layers_do_not_wait_for_each_other(
    device, expected
) -> None:
    devices = [device(A), device(B)]
    spans = [Leg(A, 0, 2), Leg(B, 2, 3)]
    for each in devices:
        each.follow(table(devices, spans, spans))
    answers: dict[NodeId, list[int]] = {}

    def ask(device: Device) -> None:
        answers[device.node] = device.answer()

    threads = [threading.Thread(target=ask, args=(each,)) for each in devices]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert answers == {A: expected, B: expected}


@pytest.fixture
def host(device):
    """A device that serves layers 1 and 2, and the rows of a prompt at its border."""
    made = device(B)
    made.follow(table([made, device(A)], spans=[Leg(B, 1, 3)]))
    return made


def rows(count: int, hidden: int) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, hidden)).astype(np.float32)


def test_a_guest_may_go_on_where_it_stopped_or_go_back(host, tiny) -> None:
    guest, x = host.model.welcome(), rows(4, tiny.shape.hidden)
    assert guest.span(SpanCall(1, 0, 1, 3, 4), x).shape == (4, tiny.shape.hidden)
    first = guest.span(SpanCall(1, 4, 1, 3, 1), x)
    assert first.shape == (1, tiny.shape.hidden)
    assert guest.span(SpanCall(1, 4, 1, 3, 4), 2 * x).shape == (4, tiny.shape.hidden)
    assert (guest.span(SpanCall(1, 4, 1, 3, 1), x) == first).all()
    for asked in (
        SpanCall(1, 9, 1, 3, 1),  # ahead
        SpanCall(2, 8, 1, 3, 1),  # another request
        SpanCall(1, 8, 1, 2, 1),  # other layers
    ):
        with pytest.raises(CacheLost):
            guest.span(asked, x)
    assert guest.span(SpanCall(1, 8, 1, 3, 1), x).shape == (1, tiny.shape.hidden)
    guest.close()
    assert host.model.guests.bytes == 0


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (SpanCall(1, 0, 0, 2, 1), "no span"),
        (SpanCall(1, 0, 1, 4, 1), "a model of 3"),
        (SpanCall(1, 254, 1, 3, 1), "context here is 256"),
    ],
)
def test_what_a_device_cannot_run_is_refused(host, tiny, asked, why) -> None:
    guest = host.model.welcome()
    with pytest.raises(PeerRefused, match=why):
        guest.span(asked, rows(4, tiny.shape.hidden))


def test_guests_together_get_no_more_memory_than_they_may(device, tiny) -> None:
    made = device(B, guests_max=1)
    made.follow(table([made, device(A)], spans=[Leg(B, 0, 3)]))
    x, many = rows(2, tiny.shape.hidden), rows(250, tiny.shape.hidden)
    first, second = made.model.welcome(), made.model.welcome()
    first.span(SpanCall(1, 0, 0, 3, 1), many)
    with pytest.raises(PeerRefused, match="no memory"):
        second.span(SpanCall(1, 0, 0, 3, 1), x)
    first.free(1)
    assert second.span(SpanCall(1, 0, 0, 3, 1), x).shape == (1, tiny.shape.hidden)
    second.close()
    assert made.model.guests.bytes == 0


def test_caches_of_a_caller_that_vanishes_are_freed(device) -> None:
    devices = [device(A), device(B)]
    for each in devices:
        each.follow(table(devices, [Leg(A, 0, 1), Leg(B, 1, 3)]))
    devices[0].submit()
    devices[0].model.scheduler.turn()
    assert devices[1].model.guests.bytes > 0
    devices[0].pool.close()
    assert guest_bytes_become(devices[1], 0)
