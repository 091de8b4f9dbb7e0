"""HTTP on the local socket: OpenAI's three endpoints, /status and /healthz.

A request is a stream of engine events; this file turns it into one JSON answer or into server-sent
events, and makes sure that a client which goes away, or stops reading, ends its request in the
engine too. An answer that breaks half way says so in the stream and ends without a finish_reason:
what looks finished is finished.
"""

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message

from coeld.api.failures import Failure, failure, plain
from coeld.api.hosts import LocalNamesOnly
from coeld.api.openai import Ask, Kind, Reply, model_card, parse
from coeld.errors import CoeldError, NoModel, UnknownModel

BODY_BYTES_MAX: Final = 8 << 20
"""Far more text than any context holds."""

log = logging.getLogger(__name__)


class Answering(Protocol):
    """What the API needs from the daemon."""

    def model(self) -> tuple[str, int] | None:
        """Name and context length of the open model."""

    def not_ready(self) -> NoModel:
        """Why there is none."""

    def generate(
        self, request: dict[str, Any]
    ) -> AbstractAsyncContextManager[AsyncIterable[dict[str, Any]]]:
        """The engine's events for one request; leaving the block cancels it."""

    async def status(self) -> dict[str, Any]:
        """Everything `coeld status` shows, without the API's own counters."""


