"""Real agents with fake engines on loopback: they find each other, agree, leave, and are missed."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from coeld.agent import Agent
from coeld.config import load
from coeld.host.places import places
from coeld.net.engine_link import EngineLink
from tests.fakes.agents import ROOT, Device, running, serving
from tests.fakes.fake_model import install
from tests.fakes.run_agent import FAKE_ENGINE

pytestmark = pytest.mark.swarm

AGENT_RSS_BYTES_MAX = 60 * 2**20


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture
def store(tmp_path: Path) -> Path:
    install(tmp_path / "store")
    return tmp_path / "store"


def three(tmp_path: Path, store: Path) -> list[Device]:
    """One seed, known to the other two, which do not know of each other."""
    port = free_port()
    seed = Device(tmp_path / "d0", store, network={"mqtt_port": port})
    neighbours = {"swarm": {"discovery": "off", "neighbours": [f"127.0.0.1:{port}"]}}
    return [seed, *(Device(tmp_path / f"d{i}", store, **neighbours) for i in (1, 2))]


def members(status: dict[str, Any], state: str = "alive") -> int:
    return sum(member["status"] == state for member in status["node"]["members"])


def agree(devices: list[Device]) -> list[dict[str, Any]]:
    """Wait until all see all, everything is covered, and the routes are the same everywhere."""
    count = len(devices)

    def settled(status: dict[str, Any]) -> bool:
        return serving(status) and members(status) == count

    for _ in range(200):
        found = [device.wait(settled) for device in devices]
        if len({status["node"]["routes"]["fingerprint"] for status in found}) == 1:
            return found
    raise AssertionError(json.dumps(found))


@pytest.fixture
def swarm(tmp_path: Path, store: Path) -> Iterator[list[Device]]:
    devices = three(tmp_path, store)
    with running(*devices):
        agree(devices)
        yield devices


def test_three_agents_meet_through_one_seed_and_leave_cleanly(swarm: list[Device]) -> None:
    for device in swarm:
        status, answer = device.request("POST", "/v1/completions", {"prompt": "hello"})
        assert (status, answer["choices"][0]["text"]) == (200, "you said: hello ")
        status = device.status()
        asked = [m for m in status["node"]["members"] if m["asked_per_min"]["requests"] > 0]
        assert status["node"]["me"] in [member["node"] for member in asked]
        agent = status["agent"]
        assert agent["rss_bytes"] < AGENT_RSS_BYTES_MAX
    first, *others = swarm
    children = first.children()
    status, seconds = first.stop()
    assert (status, seconds < 2.0) == (0, True)
    assert not any(child.is_running() for child in children)
    assert not first.socket.exists()
    left = {"agent.toml", "log.txt", "state"}
    assert {path.name for path in first.folder.iterdir()} == left
    for device in others:
        device.wait(lambda status: members(status, "left") == 1 and serving(status), 5)
    assert others[0].stop(signal.SIGINT)[0] == 0
    assert "Traceback" not in first.log + others[0].log


@pytest.mark.parametrize("again", [signal.SIGTERM, signal.SIGINT])
def test_an_agent_that_is_told_twice_to_stop_waits_for_nobody(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch, again: signal.Signals
) -> None:
    config = load(Device(tmp_path / "d", store).config)

    async def main() -> None:
        ready, parting = asyncio.Event(), asyncio.Event()

        async def stats(_: EngineLink) -> dict[str, int]:
            parting.set()
            return {"guest_kv_bytes": 1}

        monkeypatch.setattr(EngineLink, "stats", stats)
        monkeypatch.setattr("coeld.agent.PARTING_S_MAX", 60.0)
        monkeypatch.setattr("coeld.agent.notify", lambda _: ready.set())
        agent = Agent(config, places(config), (sys.executable, str(FAKE_ENGINE)))
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            group.create_task(agent.run())
            await ready.wait()
            os.kill(os.getpid(), signal.SIGTERM)
            await parting.wait()
            os.kill(os.getpid(), again)

    asyncio.run(main())


def test_a_killed_agent_is_missed_and_its_return_is_noticed(swarm: list[Device]) -> None:
    victim, *others = swarm
    victim.kill()
    for device in others:
        device.wait(lambda status: members(status) == 2 and serving(status), 5)
    victim.start()  # over its own stale socket and lock
    agree(swarm)
    assert victim.status()["node"]["incarnation"] == 2


def test_a_killed_engine_is_replaced_and_its_lots_are_served_again(swarm: list[Device]) -> None:
    device = swarm[1]
    (engine,) = device.children()
    engine.kill()
    device.wait(lambda status: status["engine"]["restarts"] == 1 and serving(status))
    agree(swarm)


def test_the_engine_ends_with_a_killed_agent(tmp_path: Path, store: Path) -> None:
    device = Device(tmp_path / "d", store)
    with running(device):
        device.wait(serving)
        (engine,) = device.children()
        device.process.kill()
        psutil.wait_procs([engine], timeout=5)
        assert not engine.is_running()


def test_a_model_that_is_installed_later_is_opened(tmp_path: Path) -> None:
    device = Device(tmp_path / "d", tmp_path / "store")
    with running(device):
        status = device.wait(lambda status: "coeld model add" in status["engine"]["trouble"])
        assert status["node"]["model"] is None
        code, answer = device.request("POST", "/v1/completions", {"prompt": "hello"})
        assert (code, answer["error"]["code"]) == (503, "no_model")
        install(tmp_path / "store")
        device.wait(serving)


def test_a_damaged_model_is_explained_and_the_daemon_stays(tmp_path: Path) -> None:
    install(tmp_path / "store")
    manifest = tmp_path / "store" / "models" / "tiny.json"
    whole = manifest.read_text()
    manifest.write_text(whole[: len(whole) // 2])
    device = Device(tmp_path / "d", tmp_path / "store")
    with running(device):
        device.wait(lambda status: "damaged" in status["engine"]["trouble"])
        code, answer = device.request("POST", "/v1/completions", {"prompt": "hello"})
        assert (code, "damaged" in answer["error"]["message"]) == (503, True)
        manifest.write_text(whole)
        device.wait(serving)


@pytest.mark.parametrize("what", ["socket", "state_dir", "data_port", "mqtt_port", "tcp_port"])
def test_what_is_in_use_is_named_and_the_first_user_is_unharmed(
    tmp_path: Path, store: Path, what: str
) -> None:
    mqtt, data, tcp = free_port(), free_port(), free_port()
    sections = {
        "device": {"state_dir": f"{tmp_path}/first/state"},
        "network": {"mqtt_port": mqtt, "data_port": data},
        "api": {"socket": f"{tmp_path}/first/api.sock", "tcp_port": tcp},
    }
    first = Device(tmp_path / "first", store, **sections)
    clash: dict[str, dict[str, Any]] = {
        "socket": {"api": {"socket": f"{tmp_path}/first/api.sock"}},
        "state_dir": {"device": {"state_dir": f"{tmp_path}/first/state"}},
        "data_port": {"network": {"data_port": data, "mqtt_port": 0}},
        "mqtt_port": {"network": {"mqtt_port": mqtt}},
        "tcp_port": {"api": {"tcp_port": tcp}},
    }
    second = Device(tmp_path / "second", store, **clash[what])
    with running(first):
        first.wait(serving)
        second.start()
        assert second.process.wait(20) == 1
        *_, message = [line for line in second.log.splitlines() if line.startswith("coeld: ")]
        numbers = {"data_port": data, "mqtt_port": mqtt, "tcp_port": tcp}
        assert str(numbers.get(what, tmp_path / "first")) in message
        assert "Traceback" not in second.log
        assert first.request("GET", "/healthz")[0] == 200


def test_a_socket_path_that_is_too_long_is_a_start_error(tmp_path: Path, store: Path) -> None:
    device = Device(tmp_path / "d", store, api={"socket": f"/tmp/{'x' * 110}/s"}).start()
    assert device.process.wait(20) == 1
    assert "107" in device.log


def test_a_socket_that_systemd_opened_is_used(tmp_path: Path, store: Path) -> None:
    device = Device(tmp_path / "d", store)
    device.socket = elsewhere = tmp_path / "systemd.sock"
    command = f"LISTEN_PID=$$ LISTEN_FDS=1 exec {sys.executable} -m tests.fakes.run_agent"
    with socket.socket(socket.AF_UNIX) as listening, (device.folder / "log.txt").open("ab") as log:
        listening.bind(str(device.socket))
        listening.listen()
        device.process = subprocess.Popen(
            ["bash", "-c", f"exec 3<&{listening.fileno()}; {command} {device.config}"],
            pass_fds=[listening.fileno()],
            cwd=ROOT,
            stderr=log,
        )
    status = device.wait(serving)
    assert status["agent"]["socket"] == str(elsewhere)
    assert device.stop()[0] == 0
    assert elsewhere.exists()  # it is systemd's to remove
