"""Tell systemd how the service is doing (sd_notify): one datagram to $NOTIFY_SOCKET."""

import contextlib
import os
import socket


def notify(state: str) -> None:
    """For example "READY=1". Does nothing outside of systemd."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):  # the abstract namespace
        address = "\0" + address[1:]
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock,
    ):
        sock.sendto(state.encode(), address)
