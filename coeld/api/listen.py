"""Opening the local socket: private to user and group, never somebody else's, or systemd's.

uvicorn would make the socket writable for everybody and would delete a file that is in its way, so
the socket is opened here. A stale file, left by a crash, is removed only if nobody answers on it.
"""

import os
import socket
import stat
from pathlib import Path
from typing import Final

from coeld.errors import StartError

PATH_BYTES_MAX: Final = 107
"""sun_path of Linux holds 108 bytes with its terminating zero."""
MODE: Final = 0o660
BACKLOG: Final = 128
FIRST_INHERITED_FD: Final = 3
"""SD_LISTEN_FDS_START."""


def inherited_sockets() -> list[socket.socket]:
    """The sockets that systemd opened for us (coeld.socket), if any."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = int(os.environ.get("LISTEN_FDS", "0"))
    fds = range(FIRST_INHERITED_FD, FIRST_INHERITED_FD + count)
    for fd in fds:
        os.set_inheritable(fd, False)
    return [socket.socket(fileno=fd) for fd in fds]


def path_of(sockets: list[socket.socket]) -> Path | None:
    """Where the first unix socket among them is found."""
    paths = [sock.getsockname() for sock in sockets if sock.family is socket.AF_UNIX]
    return Path(paths[0]) if paths and isinstance(paths[0], str) and paths[0] else None


def open_unix(path: Path) -> socket.socket:
    """Listen on `path`, mode 0660. Raises StartError when it is too long, in use or forbidden."""
    length = len(os.fsencode(path))
    if length > PATH_BYTES_MAX:
        raise StartError(
            f"the socket path {path} has {length} bytes, and the system allows {PATH_BYTES_MAX}. "
            f"Set api.socket to a shorter one, for example /tmp/coeld-{os.getuid()}/coeld.sock."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
        _clear_stale(path)
        sock = socket.socket(socket.AF_UNIX)
        old_umask = os.umask(0o777 & ~MODE)
        try:
            sock.bind(os.fspath(path))
        except BaseException:
            sock.close()
            raise
        finally:
            os.umask(old_umask)
    except OSError as exc:
        raise StartError(
            f"the socket {path} cannot be opened: {exc.strerror or exc}. Set api.socket to a path "
            "this user may write."
        ) from exc
    sock.listen(BACKLOG)
    return sock


def _clear_stale(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise StartError(
            f"{path} exists and is not a socket. Move it away, or set api.socket to another path."
        )
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(os.fspath(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
            return
        except TimeoutError:
            pass  # somebody holds it, though busy
    raise StartError(
        f"another daemon answers on the socket {path}. Stop it, or give this one a socket of its "
        "own (api.socket)."
    )


def open_tcp(port: int) -> socket.socket:
    """Listen on loopback. Raises StartError when the port is taken."""
    sock = socket.socket(socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(("127.0.0.1", port))
    except OSError as exc:
        sock.close()
        raise StartError(
            f"the API cannot listen on 127.0.0.1:{port}: {exc.strerror or exc}. Choose another "
            "api.tcp_port, or 0 to serve the unix socket alone."
        ) from exc
    sock.listen(BACKLOG)
    return sock
