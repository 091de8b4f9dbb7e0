"""A journey that catches up beside the one under way, in a thread of its own, to take its place.

There are two occasions. New routes name another way: a device gives layers away, comes or leaves.
Or the answer of a leg is late and another device could run its layers: whichever is ready first is
taken, the late answer or the other way (a hedged request: Dean and Barroso, The Tail at Scale,
2013). In both the other way lacks keys and values, and running a prompt through layers again may
take a slow device many tokens' time. So tokens go on meanwhile, and calls to peers take connections
of their own (`Stage.line`), which their caches then belong to.

The last tokens are left to the decoder's thread: it alone knows that no further one comes between.
"""

import threading
from typing import Final

from coeld.datapath.journey import Journey
from coeld.datapath.quality import Quality
from coeld.datapath.request import Cancelled, LegLost, Request
from coeld.datapath.walker import Apart, Walker
from coeld.errors import NotCovered
from coeld.ids import NodeId

NEAR_TOKENS: Final = 2
"""How far behind a catch-up ends: less is seldom reached while tokens go on."""
PASS_S: Final = 2.0
"""What the end of the pass under way is worth waiting for, while all answers stand still."""


class CatchUp:
    """See the module. What is public is for the decoder's thread."""

    def __init__(
        self, walker: Walker, request: Request, ahead: Journey, around: NodeId | None
    ) -> None:
        """`ahead` is beside the request's journey. `around` is who is late, if anybody is."""
        assert request.journey is not None
        self.journey, self.around = ahead, around
        self._errand = Apart(self._check, Quality(request.quality.kl_budget))
        self._walker, self._request, self._front = walker, request, request.journey
        self._exact = request.sampling.temperature <= 0
        self._stopped = threading.Event()
        self._failed, self._abandoned = True, False
        """Failed, until its thread has come to its end."""
        self._lock = threading.Lock()
        """Guards who frees an abandoned journey: the last to know of it."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="catch-up", daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float) -> bool:
        """Whether it has come to its end, by then."""
        return self._ended.wait(timeout_s)

    @property
    def ready(self) -> bool:
        """It has ended and has not failed."""
        return self._ended.is_set() and not self._failed

    def needs(self, node: NodeId) -> bool:
        """Does it run anything at that device that the journey under way does not?"""
        return any(s.leg.node == node for s in self.journey.stages if s.within is None)

    def close(self) -> Journey | None:
        """Stop after the pass under way. The journey, as far as it has come; None: it has failed
        and holds nothing any more, or its pass waits for a device that does not answer."""
        self._stopped.set()
        if not self._ended.wait(PASS_S):
            self.abandon()
            return None
        self._request.quality.also(self._errand.quality)
        if self._failed:
            self.journey.free()
            return None
        self.journey.follow(self._front)
        return self.journey

    def abandon(self) -> None:
        """Stop, and free what it holds, without waiting for that."""
        self._stopped.set()
        with self._lock:
            self._abandoned = True
            ended = self._ended.is_set()
        if ended:
            self.journey.free()

    def _check(self) -> None:
        """While its passes wait for experts: nobody else waits for these."""
        self._request.check()
        if self._stopped.is_set():
            raise LegLost("the other way is not wanted any more")

    def _run(self) -> None:
        try:
            while not (self._stopped.is_set() or self._near()):
                self._pass()
            self._failed = False
        except (LegLost, NotCovered, Cancelled):
            pass  # the request stays on its way
        finally:
            with self._lock:
                self._ended.set()
                abandoned = self._abandoned
            if abandoned:
                self.journey.free()

    def _near(self) -> bool:
        reached = self.journey.follow(self._front)
        return reached or self._front.length - self.journey.length <= NEAR_TOKENS

    def _pass(self) -> None:
        ahead, length = self.journey, self._front.length
        stop = min(length, ahead.stop() or length)
        chunk = self._request.next_tokens(ahead.length, stop, self._exact)
        self._walker.forward(ahead, chunk, (), self._errand)
