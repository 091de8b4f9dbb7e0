"""Run the API on sockets that are already open, until cancelled. uvicorn, without its habits.

uvicorn would install signal handlers and a logging configuration of its own; the agent has both.
"""

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.applications import Starlette

STOP_S = 0.5
"""That running answers get to notice their end."""
CONNECTIONS_MAX = 128


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to the agent."""
        yield


async def serve(app: Starlette, sockets: list[socket.socket]) -> None:
    """Serve until cancelled; then close connections within STOP_S or so."""
    config = uvicorn.Config(
        app,
        http="h11",
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
