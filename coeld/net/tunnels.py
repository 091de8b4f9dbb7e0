"""A connection passed on to a device that its caller cannot reach by itself.

The caller introduces itself to a device in between and names whom it means; that one connects,
hands the introduction on and carries bytes both ways. It reads none of them: whatever the two ends
say to each other, spans and their caches included, works as on a straight connection.
"""

import select
import socket
from typing import Final

from coeld.net import sockets
from coeld.net.exchange import peer_error

CONNECT_S: Final = 0.5
STUCK_S: Final = 5.0
"""An end that takes nothing for so long ends the tunnel."""
PIECE_BYTES: Final = 1 << 16


def connect(address: tuple[str, int]) -> socket.socket:
    """Raises PeerGone, PeerSlow."""
    try:
        return sockets.connect(address, CONNECT_S)
    except OSError as exc:
        raise peer_error(exc) from exc


def hand_on(address: tuple[str, int], said: bytes) -> socket.socket:
    """Connect for a caller and pass on what it has said so far. Raises PeerGone, PeerSlow."""
    onward = connect(address)
    try:
        onward.sendall(said)
    except OSError as exc:
        onward.close()
        raise peer_error(exc) from exc
    return onward


def carry(one: socket.socket, other: socket.socket) -> None:
    """Carry bytes both ways until an end closes or is stuck. Raises PeerGone, PeerSlow."""
    ends = {one.fileno(): (one, other), other.fileno(): (other, one)}
    poller, piece = select.poll(), memoryview(bytearray(PIECE_BYTES))
    for sock in (one, other):
        sock.settimeout(STUCK_S)
        poller.register(sock, select.POLLIN)
    try:
        while True:
            for fd, _events in poller.poll():
                source, sink = ends[fd]
                got = source.recv_into(piece)
                if not got:
                    return
                sink.sendall(piece[:got])
    except OSError as exc:
        raise peer_error(exc) from exc
