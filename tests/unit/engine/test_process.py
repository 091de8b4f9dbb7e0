"""The engine as a real process, with the test in the agent's place."""

import os
import resource
import shutil
import socket
import subprocess
import tempfile
from functools import partial
from pathlib import Path

import pytest

from coeld.engine.kernels import Kernels
from coeld.model.store import Store
from coeld.routes import RouteTable
from tests.harness.engine import NODE, Engine, swarm_of


@pytest.fixture
def agent(tiny_store):
    made = Engine(tiny_store.root)
    made.ready = made.hear("ready")
    yield made
    made.close()


def open_all(agent: Engine, tiny) -> None:
    agent.say("open", model="tiny", hash="")
    assert agent.hear("opened", "failed")["hash"] == tiny.hash
    agent.say("load", lots=tiny.demand().lots(), narrow=False)
    assert len(agent.hear("loaded", "load_failed")["lots"]) == 24


def test_an_engine_measures_itself_opens_loads_and_answers(agent, tiny) -> None:
    assert Kernels.from_json(agent.ready["kernels"]).speeds(routed=False)[0] > 100
    assert agent.ready["data_port"] > 0
    open_all(agent, tiny)
    agent.generate("one")
    done = agent.hear("done", "error")
    assert (done["id"], done["completion_tokens"], done["finish_reason"]) == ("one", 8, "length")
    stats = agent.stats_when(lambda stats: stats["steps"] == "1 graph, 0 cuts")
    assert stats["steps"] == "1 graph, 0 cuts"
    assert stats["weights_bytes"] == tiny.weights_bytes
    assert stats["requests"] == 0


def test_nothing_is_kept_or_reported_outside_the_store(tiny_store, tiny, tmp_path) -> None:
    """ONNX Runtime would, unless a CI service's variables are there."""
    known = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    quiet = partial(subprocess.Popen, env={**known, "HOME": str(tmp_path)})
    engine = Engine(tiny_store.root, start=quiet)
    try:
        engine.hear("ready")
        open_all(engine, tiny)
        assert engine.answer("one")[1]["ev"] == "done"
        assert not list(tmp_path.rglob("*"))
    finally:
        engine.close()
    assert not list(tmp_path.rglob("*"))


def test_what_was_asked_is_told_once_with_cancelled_answers_as_far_as_they_came(
    agent, tiny
) -> None:
    open_all(agent, tiny)
    _text, done = agent.answer("one")
    _text, more = agent.answer("two", max_tokens=5)
    counted = {"requests": 0, "prompt_tokens": 0, "tokens": 0}
    while counted["requests"] < 2:
        use = agent.hear("use")
        assert use["experts"] == {}, "a dense model has no router"
        counted = {name: counted[name] + use[name] for name in counted}
    assert counted["tokens"] == done["completion_tokens"] + more["completion_tokens"]
    assert counted["prompt_tokens"] == done["prompt_tokens"] + more["prompt_tokens"]
    agent.generate("forever", max_tokens=200)
    agent.hear("token")
    agent.say("cancel", id="forever")
    assert agent.hear("use")["tokens"] >= 1


def test_two_engines_share_a_model_and_answer_as_one(agent, tiny, tiny_store) -> None:
    open_all(agent, tiny)
    expected, _done = agent.answer("whole", max_tokens=24)
    lots, far = tiny.demand().lots(), "b" * 16
    engines = swarm_of(tiny_store.root, tiny, {NODE: lots[:11], far: lots[11:]})
    pair = list(engines.values())
    texts = [each.answer("half", max_tokens=24)[0] for each in pair]
    pair[0].say("stats")
    assert pair[0].hear("stats")["peers"][far]["calls"] > 0
    assert texts == [expected, expected]

    pair[1].process.kill()
    text, message = pair[0].answer("alone")
    assert (text, message["type"]) == ("", "NotCovered")
    pair[0].say("load", lots=lots[11:], narrow=False)
    pair[0].hear("loaded")
    assert pair[0].answer("again", max_tokens=24)[0] == expected
    for each in pair:
        each.close()


def test_errors_name_the_request_and_what_to_do(agent, tiny) -> None:
    _text, message = agent.answer("early")
    assert message["type"] == "NoModel"
    agent.say("open", model="nothing", hash="")
    assert agent.hear("failed")["type"] == "UnknownModel"
    open_all(agent, tiny)
    _text, message = agent.answer("long", prompt="the " * 400)
    assert (message["type"], message["code"]) == ("ContextTooLong", "context_length_exceeded")
    assert message["param"] == "prompt"
    _text, message = agent.answer("empty", prompt="")
    assert (message["type"], message["param"]) == ("BadRequest", "prompt")


def test_a_cancelled_request_makes_room_for_the_next(agent, tiny) -> None:
    open_all(agent, tiny)
    for ident in ("one", "two", "three"):
        agent.generate(ident, max_tokens=200)
    assert agent.hear("error")["type"] == "Overloaded"
    agent.say("cancel", id="one")
    agent.say("cancel", id="two")
    text, message = agent.answer("four")
    assert message["ev"] == "done"
    assert text


