"""Ten thousand pieces of rubbish at the open ports of real devices while they answer.

The data port gets bytes that are no frames, frames that announce too much, and damaged copies of
calls that a peer of this swarm could make; the MQTT port gets packets of every kind. Whoever asks
meanwhile gets the text of an undisturbed run, and no process grows.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import demo
import numpy as np
import psutil
import pytest
from demo import Device

from coeld.datapath import frames
from coeld.datapath.frames import HEADER, PAYLOAD_BYTES_MAX, VERSION, Kind
from coeld.model.store import Store
from tests.faults.test_swarm import answer, poll, swarm

pytestmark = [pytest.mark.model, pytest.mark.swarm]
MESSAGES = 10_000
PER_CONNECTION = 50
GROWTH_BYTES_MAX = 16 << 20


@pytest.fixture(autouse=True)
def store(real_store: Store, monkeypatch) -> Store:
    monkeypatch.setenv("COELD_STORE", str(real_store.root))
    monkeypatch.setattr(demo, "ORGANISE_S_MAX", 60.0)
    return real_store


def resident_bytes(device: Device) -> dict[str, int]:
    """Without the weights that the engine holds: replicas may come and go meanwhile."""
    status = device.status()
    pids = {"agent": status["agent"]["pid"], "engine": status["engine"]["pid"]}
    found = {name: psutil.Process(pid).memory_info().rss for name, pid in pids.items()}
    found["engine"] -= status["engine"]["stats"]["weights_bytes"]
    return found


def broken_frames(rng: Random, node: dict[str, Any], hidden: int) -> Iterator[bytes]:
    """What a mad peer might say after a greeting that is right."""
    for _ in range(PER_CONNECTION):
        match rng.randrange(4):
            case 0:
                yield rng.randbytes(rng.choice((1, 24, 28, 1000)))
            case 1:  # a call that announces more than is allowed
                size = PAYLOAD_BYTES_MAX + 1
                yield HEADER.pack(
                    b"CoEL", VERSION, Kind.EXPERTS, 1, 0, 7, 3, 8, 1 << 20, hidden, size, 0.0
                )
            case 2:  # a right call for a random part of the model, some bytes of it flipped
                layer = rng.randrange(node["model"]["layers"] + 2)
                x = np.ones((rng.choice((1, 2, 30)), hidden), np.float32)
                call = bytearray(
                    b"".join(frames.pack_experts(1, layer, rng.sample(range(8), 3), x))
                )
                for _flip in range(rng.randrange(3)):
                    call[rng.randrange(len(call))] = rng.randrange(256)
                yield bytes(call)
            case _:
                kind = rng.choice(list(Kind))
                yield b"".join(frames.pack_text(kind, 1, {"message": "x" * rng.randrange(5000)}))


def flood_data_port(device: Device, hidden: int, rng: Random) -> None:
    node = device.status()["node"]
    me = next(member for member in node["members"] if member["node"] == node["me"])
    hello = {"swarm": "demo", "model": node["model"]["hash"], "node": "f" * 16}
    for number in range(MESSAGES // PER_CONNECTION):
        with (
            contextlib.suppress(OSError),  # it may cut us off at any moment
            socket.create_connection((me["host"], me["data_port"]), timeout=5) as sock,
        ):
            if number % 4:
                sock.sendall(b"".join(frames.pack_text(Kind.HELLO, 0, hello)))
            for message in broken_frames(rng, node, hidden):
                sock.sendall(message)


def flood_mqtt_port(device: Device, rng: Random) -> None:
    port = device.status()["bus"]["broker_port"]
    connect = b"\x10\x10\0\x04MQTT\x04\x02\0\x3c\0\x04abcd"
    for number in range(MESSAGES // PER_CONNECTION):
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", port), timeout=5) as sock,
        ):
            if number % 2:
                sock.sendall(connect)
            for _ in range(PER_CONNECTION):
                body = rng.randbytes(rng.choice((0, 2, 9, 120)))
                kind = rng.choice((0x10, 0x30, 0x82, 0xC0, rng.randrange(256)))
                sock.sendall(bytes((kind, len(body))) + body)


def test_rubbish_at_the_open_ports_disturbs_no_answer(tmp_path: Path, store: Store) -> None:
    hidden = store.manifest("smollm2-135m-instruct").shape.hidden
    with swarm(tmp_path, [demo.budget_mb(3)] * 3) as devices:
        demo.wait_settled(devices, 3, time.monotonic())
        undisturbed = answer(devices[0])[0]
        target = next(device for device in devices[1:] if demo.lots_served(device))
        before = resident_bytes(target)
        floods = [
            threading.Thread(target=flood_data_port, args=(target, hidden, Random(1)), name="data"),
            threading.Thread(target=flood_mqtt_port, args=(target, Random(2)), name="mqtt"),
        ]
        for flood in floods:
            flood.start()
        while any(flood.is_alive() for flood in floods):
            text, _reason, silence_s = answer(devices[0])
            assert text == undisturbed
            assert silence_s < 3
        after = resident_bytes(target)
        growth = {name: after[name] - before[name] for name in before}
        print(f"growth in bytes: {growth}")
        assert max(growth.values()) < GROWTH_BYTES_MAX
        status = poll(lambda: (got := target.status()) and demo.covered(got) and got)
        assert status["engine"]["restarts"] == 0
        assert status["engine"]["stats"]["refused"] >= MESSAGES // PER_CONNECTION // 2
        assert status["bus"]["broker_refused"] >= MESSAGES // PER_CONNECTION // 2
