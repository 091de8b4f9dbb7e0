"""Real daemons and a small model of which one copy fills them: a new version, while one answers."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from coeld.model.store import Store
from tests.broker.test_agents import free_port
from tests.fakes.agents import ROOT, Device, UnixConnection, running, serving
from tests.harness.engine import Engine
from tests.harness.importing import import_file
from tests.reference.tiny_gguf import write_tiny_llama

pytestmark = pytest.mark.swarm
LAYERS, THIRD_MB = 6, 5
PROMPT, TOKENS, FEW = "the", 1200, 100
SIZE = {"layers": LAYERS, "hidden": 256, "width": 2048, "context": 2048}


class RealDevice(Device):
    """With the real engine."""

    def start(self) -> "RealDevice":
        with (self.folder / "log.txt").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "coeld", "up", "--config", str(self.config)],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        return self

    def ask(self, tokens: int) -> tuple[int, Any]:
        """Status, and text or error."""
        body = {"prompt": PROMPT, "max_tokens": tokens, "temperature": 0}
        status, answer = self.request("POST", "/v1/completions", body)
        return status, answer["choices"][0]["text"] if status == 200 else answer["error"]

    def stream(self, tokens: int) -> Iterator[str]:
        """The pieces of an answer, as they come. Raises AssertionError when it breaks."""
        body = {"prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "stream": True}
        with closing(UnixConnection(self.socket, timeout=90)) as connection:
            connection.request("POST", "/v1/completions", json.dumps(body).encode())
            response = connection.getresponse()
            assert response.status == 200
            for line in response:
                data = line.decode().strip().removeprefix("data: ")
                if data and data != "[DONE]":
                    chunk = json.loads(data)
                    assert "error" not in chunk, chunk
                    yield from (choice["text"] for choice in chunk["choices"])


def versions(status: dict[str, Any]) -> dict[str, Any]:
    """What the device says of itself."""
    node = status["node"]
    (me,) = (member for member in node["members"] if member["node"] == node["me"])
    return me["versions"]


def expected(store: Store) -> list[str]:
    """What one engine alone answers: much with the first version, little with the second."""
    engine, texts = Engine(store.root, context=2048), []
    engine.hear("ready")
    for manifest, tokens in zip(store.versions("tiny"), (TOKENS, FEW), strict=True):
        engine.say("open", model="tiny", hash=manifest.hash)
        engine.hear("opened")
        engine.say("load", lots=manifest.demand().lots(), narrow=False)
        engine.hear("loaded")
        texts.append(engine.answer("one", prompt=PROMPT, max_tokens=tokens)[0])
    engine.close()
    return texts


@pytest.fixture
def stores(tmp_path: Path) -> tuple[Store, Store]:
    """The model in its first version, and in both."""
    files = [write_tiny_llama(tmp_path / f"{n}.gguf", seed=n, **SIZE) for n in (0, 1)]
    first, both = Store(tmp_path / "first"), Store(tmp_path / "both")
    import_file(first, files[0], "tiny")
    shutil.copytree(first.root, both.root, copy_function=os.link)
    import_file(both, files[1], "tiny", update=True)
    return first, both


def install(source: Store, root: Path) -> None:
    """As `coeld model add --update` ends: blobs, then the manifest."""
    store, manifest = Store(root), source.manifest("tiny")
    with store.lock():
        for ref in manifest.blobs():
            if not store.has(ref):
                shutil.copy(source.blob_path(ref), store.blob_path(ref))
        store.save(manifest)


def test_an_answer_ends_on_its_version_and_the_next_begins_on_the_new_one(
    tmp_path: Path, stores: tuple[Store, Store]
) -> None:
    first, both = stores
    old, new = expected(both)
    assert old[: len(new)] != new
    port = free_port()
    devices = []
    for number in range(3):
        folder = tmp_path / f"d{number}"
        shutil.copytree(first.root, folder / "store", copy_function=os.link)
        device = RealDevice(
            folder,
            folder / "store",
            memory={"budget_mb": THIRD_MB},
            engine={"threads": 1, "patience_s": 60.0},
            model={"name": "tiny"},
            network={"mqtt_port": 0 if number else port, "blob_mb_per_s": 0},
            swarm={"neighbours": [f"127.0.0.1:{port}"] if number else []},
        )
        devices.append(device)
    with running(*devices), ThreadPoolExecutor(2) as threads:
        for device in devices:
            device.wait(serving, within_s=60)
        asker = devices[1]
        pieces: list[str] = []
        began = time.monotonic()
        answer = threads.submit(lambda: [pieces.append(piece) for piece in asker.stream(TOKENS)])
        asker.wait(lambda _: bool(pieces))
        install(both, tmp_path / "d0" / "store")
        asker.wait(lambda status: versions(status)["requests"] == "draining", within_s=60)
        assert not answer.done(), f"the answer took only {time.monotonic() - began:.1f} s"
        devices[2].wait(lambda status: versions(status)["requests"] != "serving")
        waits = threads.submit(lambda: "".join(devices[2].stream(FEW)))
        answer.result(60)
        assert "".join(pieces) == old
        for device in devices:
            told = device.wait(
                lambda status: versions(status)["open"] == 2 and serving(status), within_s=60
            )
            assert told["node"]["model"]["version"] == 2
        assert waits.result(60) == new, "who came in the gap has waited"
        assert [device.ask(FEW) for device in devices] == [(200, new)] * 3
        for number in range(3):
            store = Store(tmp_path / f"d{number}" / "store")
            devices[number].wait(lambda _, store=store: len(store.versions("tiny")) == 1)
