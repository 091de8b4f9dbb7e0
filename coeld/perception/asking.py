"""How much this device is asked for, smoothed, and when that is worth telling. Pure.

A rate is an exponentially weighted mean with a half-life of 15 minutes: one request, or a minute of
many, hardly shows, and what has gone on for half an hour does. It is told in powers of two, again
only when it has doubled or halved since: noise is no news, and a device that nobody asks any more
says so less than once per half-life, at times that follow from the rate alone.
"""

import math
from typing import Final

from coeld.asked import NOTHING, RATE_MAX, Asked, Popularity, Rates
from coeld.events import Used
from coeld.ids import ModelHash
from coeld.perception.popularity import Habit

HALF_LIFE_S: Final = 900.0
PER_HOUR: Final = 3600 * math.log(2) / HALF_LIFE_S
"""What one thing that happens now adds to a rate per hour."""
ALMOST: Final = 1 + 1e-9


class Asking:
    """Of one model: what was asked of another says nothing about it."""

    def __init__(self, model: ModelHash | None = None, prior: Popularity = ()) -> None:
        self.model = model
        self.told = NOTHING
        """What was told last."""
        self.due = float("inf")
        """When a rate will have halved since it was told, if nothing happens."""
        self._rates = [0.0] * len(Rates._fields)
        self._at = float("-inf")
        self._habit = Habit(prior)

    def count(self, used: Used, now: float) -> None:
        """The engine tells what it was asked for since it last did."""
        fresh = used.requests, used.prompt_tokens, used.tokens
        self._rates = [
            rate + count * PER_HOUR for rate, count in zip(self._decayed(now), fresh, strict=True)
        ]
        self._at = now
        self._habit.count(used.experts, now)

    def news(self, in_parts: bool, now: float) -> Asked | None:
        """What to tell now, None if nothing. `in_parts`: experts of a layer are placed one by one,
        so that it matters which are used."""
        rates = Rates(*map(_step, self.told.rates, self._decayed(now)))
        popularity = self._habit.told(in_parts, now)
        asked = Asked(rates, popularity)
        self.due = min(map(self._halved_at, rates, self._rates))
        if asked == self.told:
            return None
        self.told = asked
        return asked

    def _decayed(self, now: float) -> list[float]:
        if not any(self._rates):
            return self._rates
        left = 0.5 ** ((now - self._at) / HALF_LIFE_S)
        return [rate * left for rate in self._rates]

    def _halved_at(self, told: int, rate: float) -> float:
        if not told:
            return float("inf")
        return self._at + HALF_LIFE_S * math.log2(max(1.0, 2 * rate / told))


def _step(told: int, rate: float) -> int:
    """What to tell of a rate: what was told, unless it is twice or half as much."""
    if told and told / 2 * ALMOST < rate < told * 2:
        return told
    return min(RATE_MAX, 2 ** round(math.log2(rate))) if rate >= 1 else 0
