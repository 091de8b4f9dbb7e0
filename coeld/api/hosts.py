"""On the TCP port, only answer to the names of this machine.

A web page can make a browser look up the page's own name as 127.0.0.1 and then talk to local
servers as if it were one of their pages (DNS rebinding); the Host header gives it away. The unix
socket is out of reach for browsers, and `curl --unix-socket` sends whatever name it likes.
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
        host = Headers(scope=scope).get("host", "").partition(":")[0] if over_tcp else "localhost"
        if host in NAMES:
            await self._app(scope, receive, send)
            return
        text = f"this port answers only to {' and '.join(sorted(NAMES))}, not to {host!r}."
        found = plain(403, text, "invalid_request_error", code="forbidden_host")
        await JSONResponse(found.body, found.status)(scope, receive, send)
