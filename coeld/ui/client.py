"""The commands' side of the local socket: plain HTTP, one connection per request."""

import argparse
import http.client
import json
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from coeld.config import load
from coeld.errors import (
    BadRequest,
    CoeldError,
    EngineGone,
    NoModel,
    NotCovered,
    Overloaded,
    Starting,
    Unavailable,
)
from coeld.host.places import socket_to_ask

CONNECT_S: Final = 5.0
ANSWER_S: Final = 600.0
"""Without a byte from the daemon."""
POLL_S: Final = 0.3
NOT_NOW: Final = {
    "starting": Starting,
    "no_model": NoModel,
    "overloaded": Overloaded,
    "engine_gone": EngineGone,
}
"""Error codes of HTTP 503, besides not_covered."""
PASSING: Final = (Starting, NotCovered, Overloaded, EngineGone)
"""What ends by itself: the daemon starts, devices organise themselves, others have asked first."""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=ANSWER_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(CONNECT_S)
        self.sock.connect(str(self._path))
        self.sock.settimeout(ANSWER_S)


def add_socket_options(parser: argparse.ArgumentParser) -> None:
    """--socket and --config: which daemon is meant."""
    parser.add_argument("--socket", type=Path, metavar="PATH", help="of the daemon to ask")
    parser.add_argument("--config", type=Path, metavar="FILE", help="that the daemon runs with")


def socket_of(arguments: argparse.Namespace) -> Path:
    """The daemon's socket, by --socket, --config, or the usual place. Raises ConfigError."""
    if arguments.socket:
        return Path(arguments.socket)
    return socket_to_ask(load(arguments.config))


@contextmanager
def request(
    path: Path, method: str, url: str, body: Any = None
) -> Iterator[http.client.HTTPResponse]:
    """One exchange. Raises CoeldError when nobody answers, or with what the daemon says."""
    connection = _UnixConnection(path)
    data = None if body is None else json.dumps(body).encode()
    try:
        try:
            connection.request(method, url, data, {"Content-Type": "application/json"})
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as exc:
            raise Unavailable(_nobody(path, exc)) from exc
        if response.status != 200:
            raise _error(response.read())
        yield response
    finally:
        connection.close()


def get_json(path: Path, url: str) -> dict[str, Any]:
    """Raises CoeldError."""
    with request(path, "GET", url) as response:
        value: dict[str, Any] = json.loads(response.read())
        return value


def stream(path: Path, url: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The chunks of a streamed answer. Raises CoeldError, also when it breaks half way."""
    with request(path, "POST", url, body | {"stream": True}) as response:
        try:
            for line in response:
                if line.startswith(b"data: {"):
                    chunk = json.loads(line.removeprefix(b"data: "))
                    if "error" in chunk:
                        raise _error(line.removeprefix(b"data: "))
                    yield chunk
                elif line.startswith(b"data: [DONE]"):
                    return
        except (OSError, http.client.HTTPException) as exc:
            raise Unavailable(f"the daemon stopped answering in the middle: {exc}.") from exc
    raise Unavailable("the daemon ended the answer in the middle. Its log may say why.")


def patiently(
    chunks: Callable[[], Iterator[dict[str, Any]]], wait_s: float
) -> Iterator[dict[str, Any]]:
    """The chunks of `chunks()`, asked again for `wait_s` while the swarm cannot answer *yet*.

    Says once on stderr what it waits for. Raises CoeldError, at once when waiting does not help.
    """
    deadline = time.monotonic() + wait_s
    said = ""
    while True:
        try:
            found = chunks()
            first = next(found)
            break
        except PASSING as exc:
            if time.monotonic() + POLL_S > deadline:
                raise
            if type(exc).__name__ != said:
                print(f"coeld: waiting up to {wait_s:.0f} s: {exc}", file=sys.stderr)
                said = type(exc).__name__
            time.sleep(POLL_S)
    yield first
    yield from found


def _nobody(path: Path, exc: Exception) -> str:
    if isinstance(exc, PermissionError):
        return (
            f"{path} belongs to a daemon that this user may not ask. Join the group of that "
            f"socket (ls -l {path}), or ask as another user."
        )
    reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else exc
    return (
        f"no daemon answers on {path} ({reason}). Start one with: coeld up. If it uses another "
        "socket, name it with --socket."
    )


def _error(body: bytes) -> CoeldError:
    try:
        error = json.loads(body)["error"]
        if "missing_bytes" in error:
            return NotCovered(str(error["message"]), int(error["missing_bytes"]))
        if error.get("code") in NOT_NOW:
            return NOT_NOW[error["code"]](str(error["message"]))
        return BadRequest(str(error["message"]), error.get("param"), error.get("code"))
    except (ValueError, KeyError, TypeError):
        return CoeldError(f"the daemon answered {body[:200]!r}.")
