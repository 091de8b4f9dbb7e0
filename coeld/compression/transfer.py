"""Which codec the rows of one transfer get: as fast as the link allows, no worse than agreed. Pure.

A request may cost its answer a divergence of `kl` nats per token (mean KL against the exact
output; 0 = exact mode). Errors of different transfers are independent, so their divergences add up:
KL = Σ c e², with c the sensitivity of the place and e the codec's relative error there. Equal parts
for all transfers of a token, e = sqrt(kl / (transfers · c)), are also what minimises the bits
(every bit halves e, so the derivative of KL by bits, 2 ln 2 · c e², must be the same everywhere).

The sender knows the e of what it has encoded. It takes the codec that should be fastest, and the
next finer one if the rows turn out worse than expected: the budget is kept by computing.

Prefill and decode differ only in their number of rows: one row of a decoding step is carried by the
round trip, where fewer bytes gain nothing; then the finest codec is taken.

After a call whose rows went as steps both ends keep them, and the answer, as they arrived, where
the link is so slow that bits pay for arithmetic: the next call's rows are sent as differences to
what these tell (`prediction.py`). Any other call leaves nothing.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import log2, sqrt
from typing import Final

import numpy as np

from coeld.compression.fusion import Fused, fuse
from coeld.compression.prediction import Forecast, Past, forecast
from coeld.compression.rotation import Rows
from coeld.compression.wire import (
    EXACT,
    STEPS,
    Codec,
    Encoded,
    decode,
    encode,
    loudness,
    payload_bytes,
)

Coded = tuple[Codec, Encoded]
"""Rows ready to be sent."""

SENSITIVITY: Final = (0.22, 0.12)
SENSITIVITY_FIRST: Final = (0.5, 1.2)
SENSITIVITY_LAST: Final = (2.6, 2.5)
"""c of a layer's transfers, rows out and results back, and those of the first and the last layer:
measured on SmolLM2 (docs/benchmarks.md). Rows on their way out have been divided by their length;
what enters the first layers reaches everything, what leaves the last one only the logits."""
SENSITIVITY_HOP: Final = 2.6
"""c of the residual stream between layers: measured there too; 1.0 to 2.6, 4.6 after the last."""
GAIN_MIN: Final = 0.1
"""A coarser codec must save this share of the time, or the finer one is used."""

TYPICAL_ERROR: Final = {
    Codec.FLOAT32: 0.0,
    Codec.FLOAT16: 2.07e-4,
    Codec.BFLOAT16: 1.66e-3,
    Codec.INT8_HADAMARD: 0.008,
    Codec.INT8_GROUP: 0.011,
    Codec.INT8_ROW: 0.025,
}
"""e on rows of SmolLM2; from fine to coarse. STEPS errs as it is told."""

NS_PER_VALUE: Final = {
    Codec.FLOAT32: 0.2,
    Codec.FLOAT16: 5.6,
    Codec.BFLOAT16: 1.6,
    Codec.INT8_HADAMARD: 14.0,
    Codec.INT8_GROUP: 3.5,
    Codec.INT8_ROW: 2.8,
    Codec.STEPS_ZLIB: 16.0,
    Codec.STEPS_ZSTD: 5.5,
}
"""Encoding and decoding together, on the machine of docs/benchmarks.md."""


AHEAD_NS_PER_VALUE: Final = 28.0
"""What STEPS_AHEAD takes more than STEPS_ZLIB, for both ends' keeping of the past too."""
AHEAD_BITS: Final = 1.5
"""What it saves per value where the past tells something."""


@dataclass(frozen=True, slots=True)
class LinkSpeed:
    """A measured link."""

    rtt_s: float
    bytes_per_s: float


def sensitivity(layer: int, layers: int) -> tuple[float, float]:
    """c of the transfers of one of a model's layers: rows out, results back."""
    if layer == layers - 1:
        return SENSITIVITY_LAST
    return SENSITIVITY_FIRST if layer == 0 else SENSITIVITY


def error_allowed(kl: float, transfers: int, sensitivity: float) -> float:
    """The e of one of `transfers` transfers that each token makes, within `kl` in all."""
    return sqrt(kl / (transfers * sensitivity)) if kl > 0 else 0.0


def bits_expected(codec: Codec, rows: int, hidden: int, error: float) -> float:
    """Bits per value; for STEPS the entropy of a Gaussian in such steps, an upper bound."""
    if codec in STEPS:
        return max(0.5, log2(1 / (error * sqrt(12))) + 2.05) + 32 / hidden
    return 8 * payload_bytes(codec, rows, hidden)[1] / (rows * hidden)


def seconds_expected(codec: Codec, link: LinkSpeed, rows: int, hidden: int, error: float) -> float:
    """One way, with half a round trip, encoding and decoding."""
    values = rows * hidden
    sent_s = values * bits_expected(codec, rows, hidden, error) / 8 / link.bytes_per_s
    return link.rtt_s / 2 + sent_s + values * NS_PER_VALUE[codec] * 1e-9


