"""Drives a real engine process from the agent's end of the socket pair."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from coeld.ids import Lot
from coeld.model.manifest import Manifest
from coeld.routes import RouteTable

NODE = "a" * 16
CALIBRATION = Path(tempfile.gettempdir()) / f"coeld-tests-{os.getuid()}.json"
"""Shared by all tests, so that the machine is measured once."""


class Engine:
    """An engine process, spoken to as its agent would."""

    def __init__(
        self,
        store: Path,
        port: int = 0,
        node: str = NODE,
        context: int = 256,
        start: Callable[..., subprocess.Popen] = subprocess.Popen,
        **options: object,
    ) -> None:
        """`start` runs a command like Popen, perhaps elsewhere; `options` of the engine replace
        the usual ones."""
        ours, theirs = socket.socketpair()
        with theirs:
            arguments = {
                "fd": theirs.fileno(), "store-dir": store, "node": node, "swarm": "s",
                "host": "127.0.0.1", "port": port, "threads": 1, "context-tokens": context,
                "requests-max": 2, "call-deadline-ms": 500, "patience-s": 0.5,
                "kl-budget": 0.0,
                "calibration": CALIBRATION,
                **{name.replace("_", "-"): value for name, value in options.items()},
            }  # fmt: skip
            command = [sys.executable, "-m", "coeld.engine"]
            command += [word for k, v in arguments.items() for word in (f"--{k}", str(v))]
            self.process = start(command, pass_fds=(theirs.fileno(),))
        ours.settimeout(60)
        self.sock = ours
        self.file = ours.makefile("rwb")

    def say(self, op: str, **fields) -> None:
        self.file.write(json.dumps({"op": op, **fields}).encode() + b"\n")
        self.file.flush()

    def hear(self, *events: str) -> dict:
        """The next message of one of these kinds."""
        for line in self.file:
            message = json.loads(line)
            if message["ev"] in events:
                return message
        raise EOFError

    def generate(self, ident: str, **fields) -> None:
        usual = {
            "max_tokens": 8, "temperature": 0, "top_p": 1.0, "top_k": 0, "seed": None, "stop": [],
            "kl_budget": None,
        }  # fmt: skip
        self.say("generate", id=ident, **{"prompt": "the", **usual, **fields})

    def stats_when(self, ready: Callable[[dict], bool], wait_s: float = 10.0) -> dict:
        """The engine's stats once they are as wanted; the last ones when time is up."""
        deadline = time.monotonic() + wait_s
        while True:
            self.say("stats")
            stats = self.hear("stats")
            if ready(stats) or time.monotonic() > deadline:
                return stats

    def close(self) -> int:
        self.file.close()
        self.sock.close()
        return self.process.wait(2)

    def answer(self, ident: str, **fields) -> tuple[str, dict]:
        """The text of an answer, and its last message."""
        self.generate(ident, **fields)
        words = []
        while (message := self.hear("token", "done", "error"))["ev"] == "token":
            words.append(message["text"])
        return "".join(words), message


def swarm_of(
    store: Path, manifest: Manifest, shares: Mapping[str, Sequence[Lot]]
) -> dict[str, Engine]:
    """Engines, one per node of `shares`, each with its lots loaded and everybody's routes."""
    return swarm_with_table(store, manifest, shares)[1]


def swarm_with_table(
    store: Path, manifest: Manifest, shares: Mapping[str, Sequence[Lot]]
) -> tuple[RouteTable, dict[str, Engine]]:
    engines = {node: Engine(store, node=node) for node in shares}
    ports = {node: engine.hear("ready")["data_port"] for node, engine in engines.items()}
    owners: dict[Lot, tuple[str, ...]] = {}
    for node, lots in shares.items():
        owners |= {lot: (*owners.get(lot, ()), node) for lot in lots}
    table = RouteTable(
        manifest.hash,
        1,
        owners,
        {node: ("127.0.0.1", port) for node, port in ports.items()},
    )
    for node, engine in engines.items():
        engine.say("open", model=manifest.name, hash=manifest.hash)
        engine.hear("opened")
        engine.say("load", lots=shares[node], narrow=False)
        engine.hear("loaded")
        engine.say("routes", table=table.to_json())
    return table, engines
