"""Run the API on sockets that are already open, until cancelled. uvicorn, without its habits.

uvicorn would install signal handlers and a logging configuration of its own; the agent has both.
"""

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

STOP_S = 0.5
"""That running answers get to notice their end."""
CONNECTIONS_MAX = 128
REQUEST_S = 10.0
"""For a request's head to be there, from the connection or the last answer on: silent strangers
would have all CONNECTIONS_MAX. (uvicorn waits for ever for the first one, or its second byte.)"""


class _Protocol(H11Protocol):
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_request()

    def on_response_complete(self) -> None:
        self._expect_request()
        super().on_response_complete()

    def _expect_request(self) -> None:
        self.loop.call_later(REQUEST_S, self._end_if_none_since, self.cycle)

    def _end_if_none_since(self, cycle: object) -> None:
        if self.cycle is cycle:
            self.transport.close()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to the agent."""
        yield


async def serve(app: Starlette, sockets: list[socket.socket]) -> None:
    """Serve until cancelled; then close connections within STOP_S or so."""
    config = uvicorn.Config(
        app,
        http=_Protocol,
        loop="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=CONNECTIONS_MAX,
        timeout_graceful_shutdown=1,
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets), name="api-server")
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        server.should_exit = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(task), STOP_S)
        server.force_exit = True
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        raise
