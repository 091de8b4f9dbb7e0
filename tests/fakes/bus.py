"""Control buses in this process, and what they hear."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from random import Random

from coeld.events import Event, MessageReceived, NeighbourLost
from coeld.ids import NodeId
from coeld.messages import Beat
from coeld.net.mqtt import BusOptions, ControlBus

WAIT_S = 15.0


class Station:
    """One bus with its inbox."""

    def __init__(self, number: int, **options: object) -> None:
        self.node = NodeId(f"{number:016x}")
        usual = {
            "swarm": "test",
            "me": self.node,
            "incarnation": 1,
            "host": "127.0.0.1",
            "port": 0,
            "seeds": (),
            "brokers": (),
        }
        self.heard: list[Event] = []
        self._news = asyncio.Event()
        self.bus = ControlBus(BusOptions(**(usual | options)), self._hear, Random(number))

    def _hear(self, event: Event) -> None:
        self.heard.append(event)
        self._news.set()

    def messages(self, sender: "Station") -> int:
        return sum(
            isinstance(event, MessageReceived) and event.sender == sender.node
            for event in self.heard
        )

    def lost(self, other: "Station") -> bool:
        return NeighbourLost(other.node) in self.heard

    def beat(self, incarnation: int = 1) -> Beat:
        return Beat("test", self.node, incarnation, 1, 1, "0" * 16)

    async def until(self, wanted: Callable[[], bool]) -> None:
        """Wait for an event after which `wanted` is true."""
        async with asyncio.timeout(WAIT_S):
            while not wanted():
                self._news.clear()
                await self._news.wait()

    @contextlib.asynccontextmanager
    async def on_air(self) -> AsyncIterator["Station"]:
        await self.bus.start()
        task = asyncio.create_task(self.bus.run())
        try:
            await asyncio.sleep(0)
            yield self
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def linked(*stations: Station) -> None:
    """Say hello until everybody has heard everybody."""
    async with asyncio.timeout(WAIT_S):
        pairs = [(a, b) for a in stations for b in stations if a is not b]
        while not all(a.messages(b) for a, b in pairs):
            for station in stations:
                await station.bus.publish(station.beat())
            await asyncio.sleep(0.02)


async def eventually(wanted: Callable[[], object]) -> None:
    """Poll for what tells nobody when it happens."""
    async with asyncio.timeout(WAIT_S):
        while not wanted():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
