"""Requests while the model goes over to its next version wait; an engine that hangs is replaced."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from coeld.engine.protocol import ENGINE_COMMAND
from coeld.errors import EngineGone, NoModel, Overloaded, Updating
from coeld.events import Drained, EngineStarted, EngineStopped, Event, LotsLoaded
from coeld.model.store import Store
from coeld.net import engine_link
from coeld.net.answer import Lobby
from coeld.net.engine_link import EngineLink
from tests.fakes.run_agent import FAKE_ENGINE
from tests.harness.engine import CALIBRATION
from tests.unit.host.test_engine_process import OPTIONS

ORDER = {"prompt": "hello", "max_tokens": 9}
SAMPLING = {"temperature": 0, "top_p": 1.0, "top_k": 0, "seed": None, "stop": [], "kl_budget": None}
REAL_ORDER = {"prompt": "the", "max_tokens": 200, **SAMPLING}
FAKE = (sys.executable, str(FAKE_ENGINE))


class Linked:
    """A link with a fake engine, and what it told the node."""

    def __init__(self, store: Store, command: tuple[str, ...] = FAKE, **options: Any) -> None:
        self.events: list[Event] = []
        self.changed = asyncio.Event()
        settings = replace(OPTIONS, store_dir=store.root, **options)
        self.link = EngineLink(settings, "tiny", self.emit, command)

    def emit(self, event: Event) -> None:
        self.events.append(event)
        self.changed.set()

    async def until(self, wanted: Callable[[], object]) -> None:
        async with asyncio.timeout(20):
            while not wanted():
                self.changed.clear()
                await self.changed.wait()

    @property
    def opened(self) -> list[int]:
        return [e.demand.version for e in self.events if isinstance(e, EngineStarted) and e.demand]

    async def ask(self) -> tuple[int, str]:
        """The version that answers, and what."""
        async with self.link.generate(ORDER) as answer:
            version = self.link.model.version
            words = [event.get("text", "") async for event in answer]
        return version, "".join(words)


@asynccontextmanager
async def linked(store: Store, **options: Any) -> AsyncIterator[Linked]:
    """With the older version open, and admitting no requests."""
    async with started(store, **options) as made:
        made.link.admit("a new version is rolled out")
        yield made


@asynccontextmanager
async def started(
    store: Store, command: tuple[str, ...] = FAKE, **options: Any
) -> AsyncIterator[Linked]:
    """With the oldest version open."""
    made = Linked(store, command, **options)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(made.link.run())
        await made.until(lambda: made.opened == [1])
        yield made
        running.cancel()


async def begin(*asks: Any) -> list[asyncio.Task[Any]]:
    """Tasks that have come as far as they can."""
    tasks = [asyncio.create_task(ask) for ask in asks]
    await asyncio.sleep(0)
    return tasks


def test_a_request_that_comes_while_versions_change_is_answered_by_the_new_one(
    two_versions,
) -> None:
    async def main() -> None:
        async with linked(two_versions, patience_s=20) as swarm:
            (asked,) = await begin(swarm.ask())
            assert Drained() in swarm.events, "who waits is not under way"
            swarm.link.open(two_versions.manifest("tiny").hash)
            assert swarm.link.model is None
            assert swarm.link.serves == ("tiny", OPTIONS.context_tokens)
            await swarm.until(lambda: swarm.opened == [1, 2])
            assert not asked.done(), "the node has not admitted requests yet"
            swarm.link.admit("")
            assert await asked == (2, "you said: hello ")

    asyncio.run(main())


def test_a_request_is_answered_by_the_old_version_when_that_stays(two_versions) -> None:
    async def main() -> None:
        async with linked(two_versions, patience_s=20) as swarm:
            (asked,) = await begin(swarm.ask())
            swarm.link.admit("")
            assert (await asked)[0] == 1

    asyncio.run(main())


def test_patience_and_room_have_an_end(two_versions) -> None:
    async def main() -> None:
        async with linked(two_versions, patience_s=0.2, requests_max=2) as swarm:
            first, second, third = await begin(*(swarm.ask() for _ in range(3)))
            with pytest.raises(Overloaded):
                await third
            for waited in (first, second):
                with pytest.raises(Updating, match="rolled out"):
                    await waited
            swarm.link.admit("")
            assert (await swarm.ask())[0] == 1, "who waited has left its place"

    asyncio.run(main())


def test_who_waits_for_a_version_that_cannot_be_opened_learns_why(two_versions) -> None:
    async def main() -> None:
        async with linked(two_versions, patience_s=20) as swarm:
            swarm.link.open(two_versions.manifest("tiny").hash)
            swarm.link.admit("")
            (asked,) = await begin(swarm.ask())
            swarm.link._handle({"ev": "failed", "message": "a damaged blob"})
            with pytest.raises(NoModel, match="a damaged blob"):
                await asked
            assert swarm.link.serves is None

    asyncio.run(main())


def test_a_real_engine_that_hangs_in_an_answer_is_replaced(tiny_store, monkeypatch, caplog) -> None:
    monkeypatch.setattr(engine_link, "PING_S", 0.5)

    async def main() -> None:
        options = {"context_tokens": 256, "calibration": CALIBRATION}
        async with started(tiny_store, ENGINE_COMMAND, **options) as swarm:
            link = swarm.link
            link.load(link.model.lots())
            await swarm.until(lambda: any(isinstance(e, LotsLoaded) for e in swarm.events))
            hung = link.pid

            async def stop_it() -> None:
                async with link.generate(REAL_ORDER) as answer:
                    async for _event in answer:
                        os.kill(hung, signal.SIGSTOP)

            with pytest.raises(EngineGone):
                await stop_it()
            await swarm.until(lambda: swarm.opened == [1, 1])
            assert any(isinstance(event, EngineStopped) for event in swarm.events)
            assert link.pid != hung
            assert link.restarts == 1

    asyncio.run(main())
    assert "5 pings" in caplog.text


def test_while_the_agent_itself_is_late_no_engine_is_taken_for_hung(
    tiny_store, monkeypatch
) -> None:
    monkeypatch.setattr(engine_link, "PING_S", 0.1)

    async def main() -> None:
        async with started(tiny_store) as swarm:
            os.kill(swarm.link.pid, signal.SIGSTOP)
            await asyncio.sleep(0.25)
            time.sleep(1.0)  # noqa: ASYNC251 - ten pings, had this process not stood still
            os.kill(swarm.link.pid, signal.SIGCONT)
            assert (await swarm.ask())[0] == 1
            assert swarm.link.restarts == 0

    asyncio.run(main())


def test_a_lobby_that_is_open_holds_nobody_up() -> None:
    async def main() -> None:
        lobby = Lobby(0, 0.0)
        await lobby.pass_through()
        lobby.change(coming="tiny")
        with pytest.raises(Overloaded):
            await lobby.pass_through()

    asyncio.run(main())
