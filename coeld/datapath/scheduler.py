"""The scheduler: which request runs next. One turn gives every request one step.

A step is a chunk of a prompt or one token, so a long prompt does not silence the answers that are
already streaming. Not thread-safe: the decoder's thread owns it.

A request that loses its way (a device with some of its keys and values is gone) is mended: the
layers that are lost run again for its tokens, the prompt in the same chunks as before, then what
was generated, of which nothing is said twice. One by one the generated tokens give the bits of the
first time, in chunks they do not: a logit of SmolLM2 changes by up to 0.35, enough to flip a
near-tie. So greedy answers are replayed one by one while that takes no longer than REPLAY_S.

A request that is well and goes over to another way stays on its own until a journey along the other
has caught up beside it (coeld.datapath.catch_up).
"""

import time
from typing import Final

from coeld.datapath.costs import ANSWER, rest_work
from coeld.datapath.decoder import Decoder
from coeld.datapath.journey import Journey
from coeld.datapath.request import Cancelled, FinishReason, LegLost, Request
from coeld.datapath.sampling import choose
from coeld.datapath.split import Split
from coeld.errors import CoeldError, NotCovered

REPLAY_S: Final = 5.0
"""A silence that a reader bears for the sake of the very same text."""

LOSSES_MAX: Final = 6
"""Ways that one token may lose. Each after the first means LOST_S without some device: 18 s."""


class Scheduler:
    """The requests under way."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.active: list[Request] = []

    def submit(self, request: Request) -> None:
        request.tokens = list(request.prompt)
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
            except LegLost as lost:
                reason, error = None, self._begin_again(request, lost)
                finished = error is not None
            except CoeldError as exc:
                reason, error, finished = None, exc, True
            if finished:
                self._retire(request)
            if error is not None:
                request.listener.failed(request, error)
            elif reason is not None:
                request.listener.done(request, reason)

    def fail_all(self, error: CoeldError) -> None:
        """Afterwards no thread of theirs is left."""
        for request in list(self.active):
            catching, request.catching = request.catching, None
            if catching is not None and (ahead := catching.close()) is not None:
                ahead.free()
            self._retire(request)
            request.listener.failed(request, error)

    def _retire(self, request: Request) -> None:
        self.active.remove(request)
        self._end_journey(request)

    def _end_journey(self, request: Request) -> None:
        self._stay(request)
        if request.journey is not None:
            request.journey.free()
            request.journey = None

    def _begin_again(self, request: Request, lost: LegLost) -> NotCovered | None:
        """The next step sets out on another way. The error, when that is of no use."""
        request.astray, request.stepped = True, None
        if request.lost_since_s is None:
            request.lost_since_s = time.monotonic()
        request.losses += 1
        if request.losses > LOSSES_MAX:
            return NotCovered(
                f"The devices that run this model's layers failed {request.losses} times in a row "
                f"({lost}): the swarm is re-organising or a link is down. See coeld status, and "
                "ask again.",
                0,
            )
        return None

    def _depart(self, request: Request) -> Journey:
        """The way that is lost, and one that was catching up beside it, mend each other."""
        before, request.routes = request.journey, self._decoder.costs.routes
        ahead = None if before is None else self._caught_up(request, before)
        request.journey = journey = self._decoder.depart(before, ahead)
        request.astray, request.cached = False, journey.length
        if before is not None:
            replay_s = request.replay_s * journey.behind
            request.exact = request.sampling.temperature <= 0 and replay_s <= REPLAY_S
        return journey

    def _step(self, request: Request) -> FinishReason | None:
        """Prefill a chunk or decode a token. Why the request has ended, if it has."""
        started = time.monotonic()
        journey = request.journey
        if journey is None or request.astray:
            journey = self._depart(request)
        before = journey.length
        logits = self._decoder.prefill(journey, request)
        if logits is None:
            chunk = request.next_tokens(before, journey.stop(), request.exact)
            last = before + len(chunk) == len(request.tokens)  # of those that are known
            rows = [len(chunk) - 1] if last else []
            logits = self._decoder.forward(journey, chunk, rows, request)
        request.cached, count = journey.length, journey.length - before
        now = time.monotonic()
        if not request.generated:
            request.prefill_s += now - started
            request.decoding_since_s = now
            if request.cached == len(request.prompt):
                request.prefill_split, request.split = request.split, Split()
        if request.cached < len(request.tokens):
            return None  # the prompt goes on, or what is replayed
        if request.generated:
            request.decode_s = now - request.decoding_since_s
            self._learn(request, count, now)
        if request.lost_since_s is not None:
            request.stalls_s.append(now - request.lost_since_s)
            request.losses, request.lost_since_s = 0, None
        reason = self._emit(request, choose(logits[0], request.sampling, request.generator))
        if reason is None and count == 1:
            self._go_over(request, journey)
        return reason

    def _go_over(self, request: Request, journey: Journey) -> None:
        """Leave a way that still works for that of newer routes, once another journey has caught up
        with it: its last tokens are run here, between two of the reader's."""
        if request.catching is None:
            request.catching = self._decoder.aside(request)
            return
        request.stepped = None
        if not request.catching.wait(0) or (ahead := self._caught_up(request, journey)) is None:
            return
        try:
            while not ahead.follow(journey):
                stop = min(journey.length, ahead.stop() or journey.length)
                chunk = request.next_tokens(ahead.length, stop, request.exact)
                self._decoder.forward(ahead, chunk, [], request)
        except (LegLost, NotCovered):
            ahead.free()
            return
        except BaseException:
            ahead.free()
            raise
        ahead.routes = journey.routes
        ahead.part_from(journey)
        request.journey = ahead

    def _caught_up(self, request: Request, journey: Journey) -> Journey | None:
        """What was catching up beside the journey, as far as it has come."""
        catching = request.catching
        if catching is None or any(s.lost and catching.needs(s.leg.node) for s in journey.stages):
            self._stay(request)  # else its call to who is lost would have to be waited for
            return None
        request.catching = None
        return catching.close()

    def _stay(self, request: Request) -> None:
        """Go over to no other way."""
        catching, request.catching = request.catching, None
        if catching is not None:
            catching.abandon()

    def _learn(self, request: Request, rows: int, now: float) -> None:
        """What a token took that had nobody else's turns, nor a search for owners, in it."""
        split, before, request.stepped = request.split, request.stepped, None
        costs = self._decoder.costs
        costs.begin_token()
        if not rows == len(self.active) == 1 or request.routes != costs.routes:
            return
        request.stepped = now, split.spent_s, split.cuts, len(request.stalls_s)
        if before is not None and before[3] == len(request.stalls_s):
            took_s, spent_s = now - before[0], split.spent_s - before[1]
            costs.note(ANSWER, took_s)
            rest_s = max(0.0, took_s - spent_s)
            costs.note(rest_work(split.cuts - before[2]), rest_s)

    def _emit(self, request: Request, token: int) -> FinishReason | None:
        if token in request.eos_tokens:
            return "stop"
        request.tokens.append(token)
        if request.listener.token(token):
            return "stop"
        return "length" if request.generated >= request.tokens_max else None
