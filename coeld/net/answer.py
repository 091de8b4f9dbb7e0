"""An answer on its way from the engine to its reader, and where requests wait before they begin.

The engine cannot be slowed down by a reader, so each answer has a bounded buffer; a reader that
falls that far behind is cut off. While the model goes over to its next version no request begins:
those that come wait in the lobby, as long as they would wait for experts, and are then answered by
the version that is there.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Any, Final

from coeld.errors import CoeldError, Overloaded, Updating

BUFFERED_EVENTS_MAX: Final = 1024
"""Token events that wait for a slow reader of one answer."""


class Answer:
    """The events of one request, as they arrive; iterate it until it ends or raises CoeldError."""

    def __init__(self) -> None:
        self._events: deque[dict[str, Any]] = deque()
        self._changed = asyncio.Event()
        self._failure: CoeldError | None = None
        self.ended = False

    def push(self, event: dict[str, Any]) -> bool:
        """False when the buffer is full: the reader is too slow."""
        self.ended = event["ev"] == "done"
        self._events.append(event)
        self._changed.set()
        return self.ended or len(self._events) < BUFFERED_EVENTS_MAX

    def fail(self, failure: CoeldError) -> None:
        self._failure, self.ended = failure, True
        self._changed.set()

    def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        return self._iterate()

    async def _iterate(self) -> AsyncIterator[dict[str, Any]]:
        while True:
            while self._events:
                event = self._events.popleft()
                yield event
                if event["ev"] == "done":
                    return
            if self._failure:
                raise self._failure
            self._changed.clear()
            await self._changed.wait()


class Lobby:
    """Requests that wait for the next version: `room` of them, as many as may run at once."""

    def __init__(self, room: int, patience_s: float) -> None:
        self._room, self._patience_s = room, patience_s
        self._waiting = 0
        self._turned = asyncio.Event()
        """Set for a moment when something has changed."""
        self.refusal = ""
        """Why this device begins no requests; empty: it does."""
        self.coming = ""
        """The model whose next version is being opened; empty: none is."""

    def change(self, *, refusal: str | None = None, coming: str | None = None) -> None:
        """What is not None is so from now on."""
        self.refusal = self.refusal if refusal is None else refusal
        self.coming = self.coming if coming is None else coming
        self._turned.set()
        self._turned.clear()

    @property
    def shut(self) -> bool:
        return bool(self.refusal or self.coming)

    async def pass_through(self) -> None:
        """At once, or when requests may begin. Raises Updating when that takes too long, Overloaded
        when too many wait already."""
        if not self.shut:
            return
        if self._waiting >= self._room:
            raise Overloaded(
                f"{self._waiting} requests (engine.requests_max) wait already for the new version "
                "of the model: ask again in a few seconds."
            )
        self._waiting += 1
        try:
            async with asyncio.timeout(self._patience_s):
                while self.shut:
                    await self._turned.wait()
        except TimeoutError:
            opening = f"The new version of {self.coming} is being opened: ask again in a moment."
            raise Updating(self.refusal or opening) from None
        finally:
            self._waiting -= 1
