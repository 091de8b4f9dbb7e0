"""What the parts of a decoded token cost, learned from the tokens that are decoded.

What is timed is a sum of parts: a graph may hold two fused layers and the attention of a third, a
call runs some lots. `Costs` counts how often each such *work* was done with one row, and how long
that took in all; `fitted` finds the costs of the parts that explain the means best. A few sweeps
of expectation maximisation (Richardson 1972; Lucy 1974) bring what was expected of the parts near,
each multiplied by the mean ratio of measured to explained time over its works; then least squares
make the smallest change that is left to make. So parts that only ever occur together keep the
proportion that was expected of them, and none becomes negative.

Once the first tokens have been heard, of the following one in four is listened to: what is noted
between the kernels, when they have emptied the caches, takes ten times what it seems to. Old tokens
count less and less, by halves. Any thread may note.
"""

import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final, Literal, NamedTuple

import numpy as np

from coeld.datapath.plan import Span
from coeld.ids import NodeId

Kind = Literal["attention", "layer", "head", "lot", "call", "reach", "cut", "token"]
"""Of one layer attention and router, or all of it in one graph; the head; one lot; the call that
runs some; a round trip with packing and wake-ups; what a cut takes besides; a token besides."""


class Part(NamedTuple):
    """Something whose cost is learned."""

    kind: Kind
    node: NodeId | None = None
    """Where it is done, or what is reached; None: this device."""


Work = tuple[tuple[Part, int], ...]
"""What was timed together: parts and how many of each."""
EVERY_UNTIL: Final = 64
"""Tokens on the present routes that are all listened to."""
THEN_ONE_IN: Final = 4
FORGET_TOKENS: Final = 512
"""Tokens after which everything noted so far counts half."""
KEPT: Final = 16
"""What was noted on other routes counts as so many times at most."""
SWEEPS: Final = 8
RESOLUTION: Final = 1e-3
"""Of the singular values: what the works tell apart worse than this stays in proportion."""
LEAST: Final = 0.1
"""Of a part's cost, that least squares leave."""
ANSWER: Final[Work] = ()
"""The work that a whole token is: timed, not explained."""
EXPECTED: Final[Mapping[Kind, float]] = {
    "attention": 1e-4,
    "layer": 3e-4,
    "head": 1e-3,
    "lot": 5e-5,
    "call": 7e-5,
    "reach": 3e-4,
    "cut": 1.5e-4,
    "token": 3e-4,
}
"""Seconds, before anything is known: only their proportions matter, and only between parts that
never occur apart."""


@lru_cache(maxsize=1024)
def graph_work(span: Span) -> Work:
    """What one run of a graph does."""
    fused = len(span.fused())
    found = [(Part("layer"), fused)] if fused else []
    if span.end != "experts":
        found.append((Part("attention" if span.end == "cut" else "head"), 1))
    return tuple(found)


@lru_cache(maxsize=4096)
def lots_work(lots: int, node: NodeId | None = None) -> Work:
    """What an owner computes of a call."""
    return (Part("call", node), 1), (Part("lot", node), lots)


@lru_cache(maxsize=1024)
def reach_work(node: NodeId) -> Work:
    """A call or a span there, besides what is computed."""
    return ((Part("reach", node), 1),)


def layers_work(layers: int, node: NodeId) -> Work:
    """What a peer computes of a span."""
    return ((Part("layer", node), layers),)


def rest_work(cuts: int) -> Work:
    """A token, besides graphs, calls and waiting."""
    return ((Part("token"), 1), (Part("cut"), cuts)) if cuts else ((Part("token"), 1),)


class Costs:
    """What was noted, and what follows from it."""

    def __init__(self) -> None:
        self._seen: dict[Work, tuple[float, float]] = {}
        """How often, and seconds in all."""
        self._lock = threading.Lock()
        self.paused = False
        """Nothing is learned, because something else is in the way: lots are loaded."""
        self.routes = 0
        """How often they have changed: who set out before says nothing of whole tokens."""
        self.listening = True
        """Whether what the present token does is to be noted."""
        self._tokens = 0
        """On the present routes."""

    def begin_token(self) -> None:
        """A token begins."""
        self._tokens += 1
        self.listening = self._tokens <= EVERY_UNTIL or self._tokens % THEN_ONE_IN == 0

    def note(self, work: Work, took_s: float) -> None:
        """Something was done once, with one row."""
        if self.paused:
            return
        with self._lock:
            count, total_s = self._seen.get(work, (0.0, 0.0))
            self._seen[work] = count + 1, total_s + took_s
            if work == ANSWER and count >= FORGET_TOKENS:
                self._seen = {w: (n / 2, s / 2) for w, (n, s) in self._seen.items() if n >= 1}

    def rerouted(self) -> None:
        """Tokens go other ways from now on: how long whole ones took says nothing any more, and
        how long parts did soon counts for little."""
        with self._lock:
            self.routes += 1
            self._tokens = 0
            self._seen.pop(ANSWER, None)
            for work, (count, total_s) in self._seen.items():
                kept = min(1.0, KEPT / count)
                self._seen[work] = count * kept, total_s * kept

    @property
    def token_s(self) -> float:
        """What a whole token took on average; 0: none was decoded alone on the present routes."""
        count, total_s = self._seen.get(ANSWER, (0.0, 0.0))
        return total_s / count if count else 0.0

    def fitted(self) -> dict[Part, float]:
        """Seconds of each part that occurred."""
        with self._lock:
            seen = [(work, *totals) for work, totals in self._seen.items() if work]
        costs = {part: EXPECTED[part.kind] for work, _, _ in seen for part, _ in work}
        for _ in range(SWEEPS):
            costs = _scaled(costs, seen)
        return _adjusted(costs, seen) if seen else {}


Seen = Sequence[tuple[Work, float, float]]
"""Works, how often each was done, seconds in all."""


def _scaled(costs: Mapping[Part, float], seen: Seen) -> dict[Part, float]:
    """Each part times the mean ratio of measured to explained time of the works that it is in."""
    share, explained = dict.fromkeys(costs, 0.0), dict.fromkeys(costs, 0.0)
    for work, count, total_s in seen:
        ratio = total_s / count / sum(costs[part] * times for part, times in work)
        for part, times in work:
            share[part] += count * times
            explained[part] += count * times * ratio
    return {part: cost * explained[part] / share[part] for part, cost in costs.items()}


def _adjusted(costs: Mapping[Part, float], seen: Seen) -> dict[Part, float]:
    """The smallest relative change of the costs that explains the works best, in relative terms."""
    parts = list(costs)
    wanted = np.zeros(len(seen))
    columns = np.zeros((len(seen), len(parts)))
    for row, (work, count, total_s) in enumerate(seen):
        weight = count**0.5 * count / total_s if total_s > 0 else 0.0
        for part, times in work:
            columns[row, parts.index(part)] = weight * times * costs[part]
        wanted[row] = count**0.5 - columns[row].sum()
    change, *_ = np.linalg.lstsq(columns, wanted, RESOLUTION)
    factors = np.maximum(1 + change, LEAST)
    return {part: float(costs[part] * factor) for part, factor in zip(parts, factors, strict=True)}


def costs_to_json(costs: Mapping[Part, float]) -> list[list[Any]]:
    """Rows [kind, node or "", microseconds]."""
    return [[part.kind, part.node or "", round(s * 1e6, 2)] for part, s in costs.items()]
