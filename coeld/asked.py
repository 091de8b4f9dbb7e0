"""What a device is asked for, as it travels in its record: how much, and which experts. Pure.

Told in coarse steps, so that noise is no news (coeld.perception.asking): rates per hour in powers
of two, and of every expert how much more or less often than evenly it is used, as one of eight
levels a factor of two apart. Two levels make a character, so 48 layers of 128 experts take 3 KB; a
layer of which nothing is known takes one character.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from coeld.errors import FrameError
from coeld.routes import EXPERTS_PER_LAYER_MAX, LAYERS_MAX

RATE_MAX: Final = 2**40
"""Per hour: more than any device answers."""
LEVELS: Final = 8
EVEN: Final = 4
"""The level of an expert that is used as often as the mean; each step is a factor of two."""
POPULARITY_CHARS_MAX: Final = 16_384
"""Of all layers: 256 layers of 128 experts."""

_DIGITS: Final = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-_"
_UNKNOWN: Final = "."
_TEXT: Final = re.compile(rf"[0-9A-Za-z_.\-]{{1,{POPULARITY_CHARS_MAX}}}\Z")

Popularity = tuple[bytes, ...]
"""Per layer the level of each of its experts; b"": nothing is known. Empty: nothing at all."""


EVIDENCE: Final = 16
"""Uses per expert of a layer before anything is said about it: a mean expert's is then known to a
quarter."""


def levels_of(counts: Sequence[float]) -> bytes:
    """The nearest level of each. Products of two numbers only, so the same on every machine."""
    mean = sum(counts) / len(counts)
    steps = [mean * mean * 4.0 ** (level - EVEN) for level in range(1, LEVELS)]
    return bytes(sum(2 * count * count >= step for step in steps) for count in counts)


class Rates(NamedTuple):
    """Per hour, of the open model, by those who ask this device itself."""

    requests: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    """Generated."""


IDLE: Final = Rates()


@dataclass(frozen=True, slots=True)
class Asked:
    """Nothing, unless told."""

    rates: Rates = IDLE
    popularity: Popularity = ()


NOTHING: Final = Asked()


def asked_to_json(asked: Asked) -> dict[str, Any]:
    """Popularity as [experts, text]; all known layers have as many experts."""
    value: dict[str, Any] = {"rates": asked.rates}
    if any(asked.popularity):
        experts = max(map(len, asked.popularity))
        value["uses"] = [experts, "".join(map(_row_to_text, asked.popularity))]
    return value


def asked_from_json(value: Any) -> Asked:
    """The inverse of `asked_to_json`. Raises FrameError when it is malformed."""
    if not isinstance(value, dict):
        raise FrameError("what a device is asked for is not a JSON object: message ignored")
    rates = value.get("rates")
    if (
        not isinstance(rates, list)
        or len(rates) != len(Rates._fields)
        or not all(type(rate) is int and 0 <= rate <= RATE_MAX for rate in rates)
    ):
        raise FrameError("what a device is asked for is not three rates: message ignored")
    uses = value.get("uses")
    return Asked(Rates(*rates), () if uses is None else _popularity(uses))


def _row_to_text(row: bytes) -> str:
    pairs = zip(row[::2], row[1::2] + b"\0", strict=False)
    return "".join(_DIGITS[low + LEVELS * high] for low, high in pairs) or _UNKNOWN


def _popularity(value: Any) -> Popularity:
    if not isinstance(value, list) or len(value) != 2:
        raise FrameError("how often experts are used is not [experts, text]: message ignored")
    experts, text = value
    if type(experts) is not int or not 1 <= experts <= EXPERTS_PER_LAYER_MAX:
        raise FrameError("a number of experts out of bounds: message ignored")
    if not isinstance(text, str) or not _TEXT.match(text):
        raise FrameError("how often experts are used has other characters: message ignored")
    rows = tuple(_rows(text, experts))
    if len(rows) > LAYERS_MAX or not any(rows):
        raise FrameError("uses of no layer, or of too many: message ignored")
    return rows


def _rows(text: str, experts: int) -> Iterator[bytes]:
    at, width = 0, -(-experts // 2)
    while at < len(text):
        if text[at] == _UNKNOWN:
            at += 1
            yield b""
            continue
        part = text[at : at + width]
        if len(part) < width or _UNKNOWN in part:
            raise FrameError("a layer's uses are cut short: message ignored")
        pairs = map(_DIGITS.index, part)
        yield bytes(level for pair in pairs for level in divmod(pair, LEVELS)[::-1])[:experts]
        at += width
