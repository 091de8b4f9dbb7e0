"""Engines that misbehave: stubborn, silent, babbling, or gone at once."""

import asyncio
import os
import sys
from pathlib import Path

import pytest

from coeld.engine.protocol import EngineOptions
from coeld.errors import FrameError, StartError
from coeld.events import LinksMeasured
from coeld.host.engine_process import NICENESS, EngineProcess
from coeld.ids import NodeId
from coeld.measured import MeasuredLink
from coeld.net.engine_link import EngineLink

PREAMBLE = """
import signal, socket, sys, time
sock = socket.socket(fileno=int(sys.argv[sys.argv.index("--fd") + 1]))
"""
READY = b'{"ev":"ready","data_host":"h","data_port":1,"kernels":{}}\n'


OPTIONS = EngineOptions(
    store_dir=Path("/nonexistent"),
    node=NodeId("a" * 16),
    swarm="s",
    host="127.0.0.1",
    port=0,
    threads=1,
    context_tokens=64,
    requests_max=1,
    call_deadline_ms=100,
    kl_budget=0.0,
    patience_s=1.5,
    calibration=Path("/nonexistent"),
)


def command(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", PREAMBLE + code)


def test_the_command_line_carries_every_option() -> None:
    assert EngineOptions.parse(OPTIONS.arguments(7)) == (7, OPTIONS)


def test_an_engine_that_does_not_want_to_stop_is_killed_in_time() -> None:
    async def scenario() -> tuple[int, float]:
        loop = asyncio.get_running_loop()
        ignore = "signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        code = f"{ignore}sock.sendall({READY!r}); time.sleep(60)"
        process = await EngineProcess.start(OPTIONS, command(code))
        assert await process.receive() == {
            "ev": "ready",
            "data_host": "h",
            "data_port": 1,
            "kernels": {},
        }
        nice = os.getpriority(os.PRIO_PROCESS, process.pid)
        assert nice == min(19, os.getpriority(os.PRIO_PROCESS, 0) + NICENESS)
        began = loop.time()
        return await process.stop(), loop.time() - began

    status, seconds = asyncio.run(scenario())
    assert (status, seconds < 1.9) == (-9, True)


@pytest.mark.parametrize(
    "code",
    [
        "sock.sendall(b'rubbish\\n')",
        "sock.sendall(b'[1]\\n')",
        "sock.sendall(b'x' * (17 << 20)); time.sleep(60)",
    ],
)
def test_what_is_no_message_is_a_frame_error(code: str) -> None:
    async def scenario() -> None:
        process = await EngineProcess.start(OPTIONS, command(code))
        try:
            with pytest.raises(FrameError):
                await process.receive()
        finally:
            process._process.kill()
            await process.stop()

    asyncio.run(scenario())


def test_half_a_line_at_the_end_is_the_end() -> None:
    async def scenario() -> None:
        process = await EngineProcess.start(OPTIONS, command("sock.sendall(b'{\"ev\":')"))
        assert await process.receive() is None
        await process.stop()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("sys.exit(3)", "ended while starting"),
        ('sock.sendall(b\'{"ev":"failed","message":"port 7 is taken"}\\n\')', "port 7 is taken"),
    ],
)
def test_a_first_engine_that_cannot_start_is_a_start_error(code: str, says: str) -> None:
    async def scenario() -> None:
        events: list[object] = []
        try:
            await EngineLink(OPTIONS, "", events.append, command(code)).run()
        finally:
            assert events == []

    with pytest.raises(BaseExceptionGroup) as caught:
        asyncio.run(scenario())
    (error,) = caught.value.exceptions
    assert isinstance(error, StartError)
    assert says in str(error)


def test_a_first_engine_that_was_killed_is_followed_by_another() -> None:
    async def scenario() -> int:
        code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
        link = EngineLink(OPTIONS, "", lambda _event: None, command(code))
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            running = group.create_task(link.run())
            while link.restarts < 2:  # noqa: ASYNC110 - a counter, it tells nobody
                await asyncio.sleep(0.01)
            running.cancel()
        return link.restarts

    assert asyncio.run(scenario()) == 2


def test_links_that_the_engine_measured_reach_the_node_and_malformed_ones_are_refused() -> None:
    events: list[object] = []

    async def scenario() -> None:
        link = EngineLink(OPTIONS, "", events.append)
        link._handle({"ev": "measured", "links": [["a" * 16, 300, 900, 0]]})
        expected = (MeasuredLink(NodeId("a" * 16), 300, 900, 0),)
        assert (events, link.links) == ([LinksMeasured(expected)], expected)
        for wrong in ([["a" * 16, 300, 900]], [5], None, [["a" * 16, "x", 1, 1]]):
            with pytest.raises(FrameError):
                link._handle({"ev": "measured", "links": wrong})

    asyncio.run(scenario())
