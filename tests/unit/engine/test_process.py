"""The engine as a real process, with the test in the agent's place."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from coeld.routes import RouteTable

NODE = "a" * 16


class Agent:
    """The agent's end of the socket pair."""

    def __init__(self, store: Path, port: int = 0, node: str = NODE) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            arguments = {
                "fd": theirs.fileno(), "store": store, "node": node, "swarm": "s",
                "host": "127.0.0.1", "port": port, "threads": 1, "context": 256,
                "requests-max": 2, "call-deadline-ms": 500, "patience-s": 0.5,
            }  # fmt: skip
            command = [sys.executable, "-m", "coeld.engine"]
            command += [word for k, v in arguments.items() for word in (f"--{k}", str(v))]
            self.process = subprocess.Popen(command, pass_fds=(theirs.fileno(),))
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
            "max_tokens": 8, "temperature": 0, "top_p": 1.0, "top_k": 0, "seed": None, "stop": []
        }  # fmt: skip
        self.say("generate", id=ident, **{"prompt": "the", **usual, **fields})

    def close(self) -> int:
        self.file.close()
        self.sock.close()
        return self.process.wait(2)


@pytest.fixture
def agent(tiny_store):
    made = Agent(tiny_store.root)
    made.ready = made.hear("ready")
    yield made
    made.close()


def open_all(agent: Agent, tiny) -> None:
    agent.say("open", model="tiny")
    assert agent.hear("opened", "failed")["hash"] == tiny.hash
    agent.say("load", lots=tiny.demand().lots())
    assert len(agent.hear("loaded", "load_failed")["lots"]) == 24


def test_an_engine_measures_itself_opens_loads_and_answers(agent, tiny) -> None:
    assert agent.ready["kernel_mb_per_s"] > 100
    assert agent.ready["data_port"] > 0
    open_all(agent, tiny)
    agent.generate("one")
    done = agent.hear("done", "error")
    assert (done["id"], done["completion_tokens"], done["finish_reason"]) == ("one", 8, "length")
    agent.say("stats")
    stats = agent.hear("stats")
    assert stats["steps"] == "1 graph, 0 cuts"
    assert stats["weights_bytes"] == tiny.weights_bytes
    assert stats["requests"] == 0


def answer(agent: Agent, ident: str, **fields) -> tuple[str, dict]:
    """The text and the last message."""
    agent.generate(ident, **fields)
    words = []
    while (message := agent.hear("token", "done", "error"))["ev"] == "token":
        words.append(message["text"])
    return "".join(words), message


def test_two_engines_share_a_model_and_answer_as_one(agent, tiny, tiny_store) -> None:
    open_all(agent, tiny)
    expected, _done = answer(agent, "whole", max_tokens=24)
    nodes = [NODE, "b" * 16]
    pair = [Agent(tiny_store.root, node=node) for node in nodes]
    ports = [each.hear("ready")["data_port"] for each in pair]
    lots = tiny.demand().lots()
    halves = {nodes[0]: lots[:11], nodes[1]: lots[11:]}
    table = RouteTable(
        tiny.hash,
        1,
        {lot: (node,) for node, half in halves.items() for lot in half},
        {node: ("127.0.0.1", port) for node, port in zip(nodes, ports, strict=True)},
    ).to_json()
    for node, each in zip(nodes, pair, strict=True):
        each.say("open", model="tiny")
        each.hear("opened")
        each.say("load", lots=halves[node])
        each.hear("loaded")
        each.say("routes", table=table)
    texts = [answer(each, "half", max_tokens=24)[0] for each in pair]
    pair[0].say("stats")
    assert pair[0].hear("stats")["peers"][nodes[1]]["calls"] > 0
    assert texts == [expected, expected]

    pair[1].process.kill()
    text, message = answer(pair[0], "alone")
    assert (text, message["type"]) == ("", "NotCovered")
    pair[0].say("load", lots=halves[nodes[1]])
    pair[0].hear("loaded")
    assert answer(pair[0], "again", max_tokens=24)[0] == expected
    for each in pair:
        each.close()


def test_errors_name_the_request_and_what_to_do(agent, tiny) -> None:
    _text, message = answer(agent, "early")
    assert message["type"] == "NoModel"
    agent.say("open", model="nothing")
    assert agent.hear("failed")["type"] == "UnknownModel"
    open_all(agent, tiny)
    _text, message = answer(agent, "long", prompt="the " * 400)
    assert (message["type"], message["code"]) == ("ContextTooLong", "context_length_exceeded")
    _text, message = answer(agent, "empty", prompt="")
    assert (message["type"], message["param"]) == ("BadRequest", "prompt")


def test_a_cancelled_request_makes_room_for_the_next(agent, tiny) -> None:
    open_all(agent, tiny)
    for ident in ("one", "two", "three"):
        agent.generate(ident, max_tokens=200)
    assert agent.hear("error")["type"] == "Overloaded"
    agent.say("cancel", id="one")
    agent.say("cancel", id="two")
    text, message = answer(agent, "four")
    assert message["ev"] == "done"
    assert text


def test_quit_and_a_vanished_agent_both_end_the_engine(tiny_store) -> None:
    agent = Agent(tiny_store.root)
    agent.hear("ready")
    agent.say("quit")
    assert agent.process.wait(2) == 0
    agent.close()
    agent = Agent(tiny_store.root)
    agent.hear("ready")
    assert agent.close() == 0


def test_a_taken_port_is_named(tiny_store) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        agent = Agent(tiny_store.root, port=port)
        assert str(port) in agent.hear("failed")["message"]
        assert agent.close() == 1


def test_files_of_a_killed_engine_are_swept(tiny_store) -> None:
    stale = Path("/dev/shm") / "coeld-weights-999999999-x"
    if not os.access(stale.parent, os.W_OK):
        pytest.skip("no /dev/shm here")
    stale.touch()
    agent = Agent(tiny_store.root)
    agent.hear("ready")
    agent.close()
    assert not stale.exists()
