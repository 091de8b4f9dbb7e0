"""How often a token uses each expert, from what all devices tell of their own tokens. Pure.

A device counts as much as it is asked for. The same records give the same integers everywhere. Of
layers that nobody tells of, experts are taken to be used as by the text on which the model was
calibrated, or all alike.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Final

from coeld.asked import Popularity, Rates
from coeld.deployment.cost import PPM, ROW_SPEED
from coeld.messages import Record
from coeld.view import ModelDemand

STRANGER: Final = 4096
"""Tokens per hour, about one a second, that are expected of every device before it is asked: a few
requests change little, steady work does."""
WEIGHT_MAX: Final = 256
"""Nobody claims more of the swarm for itself."""

Told = tuple[tuple[int, Popularity], ...]


def weight(rates: Rates) -> int:
    """How much of the swarm's work a device asks for, relative to one that nobody asks (1).

    A prompt's row counts an eighth of a generated token: many share one reading of the weights.
    """
    tokens = rates.tokens + rates.prompt_tokens // ROW_SPEED
    return min(WEIGHT_MAX, 1 + tokens // STRANGER)


def observed(demand: ModelDemand, records: Iterable[Record]) -> ModelDemand:
    """The demand with the popularity that these devices tell of."""
    if demand.used >= demand.experts:
        return demand
    told = tuple(
        (weight(record.asked.rates), record.asked.popularity)
        for record in sorted(records, key=lambda r: r.origin)
        if record.asked.popularity
    )
    prior = (1, demand.prior)
    if not told and not any(demand.prior):
        return demand
    sizes = demand.layers, demand.experts, demand.used
    return replace(demand, popularity=_mean(*sizes, told, prior))


@lru_cache(maxsize=16)
def _mean(
    layers: int, experts: int, used: int, told: Told, prior: tuple[int, Popularity]
) -> tuple[tuple[int, ...], ...]:
    def rows(some: Told, layer: int) -> list[tuple[int, bytes]]:
        found = [(weight, levels[layer]) for weight, levels in some if layer < len(levels)]
        return [(weight, row) for weight, row in found if len(row) == experts]

    return tuple(
        _layer_mean(experts, used, rows(told, layer) or rows((prior,), layer))
        for layer in range(layers)
    )


def _layer_mean(experts: int, used: int, rows: Sequence[tuple[int, bytes]]) -> tuple[int, ...]:
    known = [(w, _probabilities(row, used)) for w, row in rows]
    total = sum(w for w, _ in known)
    if not total:
        return (used * PPM // experts,) * experts
    return tuple(sum(w * row[e] for w, row in known) // total for e in range(experts))


def _probabilities(levels: bytes, used: int) -> list[int]:
    """Millionths, in proportion to 2^level, none above 1 and `used` in all, but for rounding."""
    found = [0] * len(levels)
    left, open_ = used * PPM, set(range(len(levels)))
    while open_:
        parts = sum(1 << levels[e] for e in open_)
        full = {e for e in open_ if left * (1 << levels[e]) >= PPM * parts}
        for e in full or open_:
            found[e] = PPM if full else left * (1 << levels[e]) // parts
        if not full:
            break
        open_ -= full
        left -= len(full) * PPM
    return found
