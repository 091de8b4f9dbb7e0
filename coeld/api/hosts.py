"""On the TCP port, only answer to the names of this machine, and to no web page of others.

A web page can make a browser look up the page's own name as 127.0.0.1 and then talk to local
servers as if it were one of their pages (DNS rebinding); the Host header gives it away. And any
page may post plain text to any server, though not read the answer; the Origin header gives that
away. The unix socket is out of reach for browsers, and `curl --unix-socket` sends whatever name it
likes.
"""

from typing import Final

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from coeld.api.failures import plain

NAMES: Final = frozenset(("127.0.0.1", "localhost"))


class LocalNamesOnly:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        _, port = scope.get("server") or ("", None)
        over_tcp = scope["type"] == "http" and port is not None  # a unix socket has no port
        found = _stranger(Headers(scope=scope)) if over_tcp else ""
        if not found:
            await self._app(scope, receive, send)
            return
        text = f"this port answers only to {' and '.join(sorted(NAMES))}, not to {found}."
        refusal = plain(403, text, "invalid_request_error", code="forbidden_host")
        await JSONResponse(refusal.body, refusal.status)(scope, receive, send)


def _stranger(headers: Headers) -> str:
    """The name that is not one of this machine's; empty when there is none."""
    host = headers.get("host", "")
    if host.partition(":")[0] not in NAMES:
        return f"{host!r}"
    origin = headers.get("origin")  # browsers alone send it
    if origin is not None and origin.partition("://")[2].partition(":")[0] not in NAMES:
        return f"pages of {origin!r}"
    return ""
