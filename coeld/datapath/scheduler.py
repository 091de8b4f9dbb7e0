"""The scheduler: which request runs next. One turn gives every request one step.

A step is a chunk of a prompt or one token, so a long prompt does not silence the answers that are
already streaming. Not thread-safe: the decoder's thread owns it.
"""

import time
from collections.abc import Callable
from typing import Final

from coeld.datapath.decoder import Decoder
from coeld.datapath.ports import Cache
from coeld.datapath.request import Cancelled, FinishReason, Request
from coeld.datapath.sampling import choose
from coeld.errors import CoeldError

PREFILL_CHUNK_TOKENS: Final = 256
"""Larger chunks prefill a little faster and make the others wait longer."""


class Scheduler:
    """The requests under way."""

    def __init__(self, decoder: Decoder, new_cache: Callable[[], Cache]) -> None:
        self._decoder = decoder
        self._new_cache = new_cache
        self.active: list[Request] = []

    def submit(self, request: Request) -> None:
        request.cache = self._new_cache()
        request.generator = request.sampling.generator()
        self.active.append(request)

    def turn(self) -> None:
        """One step of every request. Ended ones leave, and only then are their listeners told."""
        for request in list(self.active):
            error: CoeldError | None = None
            try:
                reason = None if request.cancelled.is_set() else self._step(request)
                finished = request.cancelled.is_set() or reason is not None
            except Cancelled:
                reason, finished = None, True
            except CoeldError as exc:
                reason, error, finished = None, exc, True
            if finished:
                self._retire(request)
            if error is not None:
                request.listener.failed(request, error)
            elif reason is not None:
                request.listener.done(request, reason)

    def fail_all(self, error: CoeldError) -> None:
        for request in list(self.active):
            self._retire(request)
            request.listener.failed(request, error)

    def _retire(self, request: Request) -> None:
        self.active.remove(request)
        if request.cache is not None:
            request.cache.free()
            request.cache = None

    def _step(self, request: Request) -> FinishReason | None:
        """Prefill a chunk or decode a token. Why the request has ended, if it has."""
        assert request.cache is not None
        started = time.monotonic()
        if request.prefilled < len(request.prompt):
            chunk = request.prompt[request.prefilled :][:PREFILL_CHUNK_TOKENS]
            logits = self._decoder.forward(request.cache, chunk, [len(chunk) - 1], request)
            request.prefilled += len(chunk)
            request.prefill_s += time.monotonic() - started
            if request.prefilled < len(request.prompt):
                return None
            request.decoding_since_s = time.monotonic()
        else:
            logits = self._decoder.forward(request.cache, [request.last], [0], request)
            request.decode_s = time.monotonic() - request.decoding_since_s
        return self._emit(request, choose(logits[0], request.sampling, request.generator))

    def _emit(self, request: Request, token: int) -> FinishReason | None:
        if token in request.eos_tokens:
            return "stop"
        request.last = token
        request.generated += 1
        if request.listener.token(token):
            return "stop"
        return "length" if request.generated >= request.tokens_max else None
