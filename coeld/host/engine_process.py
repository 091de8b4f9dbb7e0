"""The engine as a child process: how it is started, how its lines are read, how it is stopped.

Agent and engine share a socket pair. The engine inherits one end as a file descriptor and ends when
the other closes, so neither outlives the other and no path is left behind. It runs at a lower
priority than the agent: an agent that stays responsive while all cores compute is not mistaken for
a dead one.
"""

import asyncio
import contextlib
import os
import socket
from typing import Any, Final

from coeld.engine.protocol import (
    ENGINE_COMMAND,
    LINE_BYTES_MAX,
    EngineOptions,
    decode,
    encode,
)
from coeld.errors import FrameError

NICENESS: Final = 5
"""Added to the agent's own."""
QUIT_S: Final = 1.0
"""To end after "quit"; then SIGTERM."""
TERMINATE_S: Final = 0.5
"""To end after SIGTERM; then SIGKILL."""
UNREAD_BYTES_MAX: Final = 64 << 20
"""An engine that leaves this much unread is stuck."""


class EngineProcess:
    """One life of the engine."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer

    @staticmethod
    async def start(
        options: EngineOptions, command: tuple[str, ...] = ENGINE_COMMAND
    ) -> "EngineProcess":
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    *command,
                    *options.arguments(theirs.fileno()),
                    pass_fds=(theirs.fileno(),),
                    stdin=asyncio.subprocess.DEVNULL,
                )
            except BaseException:
                ours.close()
                raise
        with contextlib.suppress(OSError):  # it has ended already, or a sandbox forbids it
            nice = os.getpriority(os.PRIO_PROCESS, 0) + NICENESS
            os.setpriority(os.PRIO_PROCESS, process.pid, min(nice, 19))
        reader, writer = await asyncio.open_connection(sock=ours, limit=LINE_BYTES_MAX)
        return EngineProcess(process, reader, writer)

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: dict[str, Any]) -> None:
        """Queue one message. A dead engine loses it; a stuck one is killed."""
        if self._writer.transport.get_write_buffer_size() > UNREAD_BYTES_MAX:
            self.kill()
            return
        if not self._writer.is_closing():
            self._writer.write(encode(message))

    async def receive(self) -> dict[str, Any] | None:
        """The next message; None when the engine has gone. Raises FrameError when it babbles."""
        try:
            line = await self._reader.readline()
        except ConnectionError:
            return None
        except ValueError as exc:
            raise FrameError(f"a line longer than {LINE_BYTES_MAX} bytes") from exc
        return decode(line) if line.endswith(b"\n") else None

    async def stop(self) -> int:
        """End it, kindly first; returns its exit status within QUIT_S + TERMINATE_S or so."""
        self.send({"op": "quit"})
        steps = ((QUIT_S, self._process.terminate), (TERMINATE_S, self._process.kill))
        for patience_s, harder in steps:
            try:
                await asyncio.wait_for(self._process.wait(), patience_s)
                break
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    harder()
        self._writer.close()
        return await self._process.wait()

    def kill(self) -> None:
        """At once; `receive` will tell that it has gone."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
