"""What a calibration text told about each expert; kept in the manifest. Pure.

Popularity is how often the text's tokens are routed to an expert; the market begins with it. The
errors are what storing it in few bits is expected to cost: the Kullback-Leibler divergence, in
nats per token, of the model's predictions from those of the exact model (see `importance`).
"""

from dataclasses import dataclass
from math import isfinite
from typing import Any, Final

from coeld.asked import EVEN, EVIDENCE, Popularity, levels_of

TEXT_CHARS_MAX: Final = 256
COUNT_MAX: Final = 1 << 40

Layers = tuple[tuple[float, ...], ...]
"""Per layer and expert."""


@dataclass(frozen=True, slots=True)
class Statistics:
    """Measured at import, on the device that imported."""

    text: str
    """The name of the text's file, for people."""
    tokens: int
    """Of it that were measured."""
    popularity: Layers
    """Part of the tokens that chose the expert; 1 in dense models."""
    errors: dict[int, Layers]
    """By width in bits. Never 0 throughout: see `importance`."""

    def levels(self) -> Popularity:
        """Popularity as the market takes it, of layers of which enough was seen to say anything
        and whose experts are not all used alike; empty if there are none."""
        seen = [sum(row) * self.tokens >= EVIDENCE * len(row) for row in self.popularity]
        found = zip(map(levels_of, self.popularity), seen, strict=True)
        rows = tuple(row if known and set(row) != {EVEN} else b"" for row, known in found)
        return rows if any(rows) else ()


def parse_statistics(value: dict[str, Any], layers: int, experts: int) -> Statistics:
    """Raises ValueError, KeyError, TypeError or AttributeError when it is malformed."""
    text, tokens = value["text"], value["tokens"]
    if type(text) is not str or len(text) > TEXT_CHARS_MAX:
        raise ValueError("the name of the calibration text is no short text")
    if type(tokens) is not int or not 0 < tokens < COUNT_MAX:
        raise ValueError(f"{tokens!r} calibration tokens")
    errors = {
        int(bits): _numbers(found, layers, experts) for bits, found in value["errors"].items()
    }
    if not errors or not all(0 < bits <= 32 for bits in errors):
        raise ValueError("statistics of unknown widths")
    return Statistics(text, tokens, _numbers(value["popularity"], layers, experts), errors)


def _numbers(value: Any, layers: int, experts: int) -> Layers:
    table = tuple(tuple(map(float, row)) for row in value)
    if len(table) != layers or any(len(row) != experts for row in table):
        raise ValueError("statistics of another number of experts")
    if not all(isfinite(number) and number >= 0 for row in table for number in row):
        raise ValueError("statistics that are no numbers")
    return table
