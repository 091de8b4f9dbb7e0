"""The engine goes from one version to the next: the old one is gone before the new one comes."""

import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from coeld.engine import process
from coeld.engine.open_model import OpenModel
from coeld.engine.process import Engine as EngineHere
from coeld.engine.protocol import EngineOptions
from coeld.ids import NodeId
from coeld.model.store import Store
from tests.harness.engine import CALIBRATION, NODE, Engine, swarm_with_table


@pytest.fixture
def engine(two_versions):
    made = Engine(two_versions.root)
    made.hear("ready")
    yield made
    made.close()


def opens(engine: Engine, manifest) -> None:
    engine.say("open", model=manifest.name, hash=manifest.hash)
    opened = engine.hear("opened", "failed")
    assert opened.get("hash") == manifest.hash, opened
    engine.say("load", lots=manifest.demand().lots(), narrow=False)
    assert len(engine.hear("loaded", "load_failed")["lots"]) == 24


def test_each_version_answers_with_its_own_weights(engine, two_versions) -> None:
    first, second = two_versions.versions("tiny")
    opens(engine, first)
    old, _done = engine.answer("one", max_tokens=24)
    opens(engine, second)
    stats = engine.stats_when(lambda stats: stats["lots"] == 24)
    assert stats["weights_bytes"] == second.weights_bytes
    new, _done = engine.answer("two", max_tokens=24)
    assert new != old
    opens(engine, first)
    assert engine.answer("three", max_tokens=24)[0] == old


def test_what_is_under_way_fails_when_its_version_goes(engine, two_versions) -> None:
    first, second = two_versions.versions("tiny")
    opens(engine, first)
    engine.generate("long", max_tokens=200)
    engine.hear("token")
    engine.say("open", model="tiny", hash=second.hash)
    assert engine.hear("done", "error")["type"] == "NoModel"
    assert engine.hear("opened")["hash"] == second.hash


def test_asked_twice_to_open_a_version_it_keeps_what_is_loaded(engine, two_versions) -> None:
    first = two_versions.versions("tiny")[0]
    opens(engine, first)
    engine.say("open", model="tiny", hash=first.hash)
    assert engine.hear("opened")["hash"] == first.hash
    assert engine.stats_when(lambda stats: True)["lots"] == 24


def test_a_version_that_is_damaged_does_not_take_the_place_of_one_that_works(
    engine, two_versions
) -> None:
    first, second = two_versions.versions("tiny")
    opens(engine, first)
    path = two_versions.blob_path(second.trunk[0])
    path.chmod(0o644)
    path.write_bytes(bytes(path.stat().st_size))
    engine.say("open", model="tiny", hash=second.hash)
    assert engine.hear("failed", "opened")["type"] == "BadChecksum"
    assert engine.answer("still", max_tokens=4)[1]["ev"] == "done"


def test_peers_of_the_old_version_are_hung_up_on(two_versions) -> None:
    first, second = two_versions.versions("tiny")
    lots, far = first.demand().lots(), "b" * 16
    _table, engines = swarm_with_table(two_versions.root, first, {NODE: lots[:8], far: lots[8:]})
    near, other = engines[NODE], engines[far]
    assert near.answer("both", max_tokens=4)[1]["ev"] == "done"
    opens(other, second)
    _text, message = near.answer("alone", max_tokens=4)
    assert message["type"] == "NotCovered"
    assert other.answer("new", max_tokens=4)[1]["ev"] == "done"
    for each in (near, other):
        each.close()


class Link:
    """What the engine says, and no agent."""

    def __init__(self) -> None:
        self.said: list[tuple[str, dict[str, Any]]] = []
        self.heard = threading.Condition()

    def say(self, event: str, **fields: Any) -> None:
        with self.heard:
            self.said.append((event, fields))
            self.heard.notify_all()

    def wait(self, event: str, times: int = 1) -> None:
        with self.heard:
            done = self.heard.wait_for(
                lambda: sum(name == event for name, _ in self.said) >= times, 20
            )
            assert done, self.said


def test_the_old_model_is_out_of_memory_before_the_new_one_is_made(
    two_versions: Store, monkeypatch
) -> None:
    first, second = two_versions.versions("tiny")
    made: list[weakref.ref[OpenModel]] = []
    alive: list[int] = []

    def make(*args: Any, **options: Any) -> OpenModel:
        alive.append(sum(ref() is not None for ref in made))
        model = OpenModel(*args, **options)
        made.append(weakref.ref(model))
        return model

    monkeypatch.setattr(process, "OpenModel", make)
    options = EngineOptions(
        store_dir=two_versions.root, node=NodeId(NODE), swarm="s", host="127.0.0.1", port=0,
        threads=1, context_tokens=256, requests_max=2, call_deadline_ms=500, patience_s=0.5,
        kl_budget=0.0, calibration=CALIBRATION,
    )  # fmt: skip
    link = Link()
    engine = EngineHere(options, link)  # type: ignore[arg-type]
    loops: list[Callable[[], None]] = [engine._decode, engine._load]
    threads = [threading.Thread(target=loop, name="engine-part", daemon=True) for loop in loops]
    for thread in threads:
        thread.start()
    order = {
        "prompt": "the", "messages": None, "max_tokens": 200, "temperature": 0, "top_p": 1.0,
        "top_k": 0, "seed": None, "stop": [], "kl_budget": None,
    }  # fmt: skip
    for number, manifest in enumerate((first, second, first), 1):
        engine._obey({"op": "open", "model": "tiny", "hash": manifest.hash})
        link.wait("opened", number)
        engine._obey(
            {"op": "load", "lots": [list(lot) for lot in manifest.demand().lots()], "narrow": False}
        )
        link.wait("loaded", number)
        engine._obey({"op": "generate", "id": str(number), **order})
        link.wait("token", len([said for said in link.said if said[0] == "token"]) + 1)
    assert alive == [0, 0, 0]
    engine._obey({"op": "cancel", "id": "3"})
    engine._decoder_jobs.put(None)
    engine._loader_jobs.put(None)
    for thread in threads:
        thread.join(5)
    engine._server.close()
