"""From logits to a token: greedy, or temperature, top-k, top-p. Pure given its generator.

Order as in Hugging Face's transformers: temperature, then top-k, then top-p on what is left.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

SEED_MASK: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is chosen."""

    temperature: float = 0.0
    """0 is greedy: the likeliest token, the lowest id among equals."""
    top_p: float = 1.0
    """Smallest set of likeliest tokens whose probability reaches this; 1 keeps all."""
    top_k: int = 0
    """Only this many likeliest tokens; 0 keeps all."""
    seed: int | None = None
    """Same seed, same draws, of any integer its lowest 64 bits; None draws a new one."""

    def generator(self) -> np.random.Generator:
        # numpy takes no negative ones
        return np.random.default_rng(None if self.seed is None else self.seed & SEED_MASK)


def choose(logits: NDArray[np.float32], sampling: Sampling, generator: np.random.Generator) -> int:
    """The next token for logits (V,)."""
    if sampling.temperature <= 0:
        return int(logits.argmax())
    below = logits.astype(np.float64) - float(logits.max())  # first, for tiny temperatures
    order = np.argsort(-below, kind="stable")
    if sampling.top_k > 0:
        order = order[: sampling.top_k]
    with np.errstate(over="ignore"):  # to minus infinity: never drawn
        weights = np.exp(below[order] / sampling.temperature)
    weights /= weights.sum()
    if sampling.top_p < 1:
        kept = int(np.searchsorted(np.cumsum(weights), sampling.top_p)) + 1
        order, weights = order[:kept], weights[:kept] / weights[:kept].sum()
    return int(generator.choice(order, p=weights))
