"""How rows of activations become bytes and rows again. Pure; numpy only.

| codec | payload for rows (n, H) | bits per value, H = 1024 |
|---|---|---|
| FLOAT32 | float32 (n, H) | 32 |
| FLOAT16 | float16 (n, H); what is beyond its range becomes its largest | 16 |
| BFLOAT16 | upper halves of float32 (n, H), rounded to nearest even | 16 |
| INT8_ROW | float32 scales (n), int8 (n, H) | 8.03 |
| INT8_GROUP | float32 scales (n, ceil(H / 64)), int8 (n, H) | 8.5 |
| INT8_HADAMARD | as INT8_ROW, of the rotated rows | 8.03 |
| STEPS_ZLIB | float32 steps (n); uint32 size; coded int8 (n, H); float32 exceptions | 3 to 8 |
| STEPS_ZSTD | the same, coded by zstd; only where both sides have it | 3 to 8 |
| STEPS_AHEAD | bfloat16 gains (2, H), weights (n, 2); then as STEPS_ZLIB | 2 to 6 |

All little-endian. INT8: a scale is max|v| / 127. STEPS takes the error that may be made instead of
a number of bits: every row is rounded to multiples of a step of its own, the steps are coded with
Huffman's code (zlib's or zstd's: same size, zstd is six times as fast), and the few values beyond
127 steps follow exactly. It is the smallest codec at every error (an entropy-coded uniform
quantiser is within 0.25 bits of the bound, Gish and Pierce 1968) and the slowest. STEPS_AHEAD takes
steps of the difference to a prediction that both ends can make (`prediction.py`).

The error of a codec is e: the root mean square, over rows, of |row - decoded| / |row|. The
divergence of the model's output follows it as KL ≈ c e² (`transfer.py`).

A payload is bytes from outside: its size is compared with what its header promises before anything
is allocated, and NaN, Inf and sizes that do not fit are FrameErrors. Nothing here keeps state; who
uses STEPS_AHEAD hands in the past.
"""

import zlib
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coeld.compression.bfloat16 import Halves, to_bfloat16, to_float32
from coeld.compression.prediction import Forecast, Past, predict
from coeld.compression.rotation import Rows, rotate, rotate_back
from coeld.errors import FrameError

zstandard: Any
try:
    import zstandard
except ModuleNotFoundError:  # the extra `zstd` is not installed
    zstandard = None

GROUP: Final = 64
LEVELS: Final = 127
ESCAPE: Final = -128
"""In coded steps: the value is among the exceptions."""
CODER_BYTES: Final = 64
"""What zlib and zstd may add to a few bytes."""
SCALE_MAX: Final = float(np.finfo(np.float32).max) / 256
"""So that 127 scales are finite, also after rotating."""
FLOAT16_ERROR: Final = 2.07e-4
BFLOAT16_ERROR: Final = 1.66e-3
"""Half a unit in the last place, uniform, over a mantissa that is uniform in its logarithm:
2^-10 (2^-7) * sqrt(1 / (24 ln 2) * 3 / 4)."""
LOUD_MAX: Final = 2.0
ERROR_MIN, ERROR_MAX = 1e-4, 1.0
"""Of STEPS: below, FLOAT16 is better; above, nothing of the row would be left."""


class Codec(IntEnum):
    """Append only: the number is on the wire."""

    FLOAT32 = 1
    FLOAT16 = 2
    BFLOAT16 = 3
    INT8_ROW = 4
    INT8_GROUP = 5
    INT8_HADAMARD = 6
    STEPS_ZLIB = 7
    STEPS_ZSTD = 8
    STEPS_AHEAD = 9


STEPS: Final = (Codec.STEPS_ZLIB, Codec.STEPS_ZSTD, Codec.STEPS_AHEAD)
CHECKED: Final = (Codec.FLOAT32, Codec.FLOAT16, Codec.BFLOAT16, Codec.STEPS_AHEAD)
"""Their bytes can be NaN, or Inf: looked for in the rows."""
EXACT: Final = (Codec.FLOAT32, Codec.FLOAT16)
"""What exact mode may use: at least 16 bits, error at most that of half precision."""


def available() -> tuple[Codec, ...]:
    """The codecs that this device can read and write."""
    return tuple(codec for codec in Codec if zstandard or codec is not Codec.STEPS_ZSTD)


