"""Sockets of the data path: how they are set up, and how one is connected though packets get lost.

The kernel waits 200 ms at least before it sends again what was not acknowledged, twice as long each
further time, and a second before it repeats the first packet of a connection. Between devices that
answer within a millisecond, one lost packet would cost a token a hundred times what it takes
otherwise. So it waits RESEND_S only, where it can be told (Linux 6.16 and later; else a route's
`rto_min` says the same), and not longer each time while little is under way; and a connection that
is not made is begun anew after DIAL_S, then after twice as long each time.
"""

import contextlib
import socket
from typing import Final

RESEND_S: Final = 0.02
"""Beyond the round trip, until a packet is sent again."""
ACKNOWLEDGE_S: Final = 0.01
"""Until the other end says that it has something, if it computes longer: else it would come again
for nothing."""
DIAL_S: Final = 0.1
"""For the first attempt to connect."""
OPTIONS: Final = (
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)
"""Nothing waits for more bytes. Seconds of silence, between probes, probes: a machine that vanished
is noticed in 25 s."""
TCP_THIN_LINEAR_TIMEOUTS: Final = 16
TCP_RTO_MIN_US: Final = 45
TCP_DELACK_MAX_US: Final = 46
LOSSES: Final = (
    (TCP_THIN_LINEAR_TIMEOUTS, 1),
    (TCP_RTO_MIN_US, int(RESEND_S * 1e6)),
    (TCP_DELACK_MAX_US, int(ACKNOWLEDGE_S * 1e6)),
)
"""Of Linux; the `socket` module knows no names for them."""


def prepare(sock: socket.socket) -> None:
    """Set up a socket that is to carry frames."""
    for level, option, value in OPTIONS:
        sock.setsockopt(level, option, value)
    for option, value in LOSSES:
        with contextlib.suppress(OSError):  # a kernel that does not know it
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


def dial(address: tuple[str, int]) -> socket.socket:
    """One that begins to connect and blocks nowhere. Raises OSError."""
    sock = socket.socket(_family(address[0]), socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        prepare(sock)
        sock.connect(address)
    except BlockingIOError:
        pass
    except OSError:
        sock.close()
        raise
    return sock


def connect(address: tuple[str, int], within_s: float) -> socket.socket:
    """Raises OSError, TimeoutError among them."""
    _family(address[0])
    try:
        sock = socket.create_connection(address, timeout=DIAL_S)
    except TimeoutError:
        sock = socket.create_connection(address, timeout=within_s - DIAL_S)
    prepare(sock)
    return sock


def _family(host: str) -> socket.AddressFamily:
    """Raises OSError for what is no address: a name would block on its resolution."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    socket.inet_pton(family, host)
    return family
