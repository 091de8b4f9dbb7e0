"""Running a leg here: the steps of consecutive layers, graph by graph and cut by cut.

For this device's own requests (coeld.datapath.decoder) and for those of a guest, another device
some of whose layers run here. A guest's keys and values belong to its connection: only that
connection's thread touches them, nothing is locked, and they go when it closes. The caller says
how many tokens it believes to be cached; if there are fewer the call is refused as CacheLost, and
the caller rebuilds them. So neither side computes on a cache that is not the request's. If there
are more, the caller goes back: what follows is another pass in place of one that failed elsewhere.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from coeld.datapath.costs import graph_work
from coeld.datapath.dispatch import Dispatcher
from coeld.datapath.frames import SpanCall
from coeld.datapath.plan import Cut, Span
from coeld.datapath.ports import Cache, Gates, Lane, Rows, Waiter
from coeld.datapath.quality import Quality
from coeld.datapath.split import Split
from coeld.datapath.uses import Uses
from coeld.errors import CacheLost, NotCovered, PeerRefused

CACHES_PER_CALLER_MAX: Final = 64
"""Legs of requests that one connection may have caches for."""
GUEST_PATIENCE_S: Final = 0.5
"""That a guest's call waits for experts: its caller gives up after its deadline, takes this device
for lost, and can look for another way itself."""


def run_leg(
    lane: Lane,
    dispatcher: Dispatcher,
    cache: Cache,
    x: Rows,
    first: int,
    stop: int,
    rows: Sequence[int],
    waiter: Waiter,
    uses: Uses | None = None,
) -> Rows:
    """Layers first..stop-1 on x (n, H), which follows what the cache holds: the residual stream
    (n, H), or, if `rows` are named, the logits (len(rows), V) of these. The cache's length stays.

    Raises PeerRefused when this device's graphs do not begin and end there, NotCovered, and what
    the waiter raises. `uses` counts the experts that are chosen at cuts.
    """
    with lane.part(cache, x, first, stop, rows) as part:
        out: Rows | None = None
        gates: Gates | None = None
        for step in part.steps:
            match step:
                case Span():
                    started_s = time.monotonic()
                    out, gates = part.run(step)
                    took_s = time.monotonic() - started_s
                    waiter.split.trunk_s += took_s
                    if len(x) == 1 and dispatcher.costs.listening:
                        dispatcher.costs.note(graph_work(step), took_s)
                case Cut(layer):
                    assert out is not None
                    if uses is not None and gates is not None:
                        uses.count(layer, gates)
                    part.add(dispatcher.run(layer, out, gates, waiter))
        return part.out()


class Ledger:
    """Bytes of all guests' caches together, and their limit. Any thread."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.bytes = 0
        self._lock = threading.Lock()

    def change(self, before: int, after: int) -> bool:
        """Replace `before` bytes by `after`; False, and nothing is changed, if that is too much."""
        with self._lock:
            total = self.bytes - before + after
            if total > self.bytes_max and after > before:
                return False
            self.bytes = total
            return True


@dataclass(slots=True)
class Patient:
    """A guest's call: it waits for experts for GUEST_PATIENCE_S in all."""

    stalls_s: list[float] = field(default_factory=list)
    split: Split = field(default_factory=Split)
    quality: Quality = field(default_factory=Quality)
    """Exact: what its own request may lose, it does not say."""
    _until_s: float | None = None

    def check(self) -> None:
        """Raises PeerRefused. That the caller has gone its connection will tell when the answer is
        written."""
        now_s = time.monotonic()
        if self._until_s is None:
            self._until_s = now_s + GUEST_PATIENCE_S
        elif now_s >= self._until_s:
            raise PeerRefused("experts of these layers cannot be reached from here")


class Guest:
    """What this device runs for one caller. One thread, that of the caller's connection."""

    def __init__(
        self,
        lane: Lane,
        dispatcher: Dispatcher,
        layers: int,
        context_tokens: int,
        new_cache: Callable[[range], Cache],
        ledger: Ledger,
    ) -> None:
        self._lane, self._dispatcher = lane, dispatcher
        self._layers, self._context_tokens = layers, context_tokens
        self._new_cache, self._ledger = new_cache, ledger
        self._caches: dict[tuple[int, int, int], Cache] = {}
        """By the caller's number of the request, first layer, and the one after the last."""

    def span(self, asked: SpanCall, x: Rows) -> Rows:
        """The residual stream (asked.keep, H) after the asked layers. Raises PeerRefused."""
        if not asked.first < asked.stop <= self._layers:
            raise PeerRefused(f"layers {asked.first} to {asked.stop} of a model of {self._layers}")
        if asked.position + len(x) > self._context_tokens:
            raise PeerRefused(f"the context here is {self._context_tokens} tokens")
        key = asked.number, asked.first, asked.stop
        if asked.position == 0:
            self._drop(key)
            self._begin(key)
        cache = self._caches.get(key)
        if cache is None or cache.length < asked.position:
            held = "none" if cache is None else cache.length
            raise CacheLost(f"of request {asked.number} {asked.position} tokens, {held} are cached")
        cache.length = asked.position
        tokens = cache.length + len(x)
        if not self._ledger.change(cache.bytes, cache.bytes_for(tokens)):
            raise PeerRefused("no memory is left for the caches of guests")
        cache.reserve(tokens)
        try:
            out = run_leg(
                self._lane, self._dispatcher, cache, x, asked.first, asked.stop, (), Patient()
            )
        except NotCovered as exc:
            raise PeerRefused(str(exc)) from exc
        cache.length = tokens
        return out[-asked.keep :]

    def free(self, number: int) -> None:
        """The caller's request is over, or goes another way."""
        for key in [key for key in self._caches if key[0] == number]:
            self._drop(key)
        if not self._caches:
            self._lane.trim()

    def borders(self) -> set[int]:
        """Where the legs begin and end that there are caches for. Any thread."""
        keys = list(self._caches)
        return {border for _number, first, stop in keys for border in (first, stop)}

    def close(self) -> None:
        for key in list(self._caches):
            self._drop(key)

    def _begin(self, key: tuple[int, int, int]) -> None:
        _number, first, stop = key
        if len(self._caches) >= CACHES_PER_CALLER_MAX:
            raise PeerRefused(f"{CACHES_PER_CALLER_MAX} caches are in use already")
        if not self._lane.can_run(first, stop, head=False):
            raise PeerRefused(f"layers {first} to {stop} are no span of this device (any more)")
        self._caches[key] = self._new_cache(range(first, stop))

    def _drop(self, key: tuple[int, int, int]) -> None:
        cache = self._caches.pop(key, None)
        if cache is not None:
            self._ledger.change(cache.bytes, 0)
            cache.free()