def ranked(
    both_have: Collection[Codec], link: LinkSpeed, rows: int, hidden: int, error: float
) -> list[Codec]:
    """The codecs to try, best first; the last one is always within `error`."""
    if error <= 0:
        fine = [codec for codec in EXACT if codec in both_have]
    else:
        fine = [codec for codec in both_have if codec in STEPS or TYPICAL_ERROR[codec] <= error]
    times_s = {codec: seconds_expected(codec, link, rows, hidden, error) for codec in fine}
    quickest_s = min(times_s.values())
    # Who is about as quick as the quickest competes by fineness, not by time.
    near = [codec for codec in fine if times_s[codec] * (1 - GAIN_MIN) <= quickest_s]
    first = min(near, key=lambda codec: TYPICAL_ERROR.get(codec, error))
    finer = [c for c in TYPICAL_ERROR if TYPICAL_ERROR[c] < TYPICAL_ERROR.get(first, error)]
    rest = sorted((codec for codec in finer if codec in fine), key=lambda codec: times_s[codec])
    return [first, *rest]


def encode_within(
    codecs: Sequence[Codec], x: Rows, error: float, told: Forecast | None = None
) -> Coded:
    """Encode rows (n, H) with the first of `ranked` codecs whose error is allowed.

    In exact mode (`error` 0) half precision counts as exact unless a value is beyond its range.
    """
    limit = max(error, TYPICAL_ERROR[Codec.FLOAT16])
    for codec in codecs:
        encoded = encode(codec, x, error * STEPS_MARGIN, told)
        if encoded.error <= limit:
            return codec, encoded
    return Codec.FLOAT32, encode(Codec.FLOAT32, x)


WIRED: Final = tuple(c for c in Codec if c not in (Codec.STEPS_ZSTD, Codec.STEPS_AHEAD))
"""What every device can read at any time; zstd is an extra."""


def encode_for(
    link: LinkSpeed | None, x: Rows, error: float, past: Past | None = None
) -> Coded | None:
    """Rows (n, H) as they should cross the link when they may err by `error`; None: as they are,
    also while the link is unknown: nothing is lost before it has proved slow."""
    if error <= 0 or link is None:
        return None
    codecs = ranked(WIRED, link, x.shape[0], x.shape[1], error)
    told = None
    if past is not None and codecs[0] in STEPS:
        told = forecast(past, x, loudness(x))
    if told is not None:
        codecs.insert(0, Codec.STEPS_AHEAD)
    codec, encoded = encode_within(codecs, x, error, told)
    return None if codec is Codec.FLOAT32 else (codec, encoded)


def leaves_past(link: LinkSpeed | None, coded: Coded | None) -> bool:
    """Whether both ends should keep these rows and their answer for the next call: they are steps,
    and on this link bits are so slow that it is quicker to predict them."""
    if link is None or coded is None or coded[0] not in STEPS:
        return False
    return AHEAD_BITS / 8 / link.bytes_per_s > AHEAD_NS_PER_VALUE * 1e-9


def received(x: Rows, coded: Coded | None, past: Past | None = None) -> Rows:
    """Rows x (n, H) as the other end gets them; a new array."""
    if coded is None:
        return x.copy()
    out = np.empty(x.shape, np.float32)
    decode(coded[0], b"".join(coded[1].pieces), out, past)
    return out


STEPS_MARGIN: Final = 0.97
"""Rounding errs a little more than s / sqrt(12) where few steps are used."""


FUSION_REACH: Final = (1.0, 2.0, 4.0, 8.0)
"""How much further than the error allowed a row may be from its leader: few rows have one, so the
mean over all of them is far smaller."""
FUSION_SHARE: Final = 0.5
"""Of the squared error of the rows sent: the most that fusion may use; the codec gets the rest."""


def fuse_within(x: Rows, error: float, error_back: float) -> tuple[Fused, float]:
    """Fusion of rows x (n, H) that makes both transfers smallest, and the error left for the codec.

    `error` is allowed on the way out, `error_back` for the results. Fusing makes fewer rows, in
    both directions, but takes from what the codec may err: it is used only as far as that pays.
    """
    hidden = x.shape[1]
    best, left = fuse(x, 0.0), error
    codec = Codec.STEPS_ZLIB
    back = bits_expected(codec, 1, hidden, error_back)
    size = len(best.leaders) * (bits_expected(codec, 1, hidden, left) + back)
    for reach in FUSION_REACH:
        fused = fuse(x, error * reach)
        if fused.error**2 > FUSION_SHARE * error**2:
            break
        rest = sqrt(error**2 - fused.error**2)
        now = len(fused.leaders) * (bits_expected(codec, 1, hidden, rest) + back)
        if now < size:
            best, left, size = fused, rest, now
    return best, left