def test_a_request_cancelled_before_its_turn_is_never_run(agent, tiny) -> None:
    open_all(agent, tiny)
    for number in range(20):
        agent.generate(f"gone {number}", max_tokens=200)
        agent.say("cancel", id=f"gone {number}")
    _text, message = agent.answer("one")
    assert message["ev"] == "done"  # not Overloaded: two at most may be under way
    assert agent.stats_when(lambda stats: stats["requests"] == 0)


def test_quit_and_a_vanished_agent_both_end_the_engine(tiny_store) -> None:
    agent = Engine(tiny_store.root)
    agent.hear("ready")
    agent.say("quit")
    assert agent.process.wait(2) == 0
    agent.close()
    agent = Engine(tiny_store.root)
    agent.hear("ready")
    assert agent.close() == 0


def test_a_taken_port_is_named(tiny_store) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        agent = Engine(tiny_store.root, port=port)
        assert str(port) in agent.hear("failed")["message"]
        assert agent.close() == 1


def test_files_of_a_killed_engine_are_swept(tiny_store) -> None:
    stale = Path("/dev/shm") / "coeld-weights-999999999-x"
    if not os.access(stale.parent, os.W_OK):
        pytest.skip("no /dev/shm here")
    stale.mkdir()
    (stale / "0").touch()
    agent = Engine(tiny_store.root)
    agent.hear("ready")
    agent.close()
    assert not stale.exists()


@pytest.fixture
def own_store(tiny_store, tmp_path) -> Store:
    """A store that a test may change."""
    shutil.copytree(tiny_store.root, tmp_path / "store")
    return Store(tmp_path / "store")


def test_of_many_lots_only_those_fail_whose_blobs_are_damaged(own_store, tiny) -> None:
    path = own_store.blob_path(tiny.experts[1][2])
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    agent = Engine(own_store.root)
    try:
        agent.hear("ready")
        agent.say("open", model="tiny", hash="")
        agent.hear("opened")
        agent.say("load", lots=tiny.demand().lots(), narrow=False)
        failed, loaded = agent.hear("load_failed"), agent.hear("loaded")
        assert failed["lots"] == [[1, 2]]
        assert path.name in failed["why"]
        assert len(loaded["lots"]) == 23
        assert [1, 2] not in loaded["lots"]
    finally:
        agent.close()


@pytest.mark.parametrize("part", ["head", "tokenizer"])
def test_a_model_with_a_damaged_part_is_not_opened_until_it_is_whole(
    own_store, tiny, part: str
) -> None:
    blob = getattr(tiny, part)
    path = own_store.blob_path(blob)
    whole = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(whole[:-2] + b" }")
    agent = Engine(own_store.root)
    try:
        agent.hear("ready")
        agent.say("open", model="tiny", hash="")
        assert path.name in agent.hear("failed", "opened")["message"]
        with own_store.lock():
            own_store.put(whole)
        agent.say("open", model="tiny", hash="")
        assert agent.hear("failed", "opened")["ev"] == "opened"
    finally:
        agent.close()


def limit_files(agent: Engine, bytes_max: int) -> None:
    """As if every disk were full."""
    _now, most = resource.prlimit(agent.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(agent.process.pid, resource.RLIMIT_FSIZE, (bytes_max, most))


def test_a_model_that_finds_no_room_in_memory_is_not_opened_and_says_where(agent, tiny) -> None:
    limit_files(agent, 1024)
    agent.say("open", model="tiny", hash="")
    failed = agent.hear("opened", "failed")
    assert (failed["ev"], failed["type"]) == ("failed", "DiskFull")
    assert tempfile.gettempdir() in failed["message"]
    limit_files(agent, resource.RLIM_INFINITY)
    open_all(agent, tiny)


def test_where_new_graphs_find_no_room_the_present_ones_answer_on(agent, tiny) -> None:
    open_all(agent, tiny)
    agent.stats_when(lambda stats: stats["steps"] == "1 graph, 0 cuts")
    limit_files(agent, 1024)
    here = ("127.0.0.1", agent.ready["data_port"])
    owners = dict.fromkeys(tiny.demand().lots(), (NODE,))
    table = RouteTable(tiny.hash, 1, owners, {NODE: here, "b" * 16: ("127.0.0.1", 1)})
    agent.say("routes", table=table.to_json())
    failed = agent.hear("load_failed")
    assert failed["lots"] == []
    assert tempfile.gettempdir() in failed["why"]
    assert agent.answer("one")[1]["ev"] == "done"
    limit_files(agent, resource.RLIM_INFINITY)
    agent.say("routes", table=table.to_json())
    assert "3 cuts" in agent.stats_when(lambda stats: "3 cuts" in stats["steps"])["steps"]
