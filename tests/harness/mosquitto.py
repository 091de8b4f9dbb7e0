"""A real mosquitto on loopback, for tests that need a broker of the user's own."""

import contextlib
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

from coeld.config import Broker

MOSQUITTO = shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")


class Mosquitto:
    """One broker process on a port that stays the same over restarts."""

    def __init__(self, folder: Path, extra: str = "allow_anonymous true") -> None:
        """`extra`: more lines of its configuration."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.port = server.getsockname()[1]
        self.url = f"mqtt://127.0.0.1:{self.port}"
        self.brokers = (Broker("127.0.0.1", self.port),)
        self.config = folder / f"mosquitto-{self.port}.conf"
        self.config.write_text(
            f"listener {self.port} 127.0.0.1\nset_tcp_nodelay true\npersistence false\n{extra}\n"
        )

    def start(self) -> None:
        if MOSQUITTO is None:
            pytest.skip("mosquitto is not installed: apt install mosquitto")
        self.process = subprocess.Popen(
            [MOSQUITTO, "-c", str(self.config)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(self.brokers[0][:2], 1):
                return
            time.sleep(0.02)
        raise AssertionError("mosquitto does not listen")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait(10)
