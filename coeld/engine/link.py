"""The engine's end of the socket pair it shares with the agent.

Reading belongs to the main thread; any thread may write. When the agent's end closes, reading
ends, and so does the engine.
"""

import socket
import threading
from collections.abc import Iterator
from typing import Any

from coeld.engine import protocol
from coeld.errors import FrameError


class Link:
    """Lines of JSON, both ways."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._file = sock.makefile("rb")
        self._lock = threading.Lock()

    def messages(self) -> Iterator[dict[str, Any]]:
        """What the agent says, until it goes away. Raises FrameError: then the agent is broken."""
        while True:
            try:
                line = self._file.readline(protocol.LINE_BYTES_MAX + 1)
            except OSError:
                return
            if not line:
                return
            if len(line) > protocol.LINE_BYTES_MAX:
                raise FrameError("a line from the agent is too long")
            yield protocol.decode(line)

    def say(self, event: str, **fields: Any) -> None:
        """Tell the agent. Silent once it is gone: the main thread notices by itself."""
        line = protocol.encode({"ev": event, **fields})
        try:
            with self._lock:
                self._sock.sendall(line)
        except OSError:
            return

    def close(self) -> None:
        self._file.close()
        self._sock.close()
