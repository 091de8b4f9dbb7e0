"""A blocking socket that carries whole frames.

A frame that has arrived whole costs one system call, and so does one that the socket takes whole;
only what is left over is waited for with a deadline.
"""

import contextlib
import select
import socket
import time
from typing import Final

from coeld.compression.prediction import Past
from coeld.datapath import frames
from coeld.datapath.frames import HEADER, HIDDEN_MAX, Header
from coeld.errors import FrameError
from coeld.net.exchange import peer_error
from coeld.net.sockets import prepare

RECEIVE_BYTES: Final = 1 << 14
"""At first: a row of a large model and its gate weights."""


class Connection:
    """See the module. Not thread-safe."""

    def __init__(self, sock: socket.socket, hidden_max: int = HIDDEN_MAX) -> None:
        prepare(sock)
        sock.settimeout(None)
        self.sock, self.hidden_max = sock, hidden_max
        self.past: Past | None = None
        """What the last call of experts left on both ends."""
        self._in = bytearray(RECEIVE_BYTES)
        self._have = 0
        self._taken = 0
        """Bytes of `_in` that are the frame given out last."""

    def send(self, pieces: list[bytes | memoryview], within_s: float) -> None:
        """Write all pieces with as few system calls as possible. Raises PeerGone, PeerSlow."""
        try:
            try:
                sent = self.sock.sendmsg(pieces, (), socket.MSG_DONTWAIT)
            except BlockingIOError:
                sent = 0
            if sent == sum(map(len, pieces)):
                return
            self.sock.settimeout(within_s)
            for piece in pieces:
                if sent < len(piece):
                    self.sock.sendall(memoryview(piece)[sent:])
                    sent = 0
                else:
                    sent -= len(piece)
            self.sock.settimeout(None)
        except OSError as exc:
            raise peer_error(exc) from exc

    def receive(self, idle_s: float | None, frame_s: float) -> tuple[Header, memoryview]:
        """The next frame: wait `idle_s` for its first byte (None: for ever), then `frame_s`.

        The payload is a view that the next call overwrites. Raises PeerGone, PeerSlow, FrameError.
        """
        left = self._have - self._taken
        if left:
            self._in[:left] = self._in[self._taken : self._have]
        self._have, self._taken = left, 0
        try:
            if not self._have:
                self._more(idle_s)
            deadline_s = time.monotonic() + frame_s
            self._until(HEADER.size, deadline_s)
            header = frames.parse_header(memoryview(self._in)[: HEADER.size])
            if header.hidden > self.hidden_max:  # before there is room for it
                raise FrameError(f"rows of {header.hidden}, not of {self.hidden_max}")
            size = HEADER.size + header.payload_bytes
            if len(self._in) < size:  # the old buffer may still be looked at: it cannot grow
                wider = bytearray(size)
                wider[: self._have] = memoryview(self._in)[: self._have]
                self._in = wider
            self._until(size, deadline_s)
        except (OSError, EOFError) as exc:
            raise peer_error(exc) from exc
        self._taken = size
        return header, memoryview(self._in)[HEADER.size : size]

    def arrives(self, within_s: float) -> bool:
        """Whether anything of the next frame is there, by then, or the connection is gone."""
        if self._have > self._taken:
            return True
        poller = select.poll()
        poller.register(self.sock, select.POLLIN)
        return bool(poller.poll(within_s * 1000))

    @property
    def unread(self) -> bytes:
        """What has arrived behind the frame given out last."""
        return bytes(self._in[self._taken : self._have])

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()

    def _until(self, size: int, deadline_s: float) -> None:
        while self._have < size:
            self._more(max(deadline_s - time.monotonic(), 0.001))

    def _more(self, within_s: float | None) -> None:
        if within_s is not None:
            self.sock.settimeout(within_s)
        got = self.sock.recv_into(memoryview(self._in)[self._have :])
        if within_s is not None:
            self.sock.settimeout(None)
        if not got:
            raise EOFError
        self._have += got
