"""Codecs of rows: what comes out is close by the error that was said, and nothing bad gets in."""

import struct
import zlib
from random import Random

import numpy as np
import pytest

from coeld.compression import wire
from coeld.compression.bfloat16 import to_bfloat16
from coeld.compression.prediction import Forecast, Past, predict
from coeld.compression.rotation import block_of, rotate, rotate_back
from coeld.compression.wire import Codec, decode, encode, payload_bytes, relative_error
from coeld.errors import FrameError

CODECS = wire.available()
FIXED = [codec for codec in CODECS if codec not in wire.STEPS]
ALONE = [c for c in CODECS if c in wire.STEPS and c is not Codec.STEPS_AHEAD]
SHAPES = [(1, 1), (1, 64), (3, 7), (5, 100), (2, 576), (17, 130), (4, 1024), (1, 4096)]


def rows_like_activations(seed: int, rows: int, hidden: int) -> np.ndarray:
    """Gaussian, channels of very different loudness, one row of zeros now and then."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, hidden)) * np.exp(rng.standard_normal(hidden))
    x *= np.exp(3 * rng.standard_normal((rows, 1)))
    if seed % 3 == 0:
        x[rng.integers(rows)] = 0
    return x.astype(np.float32)


def joined(encoded: wire.Encoded) -> bytes:
    return b"".join(encoded.pieces)


def told(x: np.ndarray) -> tuple[Past, Forecast]:
    """Rows a little like x, which the next ones are predicted to repeat."""
    noise = np.random.default_rng(x.size).standard_normal(x.shape).astype(np.float32)
    past = Past(x * (1 + 0.3 * noise), noise)
    gains = to_bfloat16(np.ones((2, x.shape[1]), np.float32))
    weights = to_bfloat16(np.tile(np.array([[0.9, 0.0]], np.float32), (len(x), 1)))
    return past, Forecast(gains, weights, predict(past, gains, weights), 0.0)


def there_and_back(codec: Codec, x: np.ndarray, error: float = 0.05) -> tuple[np.ndarray, float]:
    past, forecast = told(x) if codec is Codec.STEPS_AHEAD else (None, None)
    encoded = encode(codec, x, error, forecast)
    out = np.full_like(x, np.nan)
    decode(codec, joined(encoded), out, past)
    return out, encoded.error


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("seed", range(24))
def test_the_error_is_the_one_that_was_said(codec: Codec, seed: int) -> None:
    x = rows_like_activations(seed, *SHAPES[seed % len(SHAPES)])
    before = x.copy()
    out, said = there_and_back(codec, x)
    assert np.array_equal(x, before)
    found = relative_error(x, out)
    if codec in (Codec.FLOAT16, Codec.BFLOAT16):  # a constant for values spread over a mantissa
        assert found <= said * 2.5
    else:
        assert found == pytest.approx(said, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_size_is_known_before(codec: Codec, shape: tuple[int, int]) -> None:
    x = rows_like_activations(1, *shape)
    encoded = encode(codec, x, 0.05, told(x)[1])
    least, most = payload_bytes(codec, *shape)
    assert len(joined(encoded)) == encoded.size
    assert least <= encoded.size <= most
    assert (least == most) is (codec in FIXED)


@pytest.mark.parametrize("seed", range(20))
def test_int8_against_the_obvious_loop(seed: int) -> None:
    x = rows_like_activations(seed, 4, 150)
    for codec, size in ((Codec.INT8_ROW, 150), (Codec.INT8_GROUP, 64)):
        slow = np.zeros_like(x)
        for row in range(4):
            for start in range(0, 150, size):
                values = x[row, start : start + size]
                scale = np.float32(max(abs(values)) / np.float32(127))
                if scale:
                    slow[row, start : start + size] = np.rint(values / scale) * scale
        assert np.allclose(there_and_back(codec, x)[0], slow, rtol=1e-6, atol=0)


def test_float32_is_not_copied_and_exact() -> None:
    x = rows_like_activations(5, 3, 100)
    (piece,) = encode(Codec.FLOAT32, x).pieces
    assert np.shares_memory(np.frombuffer(piece, np.float32), x)
    assert np.array_equal(there_and_back(Codec.FLOAT32, x)[0], x)


def test_half_precision_is_that_of_numpy_and_saturates() -> None:
    x = np.array([[1.0, 1e-9, 7e4, -1e6]], np.float32)
    out, said = there_and_back(Codec.FLOAT16, x)
    assert out.tolist() == [[1.0, 0.0, 65504.0, -65504.0]]
    assert said > 0.5


@pytest.mark.parametrize("seed", range(10))
def test_bfloat16_rounds_to_the_nearest_even(seed: int) -> None:
    x = rows_like_activations(seed, 8, 64)
    out, _said = there_and_back(Codec.BFLOAT16, x)
    lower = (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    upper = ((x.view(np.uint32) & np.uint32(0xFFFF0000)) + np.uint32(0x10000)).view(np.float32)
    assert ((out == lower) | (out == upper)).all()
    assert (abs(out - x) <= np.minimum(abs(lower - x), abs(upper - x))).all()
    ties = np.array([[0x3F808000, 0x3F818000, 0x7F7FFFFF, 0xFF7FFFFF]], np.uint32)
    out, _said = there_and_back(Codec.BFLOAT16, ties.view(np.float32))
    assert (out.view(np.uint32) >> 16).tolist() == [[0x3F80, 0x3F82, 0x7F7F, 0xFF7F]]


def hadamard(size: int) -> np.ndarray:
    """The definition: (-1) to the number of ones that row and column have in common."""
    ones = [[bin(a & b).count("1") for b in range(size)] for a in range(size)]
    return (-1.0) ** np.array(ones) / size**0.5


@pytest.mark.parametrize("hidden", [1, 2, 7, 64, 96, 128, 576, 512, 1536])
def test_rotation_is_the_product_with_a_matrix_of_blocks(hidden: int) -> None:
    x = rows_like_activations(hidden, 3, hidden)
    turned, back = rotate(x), np.empty_like(x)
    rotate_back(turned.copy(), back)
    size = np.linalg.norm(x, axis=1, keepdims=True) + 1e-9
    assert (abs(back - x) / size).max() < 1e-6
    assert np.linalg.norm(turned, axis=1) == pytest.approx(np.linalg.norm(x, axis=1), rel=1e-5)
    block = block_of(hidden)
    parity = np.array([bin(at & at >> 1).count("1") for at in range(block)])
    slow = (x.reshape(-1, block) * (-1.0) ** parity) @ hadamard(block)
    assert np.allclose(turned, slow.reshape(x.shape), atol=1e-5 * size.max())


@pytest.mark.parametrize("seed", range(10))
def test_rotation_tames_outliers_and_constant_rows(seed: int) -> None:
    x = rows_like_activations(seed + 1, 8, 576)
    x[:, 11] = 60 * np.linalg.norm(x, axis=1) / 24
    plain, rotated = (there_and_back(c, x)[1] for c in (Codec.INT8_ROW, Codec.INT8_HADAMARD))
    assert rotated < plain / 2
    assert abs(rotate(np.ones((1, 1024), np.float32))).max() <= 1.01


@pytest.mark.parametrize("codec", ALONE)
@pytest.mark.parametrize("error", [0.003, 0.02, 0.1, 0.2])
def test_steps_err_as_told_and_cost_about_the_entropy(codec: Codec, error: float) -> None:
    x = np.random.default_rng(3).standard_normal((64, 1024), np.float32)
    encoded = encode(codec, x, error)
    assert encoded.error == pytest.approx(error, rel=0.1)
    _values, counts = np.unique(np.rint(x / (error * 12**0.5)), return_counts=True)
    share = counts / counts.sum()
    entropy = -(share * np.log2(share)).sum()
    exceptions = 32 * (np.abs(x / (error * 12**0.5)) > 127).mean()
    assert encoded.size * 8 / x.size <= entropy + exceptions + 0.5


def test_steps_keep_exceptions_exactly() -> None:
    x = np.ones((2, 600), np.float32)
    x[1, 7], x[1, 8] = 512345.67, -1e6
    out, _said = there_and_back(Codec.STEPS_ZLIB, x, 0.001)
    assert (out[1, 7], out[1, 8]) == (x[1, 7], x[1, 8])


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("seed", range(10))
def test_damaged_payloads_are_refused_or_give_finite_rows(codec: Codec, seed: int) -> None:
    """Whatever the bytes are: a FrameError, or rows without NaN and Inf; nothing else."""
    rng = Random(seed)
    x = rows_like_activations(seed, 3, 70)
    past, forecast = told(x)
    whole = joined(encode(codec, x, 0.05, forecast))
    out = np.empty_like(x)
    refused = 0
    for _ in range(60):
        data = bytearray(whole)
        for _flip in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        match rng.randrange(3):
            case 0:
                del data[rng.randrange(len(data)) :]
            case 1:
                data += rng.randbytes(rng.randint(1, 9))
        try:
            decode(codec, bytes(data), out, past)
        except FrameError:
            refused += 1
        else:
            assert np.isfinite(out).all()
    assert refused >= 20


@pytest.mark.parametrize("codec", FIXED)
def test_numbers_that_are_none_are_refused(codec: Codec) -> None:
    payload = bytearray(joined(encode(codec, np.ones((1, 8), np.float32))))
    for number in (struct.pack("<f", np.nan), struct.pack("<f", np.inf)):
        bad = number[2:] * 2 if codec is Codec.BFLOAT16 else number
        payload[:4] = struct.pack("<ee", np.nan, 1) if codec is Codec.FLOAT16 else bad
        with pytest.raises(FrameError, match=r"NaN|not a number"):
            decode(codec, payload, np.empty((1, 8), np.float32))


def test_a_prediction_that_cannot_be_made_or_is_no_number_is_refused() -> None:
    x = rows_like_activations(1, 3, 70)
    past, forecast = told(x)
    payload = bytearray(joined(encode(Codec.STEPS_AHEAD, x, 0.05, forecast)))
    out = np.empty_like(x)
    for wrong in (None, Past(past.x[:2], past.y[:2])):
        with pytest.raises(FrameError, match="did not go before"):
            decode(Codec.STEPS_AHEAD, payload, out, wrong)
    for bad in (np.nan, np.inf, 3e38):
        payload[:2] = to_bfloat16(np.full(1, bad, np.float32)).tobytes()
        with pytest.raises(FrameError, match="NaN or Inf"):
            decode(Codec.STEPS_AHEAD, payload, out, Past(np.full_like(past.x, 1e9), past.y))


@pytest.mark.parametrize("codec", ALONE)
def test_a_bomb_is_not_unpacked(codec: Codec) -> None:
    zeros = np.zeros((1, 50_000_000), np.int8)
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = coder.compress(zeros) + coder.flush()
    if codec is Codec.STEPS_ZSTD:
        bomb = wire._pack(codec, zeros)
    payload = struct.pack("<fI", 1.0, len(bomb)) + bomb
    assert len(payload) < payload_bytes(codec, 1, 60_000)[1]
    with pytest.raises(FrameError, match="needed"):
        decode(codec, payload, np.empty((1, 60_000), np.float32))
