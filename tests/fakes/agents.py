"""Real agents as separate processes, each with a fake engine, for tests to start, ask and kill."""

import contextlib
import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
START_S = 20.0


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float = 20.0) -> None:
        super().__init__("localhost", timeout=timeout)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self.path))


class Device:
    """One daemon in its own folder. `sections` go into its agent.toml as they are."""

    def __init__(self, folder: Path, store: Path, **sections: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.socket = folder, folder / "api.sock"
        usual: dict[str, dict[str, Any]] = {
            "device": {
                "name": folder.name,
                "state_dir": f"{folder}/state",
                "store_dir": f"{store}",
            },
            "memory": {"budget_mb": 1},
            "api": {"socket": str(self.socket)},
            "network": {"mqtt_port": 0},
            "swarm": {"discovery": "off", "name": "test"},
        }
        lines = []
        for section in usual.keys() | sections.keys():
            lines.append(f"[{section}]")
            values = usual.get(section, {}) | sections.get(section, {})
            lines += [f"{key} = {json.dumps(value)}" for key, value in values.items()]
        self.config = folder / "agent.toml"
        self.config.write_text("\n".join(lines))
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> "Device":
        with (self.folder / "log.txt").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.fakes.run_agent", str(self.config)],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        return self

    @property
    def log(self) -> str:
        return (self.folder / "log.txt").read_text()

    def request(self, method: str, target: str, body: Any = None) -> tuple[int, Any]:
        """Status and parsed answer; `body` is JSON, or bytes as they are."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        with contextlib.closing(UnixConnection(self.socket)) as connection:
            connection.request(method, target, data)
            response = connection.getresponse()
            return response.status, json.loads(response.read())

    def status(self) -> dict[str, Any] | None:
        try:
            return self.request("GET", "/status")[1]
        except (OSError, http.client.HTTPException):
            return None

    def wait(self, wanted: Callable[[dict[str, Any]], bool], within_s: float = START_S) -> Any:
        """The first status that is as wanted."""
        deadline = time.monotonic() + within_s
        status = None
        while time.monotonic() < deadline:
            status = self.status()
            if status and wanted(status):
                return status
            assert self.process is not None
            assert self.process.poll() is None, self.log
            time.sleep(0.05)
        raise AssertionError(f"not within {within_s} s: {json.dumps(status)}\n{self.log}")

    def children(self) -> list[psutil.Process]:
        assert self.process is not None
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, float]:
        """Exit status, and the seconds it took."""
        assert self.process is not None
        began = time.monotonic()
        self.process.send_signal(number)
        return self.process.wait(20), time.monotonic() - began

    def kill(self) -> None:
        """kill -9 of agent and engine."""
        victims = self.children()
        assert self.process is not None
        self.process.kill()
        for victim in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
        self.process.wait(20)


@contextlib.contextmanager
def running(*devices: Device) -> Iterator[None]:
    """Start them; kill whatever is left at the end."""
    try:
        for device in devices:
            device.start()
        yield
    finally:
        for device in devices:
            if device.process and device.process.poll() is None:
                device.kill()


def serving(status: dict[str, Any]) -> bool:
    """The engine has the model open and everything is covered."""
    routes = status["node"]["routes"]
    return bool(status["engine"]["model"]) and routes["covered"] == routes["total"] > 0