@dataclass(frozen=True, slots=True)
class Encoded:
    """Rows ready to be sent."""

    pieces: tuple[memoryview, ...]
    """For scatter/gather sending; views of the rows themselves where nothing was changed."""
    error: float
    """e as defined above: computed, not assumed, except for the constants of half precision."""

    @property
    def size(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)


def payload_bytes(codec: Codec, rows: int, hidden: int) -> tuple[int, int]:
    """Least and largest size of a payload; equal where the size is fixed."""
    values = rows * hidden
    match codec:
        case Codec.FLOAT32:
            size = 4 * values
        case Codec.FLOAT16 | Codec.BFLOAT16:
            size = 2 * values
        case Codec.INT8_ROW | Codec.INT8_HADAMARD:
            size = 4 * rows + values
        case Codec.INT8_GROUP:
            size = 4 * rows * -(-hidden // GROUP) + values
        case Codec.STEPS_ZLIB | Codec.STEPS_ZSTD:
            return 4 * rows + 4, 4 * rows + 4 + 4 * values + CODER_BYTES
        case Codec.STEPS_AHEAD:
            least, most = payload_bytes(Codec.STEPS_ZLIB, rows, hidden)
            ahead = 4 * (hidden + rows)
            return ahead + least, ahead + most
    return size, size


def encode(codec: Codec, x: Rows, error: float = 0.0, forecast: Forecast | None = None) -> Encoded:
    """Rows (n, H), finite, to bytes; `error` is the e that STEPS aims at. `x` is not changed.

    STEPS_AHEAD needs a forecast of x, the others ignore it.
    """
    x = np.ascontiguousarray(x, "<f4")
    match codec:
        case Codec.FLOAT32:
            return Encoded((_bytes(x),), 0.0)
        case Codec.FLOAT16:
            return _encode_float16(x)
        case Codec.BFLOAT16:
            return Encoded((_bytes(to_bfloat16(x)),), BFLOAT16_ERROR)
        case Codec.INT8_ROW:
            return _encode_int8(x, x.shape[1])
        case Codec.INT8_GROUP:
            return _encode_int8(x, GROUP)
        case Codec.INT8_HADAMARD:
            return _encode_int8(rotate(x), x.shape[1])
        case Codec.STEPS_ZLIB | Codec.STEPS_ZSTD:
            return _encode_steps(codec, x, _steps(x, error), _squares(x))
        case Codec.STEPS_AHEAD:
            assert forecast is not None
            coded = _encode_steps(codec, x - forecast.rows, _steps(x, error), _squares(x))
            ahead = _bytes(forecast.gains), _bytes(forecast.weights)
            return Encoded((*ahead, *coded.pieces), coded.error)


def decode(codec: Codec, payload: memoryview | bytes, out: Rows, past: Past | None = None) -> None:
    """Fill `out` (n, H), float32 and contiguous. Raises FrameError; `out` is rubbish then.

    STEPS_AHEAD needs the past that was used to encode, the others ignore it.
    """
    assert out.flags.c_contiguous
    assert out.dtype == np.float32
    rows, hidden = out.shape
    data = memoryview(payload).cast("B")
    least, most = payload_bytes(codec, rows, hidden)
    if not least <= len(data) <= most:
        raise FrameError(f"{codec.name}: {len(data)} bytes for {rows} rows of {hidden}")
    match codec:
        case Codec.FLOAT32:
            out[:] = np.frombuffer(data, "<f4").reshape(out.shape)
        case Codec.FLOAT16:
            out[:] = np.frombuffer(data, "<f2").reshape(out.shape)
        case Codec.BFLOAT16:
            out[:] = to_float32(np.frombuffer(data, "<u2")).reshape(out.shape)
        case Codec.INT8_ROW:
            _decode_int8(data, hidden, out)
        case Codec.INT8_GROUP:
            _decode_int8(data, GROUP, out)
        case Codec.INT8_HADAMARD:
            turned = np.empty_like(out)
            _decode_int8(data, hidden, turned)
            rotate_back(turned, out)
        case Codec.STEPS_ZLIB | Codec.STEPS_ZSTD:
            _decode_steps(codec, data, out)
        case Codec.STEPS_AHEAD:
            _decode_ahead(data, out, past)
    if codec in CHECKED and not np.isfinite(out).all():
        raise FrameError("rows contain NaN or Inf")


def relative_error(x: Rows, decoded: Rows) -> float:
    """e of two arrays (n, H)."""
    return _error(_squares(x - decoded), _squares(x))


def loudness(x: Rows) -> NDArray[np.float64]:
    """Per row, what an error is measured by: its root mean square, at most LOUD_MAX typical ones.

    The first token of a text gets results 100 times as large as all others, in a few channels;
    noise of that size in its other channels destroys what the model keeps there ("attention sink").
    """
    rms: NDArray[np.float64] = np.sqrt(_squares(x) / x.shape[1])
    typical = float(np.median(rms))
    return np.minimum(rms, LOUD_MAX * typical) if typical > 0 else rms


def _squares(x: Rows) -> NDArray[np.float64]:
    """The squared length of each row."""
    squares: NDArray[np.float64] = np.einsum("ij,ij->i", x, x, dtype=np.float64)
    return squares


def _error(wrong: NDArray[np.float64], whole: NDArray[np.float64]) -> float:
    """Root of the mean over rows of wrong / whole; a row of zeros counts as right if it is."""
    return float(np.sqrt(np.mean(wrong / np.where(whole > 0, whole, 1))))


def _bytes(array: NDArray[np.generic]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _encode_float16(x: Rows) -> Encoded:
    with np.errstate(over="ignore"):
        half = x.astype("<f2")
    if np.isfinite(half).all():
        return Encoded((_bytes(half),), FLOAT16_ERROR)
    limit = np.finfo(np.float16).max
    half = np.clip(x, -limit, limit).astype("<f2")
    return Encoded((_bytes(half),), relative_error(x, half.astype(np.float32)))


def _blocks(x: NDArray[np.generic], block: int) -> list[NDArray[np.generic]]:
    """Views (n, groups, values): the whole groups, then the shorter one that may be left."""
    rows, hidden = x.shape
    whole = hidden // block * block
    views = [x[:, :whole].reshape(rows, -1, block)] if whole else []
    return [*views, x[:, whole:].reshape(rows, 1, -1)] if whole < hidden else views


def _encode_int8(x: Rows, block: int) -> Encoded:
    rows, hidden = x.shape
    scales = np.empty((rows, -(-hidden // block)), "<f4")
    coded = np.empty((rows, hidden), np.int8)
    wrong = np.zeros(rows)
    at = 0
    for values, target in zip(_blocks(x, block), _blocks(coded, block), strict=True):
        groups = values.shape[1]
        scale = np.abs(values).max(axis=2) / np.float32(LEVELS)
        steps = values / np.where(scale > 0, scale, np.float32(1))[..., None]
        rounded = np.rint(steps)
        target[...] = rounded
        steps -= rounded
        lost = np.einsum("ngv,ngv->ng", steps, steps, dtype=np.float64)
        wrong += (lost * np.square(scale, dtype=np.float64)).sum(axis=1)
        scales[:, at : at + groups] = scale
        at += groups
    return Encoded((_bytes(scales), _bytes(coded)), _error(wrong, _squares(x)))


def _decode_int8(data: memoryview, block: int, out: Rows) -> None:
    rows, hidden = out.shape
    groups = -(-hidden // block)
    scales = _scales(data, rows * groups).reshape(rows, groups)
    coded = np.frombuffer(data, np.int8, offset=scales.nbytes).reshape(rows, hidden)
    at = 0
    for values, target in zip(_blocks(coded, block), _blocks(out, block), strict=True):
        size = values.shape[1]
        np.multiply(values, scales[:, at : at + size, None], out=target)
        at += size


def _scales(data: memoryview, count: int) -> NDArray[np.float32]:
    scales = np.frombuffer(data, "<f4", count)
    if not ((scales >= 0) & (scales <= SCALE_MAX)).all():
        raise FrameError("a scale is negative, too large or not a number")
    return scales


def _steps(x: Rows, error: float) -> Rows:
    """(n,): a uniform quantiser of step s errs by s / sqrt(12) per value."""
    error = min(max(error, ERROR_MIN), ERROR_MAX)
    steps: Rows = (loudness(x) * (error * 12**0.5)).astype(np.float32)
    return steps


def _encode_steps(codec: Codec, x: Rows, steps: Rows, whole: NDArray[np.float64]) -> Encoded:
    """`whole`: the squared length of the rows that the error is relative to."""
    divisor: Rows = np.where(steps > 0, steps, np.float32(1))
    scaled: Rows = x / divisor[:, None]
    rounded = np.rint(scaled)
    outside = np.abs(rounded) > LEVELS
    exceptions = x[outside]
    rounded[outside] = ESCAPE
    coded = rounded.astype(np.int8)
    scaled -= rounded
    scaled[outside] = 0
    wrong = _squares(scaled) * np.square(steps, dtype=np.float64)
    packed = _pack(codec, coded)
    size = np.array([len(packed)], "<u4")
    pieces = (_bytes(steps), _bytes(size), memoryview(packed), _bytes(exceptions))
    return Encoded(pieces, _error(wrong, whole))


def _decode_steps(codec: Codec, data: memoryview, out: Rows) -> None:
    rows = len(out)
    steps = _scales(data, rows)
    (size,) = np.frombuffer(data, "<u4", 1, 4 * rows).tolist()
    body = data[4 * rows + 4 :]
    if size > len(body):
        raise FrameError("coded steps are longer than their frame")
    coded = np.frombuffer(_unpack(codec, body[:size], out.size), np.int8).reshape(out.shape)
    np.multiply(coded, steps[:, None], out=out)
    outside = coded == ESCAPE
    if len(body) - size != 4 * int(np.count_nonzero(outside)):
        raise FrameError("exceptions do not match the coded steps")
    exceptions = np.frombuffer(body[size:], "<f4")
    if not np.isfinite(exceptions).all():
        raise FrameError("rows contain NaN or Inf")
    out[outside] = exceptions


def _decode_ahead(data: memoryview, out: Rows, past: Past | None) -> None:
    if past is None or past.x.shape != out.shape:
        raise FrameError("rows are told by others that did not go before them here")
    rows, hidden = out.shape
    gains: Halves = np.frombuffer(data, "<u2", 2 * hidden).reshape(2, hidden)
    weights: Halves = np.frombuffer(data, "<u2", 2 * rows, gains.nbytes).reshape(rows, 2)
    _decode_steps(Codec.STEPS_ZLIB, data[gains.nbytes + weights.nbytes :], out)
    with np.errstate(over="ignore", invalid="ignore"):
        out += predict(past, gains, weights)


def _pack(codec: Codec, coded: NDArray[np.int8]) -> bytes:
    if codec is Codec.STEPS_ZSTD:
        assert zstandard is not None, "offered only where it is installed"
        compressor = zstandard.ZstdCompressor(level=1, write_content_size=True)
        packed: bytes = compressor.compress(_bytes(coded))
        return packed
    coder = zlib.compressobj(1, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(_bytes(coded)) + coder.flush()


def _unpack(codec: Codec, packed: memoryview, size: int) -> bytes:
    """Exactly `size` bytes; a bomb is found out before it is unpacked."""
    plain, complete = (_zstd if codec is Codec.STEPS_ZSTD else _zlib)(packed, size)
    if len(plain) != size or not complete:
        raise FrameError(f"{len(plain)} coded steps, {size} are needed")
    return plain


def _zlib(packed: memoryview, size: int) -> tuple[bytes, bool]:
    decoder = zlib.decompressobj(-15)
    try:
        plain = decoder.decompress(packed, size + 1)
    except zlib.error as exc:
        raise FrameError(f"coded steps cannot be read: {exc}") from exc
    return plain, decoder.eof and not decoder.unused_data


def _zstd(packed: memoryview, size: int) -> tuple[bytes, bool]:
    if zstandard is None:
        raise FrameError("zstd is not installed here (pip install 'coeld[zstd]')")
    try:
        if zstandard.get_frame_parameters(packed).content_size != size:
            raise FrameError(f"not the {size} coded steps that are needed")
        decoder = zstandard.ZstdDecompressor()
        return decoder.decompress(packed, size, allow_extra_data=False), True
    except zstandard.ZstdError as exc:
        raise FrameError(f"coded steps cannot be read: {exc}") from exc
