"""Real daemons in the network lab, each on a device of its own, and whoever asks them.

`LabDevice` is the demo's device moved into a lab; it can be killed in parts and frozen. `listen`
streams one answer and notes when each piece came and how it ended, whatever happens meanwhile.
"""

import http.client
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Self

import demo
import psutil
from demo import COELD, Device, UnixConnection

from tests.harness.mosquitto import MOSQUITTO
from tests.netlab import PROFILES, Lab

MQTT_PORT = 1884
BROKER = "broker"
"""The device that runs mosquitto, where a swarm has one."""
ANSWER_S_MAX = 60.0
ALWAYS: dict[str, str] = {}
"""Further lines of every device's agent.toml, by section."""


class LabDevice(Device):
    """The demo's device in a lab: only its address and how it is started and killed differ."""

    lab: Lab

    def configure_in(self, lab: Lab, budget_mb: int, **sections: str) -> None:
        """`sections`: further lines of agent.toml, by section."""
        self.lab = lab
        self.configure(MQTT_PORT, MQTT_PORT, budget_mb, threads=1)
        others = [ip for name, ip in lab.addresses.items() if name not in (self.name, BROKER)]
        neighbours = [f"{ip}:{MQTT_PORT}" for ip in others]
        host = f'host = "{lab.addresses[self.name]}"\nallow_unencrypted = true'
        sections["network"] = f"{host}\n{sections.get('network', '')}"
        path = self.folder / "agent.toml"
        lines = path.read_text().replace(
            "neighbours = []", f"neighbours = {json.dumps(neighbours)}"
        )
        for section, more in sections.items():
            assert f"[{section}]\n" in lines
            lines = lines.replace(f"[{section}]\n", f"[{section}]\n{more}\n")
        path.write_text(lines)

    def start(self) -> None:
        with (self.folder / "log.txt").open("ab") as log:
            argv = [COELD, "up", "--config", self.folder / "agent.toml"]
            self.process = self.lab.start(self.name, argv, stdout=log, stderr=log)

    @property
    def up(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def pids(self) -> dict[str, list[int]]:
        """Its processes: the agent, and what the agent started."""
        assert self.process is not None
        agent = self.process.pid
        return {"agent": [agent], "engine": [p for p in self.lab.pids(self.name) if p != agent]}

    def signal(self, number: signal.Signals, *parts: str) -> None:
        """To these parts, "agent" or "engine", or to both."""
        pids = self.pids()
        for pid in [pid for part in parts or pids for pid in pids[part]]:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        """The plug is pulled."""
        self.signal(signal.SIGKILL)
        assert self.process is not None
        self.process.wait()


@contextmanager
def swarm_in_lab(
    folder: Path,
    budgets_mb: list[int],
    profile: str = "lan",
    model: str = demo.MODEL,
    mosquitto: bool = False,
    cpu: float = 0.0,
    **sections: str,
) -> Iterator[list[LabDevice]]:
    """Devices device-1, device-2, ... started in a lab of their own, with `cpu` cores each (0: no
    limit); `mosquitto`: round a broker on a device of its own instead of their own ones."""
    numbers = range(1, len(budgets_mb) + 1)
    devices = [LabDevice(n, folder / f"d{n}", model=model) for n in numbers]
    names = [device.name for device in devices] + [BROKER] * mosquitto
    with Lab(names, PROFILES[profile]) as lab:
        if mosquitto:
            start_mosquitto(lab, folder)
            swarm = f'brokers = ["mqtt://{lab.addresses[BROKER]}:{MQTT_PORT}"]'
            sections["swarm"] = f"{swarm}\n{sections.get('swarm', '')}"
        for section, more in ALWAYS.items():
            sections[section] = f"{more}\n{sections.get(section, '')}"
        for device, budget_mb in zip(devices, budgets_mb, strict=True):
            device.configure_in(lab, budget_mb, **sections)
            lab.limit(device.name, cpu)
            if cpu:  # what was measured without the limit does not hold
                (device.folder / "state" / "calibration.json").unlink()
            device.start()
        yield devices
        demo.stop(devices)


def start_mosquitto(lab: Lab, folder: Path) -> subprocess.Popen[bytes]:
    """Raises RuntimeError when it is not installed."""
    if MOSQUITTO is None:
        raise RuntimeError("mosquitto is not installed: apt install mosquitto")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "mosquitto.conf"
    path.write_text(
        f"listener {MQTT_PORT} {lab.addresses[BROKER]}\nallow_anonymous true\n"
        "set_tcp_nodelay true\npersistence false\n"
    )
    with (folder / "mosquitto.log").open("ab") as log:
        return lab.start(BROKER, [MOSQUITTO, "-c", path], stdout=log, stderr=log)


@dataclass
class Heard:
    """One answer as its reader saw it."""

    text: str = ""
    reason: str = ""
    """finish_reason; "" when it did not end well."""
    error: str = ""
    refused: bool = False
    """It was turned away before it began (503, or nobody listens)."""
    began_s: float = 0.0
    ended_s: float = 0.0
    at_s: list[float] = field(default_factory=list)
    """When each piece of text came."""

    @property
    def gaps_s(self) -> list[float]:
        return [b - a for a, b in pairwise(self.at_s)]

    def silence_s(self) -> float:
        """The longest one between two pieces."""
        return max(self.gaps_s, default=0.0)


def listen(
    device: Device,
    prompt: str,
    tokens: int,
    then: Callable[[int], None] = lambda _pieces: None,
) -> Heard:
    """One greedy answer, whatever happens; `then` is called after each piece with their number."""
    heard = Heard(began_s=time.monotonic())
    body = {
        "model": device.model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
    }
    try:
        with closing(UnixConnection(device.socket)) as connection:
            connection.timeout = ANSWER_S_MAX
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
            response = connection.getresponse()
            if response.status != 200:
                heard.refused = response.status == 503
                heard.error = response.read().decode()
            else:
                for line in response:
                    _take(heard, line, then)
                if not heard.reason and not heard.error:
                    heard.error = "the connection was closed"
    except (ConnectionRefusedError, FileNotFoundError) as exc:
        heard.refused, heard.error = True, repr(exc)
    except (OSError, http.client.HTTPException) as exc:
        heard.error = repr(exc)
    heard.ended_s = time.monotonic()
    return heard


def _take(heard: Heard, line: bytes, then: Callable[[int], None]) -> None:
    if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
        return
    chunk = json.loads(line[6:])
    if "error" in chunk:
        heard.error = chunk["error"]["message"]
        return
    for choice in chunk["choices"]:
        heard.reason = choice["finish_reason"] or heard.reason
        if piece := choice["delta"].get("content"):
            heard.text += piece
            heard.at_s.append(time.monotonic())
            then(len(heard.at_s))


class Stalls:
    """Notices when the machine itself stands still: a thread that wakes much too late.

    What is late then is nobody's fault; who measures says so. Use it as a context.
    """

    WAKES_S = 0.1

    def __init__(self) -> None:
        self.longest_s = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stalls", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.is_set():
            slept_s = time.monotonic()
            self._over.wait(self.WAKES_S)
            late_s = time.monotonic() - slept_s - self.WAKES_S
            self.longest_s = max(self.longest_s, late_s)


@dataclass(frozen=True)
class Size:
    """What one process holds on to."""

    rss_bytes: int
    threads: int
    files: int

    @staticmethod
    def of(pid: int) -> "Size":
        process = psutil.Process(pid)
        with process.oneshot():
            return Size(process.memory_info().rss, process.num_threads(), process.num_fds())
