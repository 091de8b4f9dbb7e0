"""The scheduler: which request runs next. One turn gives every request one step.

A step is a chunk of a prompt or one token, so a long prompt does not silence the answers that are
already streaming. Not thread-safe: the decoder's thread owns it.
"""

import time
from collections.abc import Callable
from typing import Final

from coeld.datapath.decoder import Decoder
from coeld.datapath.ports import Cache
from coeld.datapath.request import Cancelled, Request
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
        """One step of every request; ended ones leave."""
        for request in list(self.active):
            try:
                finished = request.cancelled.is_set() or self._step(request)
            except Cancelled:
                finished = True
            except CoeldError as exc:
                request.listener.failed(request, exc)
                finished = True
            if finished:
                self.active.remove(request)
                request.cache = None

    def fail_all(self, error: CoeldError) -> None:
        for request in self.active:
            request.listener.failed(request, error)
        self.active.clear()

    def _step(self, request: Request) -> bool:
        """Prefill a chunk or decode a token. True when the request has ended."""
        assert request.cache is not None
        started = time.monotonic()
        if request.prefilled < len(request.prompt):
            chunk = request.prompt[request.prefilled :][:PREFILL_CHUNK_TOKENS]
            logits = self._decoder.forward(request.cache, chunk, [len(chunk) - 1], request)
            request.prefilled += len(chunk)
            request.prefill_s += time.monotonic() - started
            if request.prefilled < len(request.prompt):
                return False
        else:
            logits = self._decoder.forward(request.cache, [request.last], [0], request)
            request.decode_s += time.monotonic() - started
        return self._emit(request, choose(logits[0], request.sampling, request.generator))

    def _emit(self, request: Request, token: int) -> bool:
        if token in request.eos_tokens:
            request.listener.done(request, "stop")
            return True
        request.last = token
        request.generated += 1
        if request.listener.token(token):
            request.listener.done(request, "stop")
            return True
        if request.generated >= request.tokens_max:
            request.listener.done(request, "length")
            return True
        return False