class Api:
    """The application. `counters` says how many requests went which way."""

    def __init__(self, daemon: Answering) -> None:
        self._daemon = daemon
        self._started_s = int(time.time())
        self.counters: Counter[str] = Counter()
        self.app = Starlette(
            routes=[
                Route("/v1/models", self._models),
                Route("/v1/models/{name}", self._model),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/completions", self._completions, methods=["POST"]),
                Route("/status", self._status),
                Route("/healthz", self._healthz),
            ],
            middleware=[Middleware(LocalNamesOnly)],
            exception_handlers={HTTPException: self._http_error, Exception: self._bug},
        )

    # Endpoints

    async def _models(self, _: Request) -> Response:
        open_now = self._daemon.model()
        cards = [model_card(open_now[0], self._started_s, open_now[1])] if open_now else []
        return JSONResponse({"object": "list", "data": cards})

    async def _model(self, request: Request) -> Response:
        try:
            name, context_tokens = self._serving(request.path_params["name"])
        except CoeldError as exc:
            return self._refuse(failure(exc))
        return JSONResponse(model_card(name, self._started_s, context_tokens))

    async def _chat(self, request: Request) -> Response:
        return await self._answer("chat", request)

    async def _completions(self, request: Request) -> Response:
        return await self._answer("text", request)

    async def _status(self, _: Request) -> Response:
        return JSONResponse(await self._daemon.status() | {"api": dict(self.counters)})

    async def _healthz(self, _: Request) -> Response:
        """200 while the daemon runs; whether it can answer is /status."""
        return JSONResponse({"ok": True, "model": self._daemon.model() is not None})

    # One request

    async def _answer(self, kind: Kind, request: Request) -> Response:
        try:
            body = await _read(request)
        except ClientDisconnect:
            return self._left()
        if body is None:
            text = f"The body is larger than {BODY_BYTES_MAX} bytes."
            return self._refuse(plain(413, text, "invalid_request_error"))
        try:
            ask = parse(kind, body)
            name, _ = self._serving(ask.model)
            ident = ("chatcmpl-" if kind == "chat" else "cmpl-") + secrets.token_hex(12)
            reply = Reply(kind, ident, int(time.time()), name)
            self.counters["requests"] += 1
            answer = self._begin(ask, reply) if ask.stream else self._collect(ask, reply)
            return await self._unless_it_leaves(answer, request.receive)
        except CoeldError as exc:
            return self._refuse(failure(exc))

    def _serving(self, wanted: str | None) -> tuple[str, int]:
        """The open model, if it is the wanted one. Raises NoModel, UnknownModel."""
        found = self._daemon.model()
        if found is None:
            raise self._daemon.not_ready()
        if wanted is not None and wanted != found[0]:
            raise UnknownModel(
                f"The model {wanted!r} is not served here; {found[0]!r} is. Leave model out, or "
                f"name that one."
            )
        return found

    async def _unless_it_leaves(
        self,
        work: Coroutine[Any, Any, Response],
        receive: Callable[[], Awaitable[Message]],
    ) -> Response:
        """What `work` returns, unless the client leaves first: then it is cancelled."""
        async with asyncio.TaskGroup() as group:
            answer = group.create_task(work, name="api-answer")
            watch = group.create_task(_disconnect(receive), name="api-disconnect")
            await asyncio.wait((answer, watch), return_when=asyncio.FIRST_COMPLETED)
            watch.cancel()
            if not answer.done():
                answer.cancel()
        if answer.cancelled():
            return self._left()
        return answer.result()

    async def _collect(self, ask: Ask, reply: Reply) -> Response:
        """The whole answer, or the error instead of it."""
        pieces: list[str] = []
        try:
            async with self._daemon.generate(ask.engine) as events:
                async for event in events:
                    if event["ev"] == "done":
                        self.counters["completed"] += 1
                        return JSONResponse(reply.whole("".join(pieces), event))
                    pieces.append(event["text"])
        except CoeldError as exc:
            return self._refuse(failure(exc))
        raise AssertionError("an answer ends with done or an error")

    async def _begin(self, ask: Ask, reply: Reply) -> Response:
        """The stream once its first chunk is there: errors before it are plain HTTP errors, later
        ones go into the stream."""
        chunks = self._chunks(ask, reply)
        try:
            head = await anext(chunks)
        except CoeldError as exc:
            return self._refuse(failure(exc))
        return StreamingResponse(
            _chain(head, chunks),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )

    async def _chunks(self, ask: Ask, reply: Reply) -> AsyncIterator[bytes]:
        begun = finished = False
        try:
            async with self._daemon.generate(ask.engine) as events:
                async for event in events:
                    if not begun and (head := reply.first()):
                        yield _sse(head)
                    begun = True
                    if event["ev"] == "done":
                        finished = True
                        self.counters["completed"] += 1
                        yield _sse(reply.last(event))
                        if ask.include_usage:
                            yield _sse(reply.usage(event))
                        yield b"data: [DONE]\n\n"
                    elif event["text"]:
                        yield _sse(reply.piece(event["text"]))
        except CoeldError as exc:
            if not begun:
                raise
            self.counters["broken"] += 1
            finished = True
            yield _sse(failure(exc).body)
        finally:
            if begun and not finished:
                self.counters["abandoned"] += 1

    # Errors

    def _left(self) -> Response:
        self.counters["abandoned"] += 1
        return Response(status_code=499)  # nobody is there to read it

    def _refuse(self, found: Failure) -> Response:
        self.counters[f"refused_{found.status}"] += 1
        return JSONResponse(found.body, found.status, found.headers)

    async def _http_error(self, request: Request, exc: Exception) -> Response:
        assert isinstance(exc, HTTPException)
        text = f"{request.method} {request.url.path}: {exc.detail}."
        found = plain(exc.status_code, text, "invalid_request_error")
        return JSONResponse(found.body, exc.status_code, dict(exc.headers or {}))

    async def _bug(self, request: Request, exc: Exception) -> Response:
        log.error("a bug in coeld: %s %s", request.method, request.url.path, exc_info=exc)
        text = "Something went wrong inside coeld; its log says more. Please report it."
        return self._refuse(plain(500, text, "server_error"))


async def _read(request: Request) -> bytes | None:
    """The body; None when it is too large, as soon as that is clear."""
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > BODY_BYTES_MAX:
        return None
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > BODY_BYTES_MAX:
            return None
    return bytes(body)


async def _disconnect(receive: Callable[[], Awaitable[Message]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _sse(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


async def _chain(head: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    async with contextlib.aclosing(rest):  # type: ignore[type-var]
        yield head
        async for chunk in rest:
            yield chunk
