"""Network namespaces with a TUN inside, made by system calls alone (Python 3.11 lacks unshare).

A namespace exists as long as a file descriptor or a process holds it, and a TUN as long as its own
is open: nothing has to be deleted afterwards.
"""

import ctypes
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

CLONE_NEWNET: Final = 0x40000000
PR_SET_TIMERSLACK: Final = 29
TUNSETIFF: Final = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
SIOCSIFFLAGS, SIOCSIFADDR, SIOCSIFNETMASK, SIOCSIFMTU, SIOCSIFTXQLEN = (
    0x8914, 0x8916, 0x891C, 0x8922, 0x8943,
)  # fmt: skip
IFF_UP, IFF_RUNNING, IFF_MULTICAST = 0x1, 0x40, 0x1000
INTERFACE: Final = "eth0"
"""Name of the TUN in every namespace: what programs expect."""
QUEUE_PACKETS: Final = 4000
"""Packets the kernel keeps for the switch; more are dropped where nobody counts them."""

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def timer_slack(nanoseconds: int) -> None:
    """How late the kernel may wake this thread (50 000 by default)."""
    _check(_libc.prctl(PR_SET_TIMERSLACK, nanoseconds, 0, 0, 0), "prctl")


@contextmanager
def inside(namespace: int) -> Iterator[None]:
    """This thread is in the network namespace of that descriptor; sockets made now stay there."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        _check(_libc.setns(namespace, CLONE_NEWNET), "setns")
        yield
    finally:
        _check(_libc.setns(home, CLONE_NEWNET), "setns")
        os.close(home)


def make(address: str, mtu: int) -> tuple[int, int]:
    """A namespace whose eth0 has `address`/24: descriptors of the namespace and of the TUN."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        _check(_libc.unshare(CLONE_NEWNET), "unshare")
        try:
            namespace = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
            return namespace, _tun(address, mtu)
        finally:
            _check(_libc.setns(home, CLONE_NEWNET), "setns")
    finally:
        os.close(home)


def _tun(address: str, mtu: int) -> int:
    for key in ("all", "default"):  # router solicitations would only be noise
        path = Path(f"/proc/sys/net/ipv6/conf/{key}/disable_ipv6")
        if path.exists():
            path.write_text("1")
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", INTERFACE.encode(), IFF_TUN | IFF_NO_PI))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:

        def change(request: int, name: str, value: bytes) -> None:
            fcntl.ioctl(sock, request, struct.pack("16s24s", name.encode(), value))

        def internet(text: str) -> bytes:
            return struct.pack("<HH4s", socket.AF_INET, 0, socket.inet_aton(text))

        change(SIOCSIFFLAGS, "lo", struct.pack("<H", IFF_UP | IFF_RUNNING))
        change(SIOCSIFADDR, INTERFACE, internet(address))
        change(SIOCSIFNETMASK, INTERFACE, internet("255.255.255.0"))
        change(SIOCSIFMTU, INTERFACE, struct.pack("<i", mtu))
        change(SIOCSIFTXQLEN, INTERFACE, struct.pack("<i", QUEUE_PACKETS))
        change(SIOCSIFFLAGS, INTERFACE, struct.pack("<H", IFF_UP | IFF_RUNNING | IFF_MULTICAST))
    return tun
