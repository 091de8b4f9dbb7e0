"""Real daemons with the real model: they organise themselves, lose devices, and go on.

Driven with the demo's own Device, so that the demo is tested too.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import demo
import pytest
from demo import Device, UnixConnection

from coeld.model.store import Store
from tests.conftest import REAL_MODEL

pytestmark = [pytest.mark.model, pytest.mark.swarm]
PROMPT = "Explain in a few sentences why the sky is blue."
SILENCE_S_MAX = 3.0
COLD_START_S_MAX = 10.0


@contextmanager
def swarm(folder: Path, budgets_mb: list[int], brokers: str = "") -> Iterator[list[Device]]:
    """Devices with these budgets, configured and started; stopped in the end."""
    devices = [Device(n + 1, folder / f"d{n + 1}") for n in range(len(budgets_mb))]
    ports = demo.free_ports(len(devices))
    for device, port, budget_mb in zip(devices, ports, budgets_mb, strict=True):
        device.configure(port, ports[0], budget_mb, threads=1)
        if brokers:
            path = device.folder / "agent.toml"
            path.write_text(path.read_text() + f'brokers = ["{brokers}"]\n')
    try:
        for device in devices:
            device.start()
        yield devices
    finally:
        demo.stop(devices)


@pytest.fixture(autouse=True)
def store(real_store: Store, monkeypatch) -> Store:
    monkeypatch.setenv("COELD_STORE", str(real_store.root))
    monkeypatch.setattr(demo, "ORGANISE_S_MAX", 60.0)
    return real_store


@pytest.fixture
def third(store: Store) -> int:
    """Megabytes with which two devices hold everything, one does not."""
    return demo.budget_mb(3)


def answer(device: Device, at: int = -1, then=None, tokens: int = 120) -> tuple[str, str, float]:
    """Greedy text, finish reason and the longest silence; `then` is called after `at` pieces."""
    text, reason, silence_s, pieces, last = "", "", 0.0, 0, None
    for chunk in demo.stream(device.socket, PROMPT, tokens):
        now = time.monotonic()
        if last is not None:
            silence_s = max(silence_s, now - last)
        last = now
        for choice in chunk["choices"]:
            reason = choice["finish_reason"] or reason
            text += choice["delta"].get("content") or ""
            pieces += 1
            if pieces == at:
                then()
    return text, reason, silence_s


def ask(device: Device) -> tuple[int, dict]:
    """One short request that is not streamed: status and body."""
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "temperature": 0}
    with closing(UnixConnection(device.socket)) as connection:
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        response = connection.getresponse()
        return response.status, json.loads(response.read())


def poll(check, timeout_s: float = 30.0):
    """The first true value of `check()`."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        value = check()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError("it did not happen in time")


def largest(devices: list[Device]) -> Device:
    return max(devices, key=demo.lots_served)


def test_three_devices_answer_and_a_killed_one_does_not_change_the_text(tmp_path, third) -> None:
    started = time.monotonic()
    with swarm(tmp_path, [third] * 3) as devices:
        demo.wait_settled(devices, 3, started)
        undisturbed, reason, silence_s = answer(devices[0])
        assert reason in ("stop", "length")
        first_token_s = time.monotonic() - started
        print(f"cold start to the end of the first answer {first_token_s:.1f} s")
        victim = largest(devices)
        asker = next(device for device in devices if device is not victim)
        text, reason, silence_s = answer(asker, 15, victim.kill)
        print(f"longest silence {silence_s:.2f} s")
        assert text == undisturbed
        assert silence_s <= SILENCE_S_MAX
        others = [device for device in devices if device is not victim]
        demo.wait_settled(others, 2, time.monotonic())
        assert answer(asker)[0] == undisturbed

        victim.start()
        demo.wait_settled(devices, 3, time.monotonic())
        assert answer(victim)[0] == undisturbed


def test_a_device_that_is_told_to_stop_hands_over_first_and_the_answer_goes_on(
    tmp_path, third
) -> None:
    with swarm(tmp_path, [third] * 3) as devices:
        demo.wait_settled(devices, 3, time.monotonic())
        undisturbed = answer(devices[0])[0]
        leaver = largest(devices[1:])
        text, _reason, silence_s = answer(devices[0], 15, leaver.terminate)
        print(f"longest silence {silence_s:.2f} s")
        assert text == undisturbed
        assert silence_s <= SILENCE_S_MAX
        assert leaver.process is not None
        assert leaver.process.wait(20) == 0


def test_from_cold_start_to_the_first_token(tmp_path, third) -> None:
    started = time.monotonic()
    with swarm(tmp_path, [third] * 3) as devices:
        poll(lambda: (status := devices[0].status()) and demo.covered(status))
        next(demo.stream(devices[0].socket, PROMPT, 2))
        took_s = time.monotonic() - started
        print(f"cold start to first token {took_s:.1f} s")
        assert took_s <= COLD_START_S_MAX


def test_a_swarm_that_became_too_small_says_what_is_missing_and_recovers(tmp_path, store) -> None:
    manifest = store.manifest(REAL_MODEL)
    experts = manifest.weights_bytes - manifest.trunk_bytes
    half = int((manifest.trunk_bytes + experts * 0.6) / 1e6)
    with swarm(tmp_path, [half, half]) as devices:
        demo.wait_settled(devices, 2, time.monotonic())
        assert ask(devices[0])[0] == 200
        devices[1].kill()
        status, body = poll(lambda: (got := ask(devices[0]))[0] == 503 and got)
        assert status == 503
        missing = body["error"]["missing_bytes"]
        assert 0 < missing < experts
        assert str(missing) in body["error"]["message"]
        devices[1].start()
        poll(lambda: ask(devices[0])[0] == 200)


def test_one_device_that_is_too_small_for_the_model(tmp_path, third) -> None:
    with swarm(tmp_path, [third]) as (device,):
        status, body = poll(lambda: device.status() and (got := ask(device))[0] == 503 and got)
        body = poll(lambda: (got := ask(device)[1]["error"]).get("missing_bytes") and got)
        assert "bytes of memory are missing" in body["message"]
        assert status == 503


def test_an_engine_that_dies_alone_is_started_again(tmp_path, store) -> None:
    with swarm(tmp_path, [400]) as (device,):
        demo.wait_settled([device], 1, time.monotonic())
        pid = device.status()["engine"]["pid"]
        os.kill(pid, 9)
        poll(lambda: (now := device.status()["engine"]["pid"]) and now != pid)
        demo.wait_settled([device], 1, time.monotonic())
        assert ask(device)[0] == 200


@pytest.mark.broker
def test_three_devices_organise_themselves_over_mosquitto(tmp_path, third, mosquitto) -> None:
    with swarm(tmp_path, [third] * 3, brokers=mosquitto.url) as devices:
        demo.wait_settled(devices, 3, time.monotonic())
        undisturbed, _reason, _silence_s = answer(devices[0])
        victim = largest(devices)
        asker = next(device for device in devices if device is not victim)
        text, _reason, silence_s = answer(asker, 15, victim.kill)
        print(f"longest silence {silence_s:.2f} s")
        assert text == undisturbed
        assert silence_s <= SILENCE_S_MAX
