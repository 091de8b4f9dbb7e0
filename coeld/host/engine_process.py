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
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from coeld.engine.protocol import LINE_BYTES_MAX, decode, encode
from coeld.errors import FrameError
from coeld.ids import NodeId

NICENESS: Final = 5
"""Added to the agent's own."""
QUIT_S: Final = 1.0
"""To end after "quit"; then SIGTERM."""
TERMINATE_S: Final = 0.5
"""To end after SIGTERM; then SIGKILL."""
UNREAD_BYTES_MAX: Final = 64 << 20
"""An engine that leaves this much unread is stuck."""

ENGINE_COMMAND: Final = (sys.executable, "-m", "coeld.engine")


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What the engine is told on its command line."""

    store_dir: Path
    node: NodeId
    swarm: str
    host: str
    port: int
    threads: int
    context_tokens: int
    requests_max: int
    call_deadline_ms: int
    patience_s: float
    command: tuple[str, ...] = ENGINE_COMMAND

    def arguments(self, fd: int) -> list[str]:
        values = {
            "fd": fd,
            "store": self.store_dir,
            "node": self.node,
            "swarm": self.swarm,
            "host": self.host,
            "port": self.port,
            "threads": self.threads,
            "context": self.context_tokens,
            "requests-max": self.requests_max,
            "call-deadline-ms": self.call_deadline_ms,
            "patience-s": self.patience_s,
        }
        named = [text for name, value in values.items() for text in (f"--{name}", str(value))]
        return [*self.command, *named]


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
    async def start(options: EngineOptions) -> "EngineProcess":
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
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
            self._kill()
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

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
