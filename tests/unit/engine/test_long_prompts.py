"""Long prompts that are at several devices at once: real engines on a tiny model."""

from random import Random

import pytest

from coeld.datapath import pipeline
from coeld.datapath import request as requests
from coeld.routes import Leg
from tests.harness.span_devices import LAYERS, A, B, C, Device, forget, guest_bytes_become, table


@pytest.fixture
def long(tiny, tiny_store, monkeypatch):
    """Chunks of 4 tokens; a prompt of seven and a bit, and what one device answers."""
    for module in (requests, pipeline):
        monkeypatch.setattr(module, "PREFILL_CHUNK_TOKENS", 4)
    prompt = [5 + 7 * n % 50 for n in range(30)]
    alone = Device(tiny, tiny_store, A)
    alone.model.refit()
    alone.close()
    return prompt, alone.answer(8, prompt)


@pytest.mark.parametrize("seed", range(12))
def test_a_long_prompt_is_at_several_devices_at_once_and_gives_the_same(
    device, long, monkeypatch, seed: int
) -> None:
    """Legs at random, also two at one device; sometimes one is lost on the way, or routes
    change."""
    rng, (prompt, expected) = Random(seed), long
    devices = [device(node) for node in (A, B, C)]
    stops = sorted({rng.randint(1, LAYERS) for _ in range(3)} | {LAYERS})
    nodes = [rng.choice((A, B, C)) for _ in stops]
    legs = [Leg(*ends) for ends in zip(nodes, [0, *stops], stops, strict=False)]
    legs = [leg for n, leg in enumerate(legs) if n == 0 or nodes[n] != nodes[n - 1]] or legs
    legs = [
        Leg(leg.node, leg.first, after.first if after else LAYERS)
        for leg, after in zip(legs, [*legs[1:], None], strict=True)
    ]
    for each in devices:
        each.follow(table(devices, legs))
    listener = devices[0].submit(8, prompt)
    turns = rng.randint(1, 9)
    for _ in range(turns):
        devices[0].model.scheduler.turn()
    (request,) = devices[0].model.scheduler.active
    if len(legs) > 1 and len(prompt) > 4 * turns:
        lengths = [stage.length for stage in request.journey.stages]
        assert lengths == sorted(lengths, reverse=True)
        assert lengths[0] == min(4 * turns, 30), f"seed={seed}: one chunk further each turn"
        assert lengths[-1] == max(0, 4 * (turns - len(lengths) + 1)), f"seed={seed} {lengths}"
    if rng.random() < 0.7:
        request.astray = True
        node = rng.choice((B, C))
        request.journey.lose(node)
        forget(devices[0], request, node)
    devices[0].finish()
    assert listener.tokens == expected, f"seed={seed} {legs}"
    assert devices[0].failed == []
    assert all(guest_bytes_become(each, 0) for each in devices)


def test_a_device_that_goes_during_a_long_prompt_takes_nothing_along(device, long) -> None:
    prompt, expected = long
    devices = [device(A), device(B), device(C)]
    legs = [Leg(A, 0, 1), Leg(B, 1, 2), Leg(C, 2, 3)]
    for each in devices:
        each.follow(table(devices, legs))
    listener = devices[0].submit(8, prompt)
    for _ in range(4):
        devices[0].model.scheduler.turn()
    devices[1].server.close()
    devices[0].finish()
    assert listener.tokens == expected
    assert devices[0].failed == [B]
    calls = devices[0].pool.stats()[C].calls
    assert calls == 8 + 7, "what the last stage has run, it does not run again"
