"""Damaged frames at the parsers of the data path: a typed error, or what the frame promises.

Valid frames of every kind are mutated as a broken or hostile peer would: bits and bytes, fields of
the header set to numbers at their limits, payloads cut, lengthened or swapped with those of other
frames, values that are no numbers. What is then read must be refused with a FrameError, or have the
shapes its header says and no NaN or Inf. Half of the mutations repair the header's size afterwards,
or nothing behind it would ever be reached. The same is done to the payloads of every codec.

Everything comes from the seed; a failure prints the bytes.
"""

import argparse
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable
from random import Random

import numpy as np

from coeld.compression import wire
from coeld.compression.bfloat16 import to_bfloat16
from coeld.compression.prediction import Forecast, Past, predict
from coeld.compression.wire import Codec
from coeld.datapath import frames
from coeld.datapath.frames import HEADER, Kind, SpanCall
from coeld.errors import FrameError

NUMBERS = (0, 1, 2, 3, 4, 7, 127, 128, 255, 256, 511, 512, 513, 1023, 1024, 4095, 4096, 4097)
LARGE = (0x7FFF, 0x8000, 0xFFFF, 1 << 16, 1 << 20, (1 << 26) + 1, 1 << 31, (1 << 32) - 1)
FLOATS = [struct.pack("<f", value) for value in (np.nan, np.inf, -np.inf, -1.0, 3e38, 1e-45)]
FIELDS = [
    (0, 4),
    (4, 1),
    (5, 1),
    (6, 1),
    (7, 1),
    (8, 4),
    (12, 2),
    (14, 2),
    (16, 4),
    (20, 4),
    (24, 4),
    (28, 4),
]
"""Offset and width of what a header holds (coeld/datapath/frames.py)."""
SIZE_AT = 24
TEXTS = [
    b"[" * 4000,
    b'{"a":' * 800,
    b"1" * 4096,
    b'{"message":NaN}',
    b'{"message":1e999}',
    b'"\\ud800"',
    b"\xff" * 50,
    b"",
]
"""What readers of JSON stumble over."""


class Broken(Exception):
    """The parser let something through, or failed in a way that is not its own."""


def valid_frames(rng: Random) -> list[bytes]:
    """Some of every kind."""
    numbers = np.random.default_rng(rng.randrange(1 << 30))
    found = []
    for _ in range(40):
        rows, hidden, experts = rng.randint(1, 4), rng.choice((1, 3, 8, 24)), rng.randint(1, 9)
        x = numbers.standard_normal((rows, hidden), np.float32)
        ids = rng.sample(range(64), experts)
        call, layer = rng.randrange(1 << 32), rng.randrange(32)
        text = {"message": "x" * rng.randrange(30), "swarm": "home"}
        gates = numbers.random((rows, experts), np.float32)
        packed = (
            frames.pack_experts(call, layer, ids, x),
            frames.pack_experts(call, layer, ids, x, gates),
            frames.pack_experts(call, layer, ids, x, gates, coded(rng, x), rng.random()),
            frames.pack_result(call, layer, x, rng.randrange(1 << 32)),
            frames.pack_result(call, layer, x, 0, coded(rng, x)),
            frames.pack_experts(call, layer, ids, x, gates, ahead(x), 0.1, keep=True),
            frames.pack_span(call, SpanCall(call, layer, layer, layer + experts, rows), x),
            frames.pack_span(call, SpanCall(call, 1, layer, layer + 1, 1), x, coded(rng, x), 0.1),
            frames.pack_free(call),
            frames.pack_text(Kind.HELLO, call, text),
            frames.pack_text(Kind.ERROR, call, text),
        )
        found += [b"".join(pieces) for pieces in packed]
    return found + [text_frame(payload) for payload in TEXTS]


def coded(rng: Random, x: np.ndarray) -> tuple[Codec, wire.Encoded]:
    codec = rng.choice([codec for codec in wire.available() if codec is not Codec.STEPS_AHEAD])
    return codec, wire.encode(codec, x, 0.1)


def past(rows: int, hidden: int) -> Past:
    """What a connection's last call left."""
    ones = np.ones((rows, hidden), np.float32)
    return Past(ones, -ones)


def forecast(x: np.ndarray) -> Forecast:
    gains = to_bfloat16(np.full((2, x.shape[1]), 0.5, np.float32))
    weights = to_bfloat16(np.full((len(x), 2), 0.25, np.float32))
    return Forecast(gains, weights, predict(past(*x.shape), gains, weights), 0.0)


def ahead(x: np.ndarray) -> tuple[Codec, wire.Encoded]:
    """Rows that refer to those before."""
    return Codec.STEPS_AHEAD, wire.encode(Codec.STEPS_AHEAD, x, 0.1, forecast(x))


def text_frame(payload: bytes) -> bytes:
    """A frame around a text that pack_text would never make."""
    empty = bytearray(b"".join(frames.pack_text(Kind.HELLO, 1, {}))[: HEADER.size])
    empty[SIZE_AT : SIZE_AT + 4] = len(payload).to_bytes(4, "little")
    return bytes(empty) + payload


def mutated(rng: Random, corpus: list[bytes]) -> bytes:
    data = bytearray(rng.choice(corpus))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if not data:
            break
        at = rng.randrange(len(data))
        match rng.randrange(8):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at] = rng.randrange(256)
            case 2:
                offset, width = rng.choice(FIELDS)
                value = rng.choice(NUMBERS if rng.random() < 0.7 else LARGE) % (1 << 8 * width)
                data[offset : offset + width] = value.to_bytes(width, "little")
            case 3:
                del data[at:]
            case 4:
                data += rng.randbytes(rng.randint(1, 40))
            case 5:
                other = rng.choice(corpus)
                data[HEADER.size :] = other[HEADER.size :]
            case 6:
                where = max(HEADER.size, at & ~3)
                data[where : where + 4] = rng.choice(FLOATS)
            case _:
                there = rng.randrange(len(data))
                data[at : at + 4] = data[there : there + 4]
    if rng.random() < 0.5 and len(data) >= HEADER.size:
        data[SIZE_AT : SIZE_AT + 4] = (len(data) - HEADER.size).to_bytes(4, "little")
    return bytes(data)


def read(data: bytes) -> str:
    """Read one frame as a connection does. "waits": more bytes would have to come."""
    if len(data) < HEADER.size:
        return "waits"
    header = frames.parse_header(data[: HEADER.size])
    if header.payload_bytes > frames.PAYLOAD_BYTES_MAX:
        raise Broken(f"a payload of {header.payload_bytes} bytes is accepted")
    if len(data) < HEADER.size + header.payload_bytes:
        return "waits"
    payload = memoryview(data)[HEADER.size : HEADER.size + header.payload_bytes]
    match header.kind:
        case Kind.EXPERTS:
            before = past(header.rows, header.hidden)
            ids, *arrays = frames.unpack_experts(header, payload, before)
            if len(set(ids)) != header.experts:
                raise Broken(f"{header.experts} experts became {ids}")
            check(arrays[0], (header.rows, header.hidden))
            for weights in arrays[1:]:
                if weights is not None:
                    check(weights, (header.rows, header.experts))
        case Kind.RESULT:
            check(frames.unpack_result(header, payload)[0], (header.rows, header.hidden))
        case Kind.SPAN:
            asked, rows = frames.unpack_span(header, payload)
            if not (0 <= asked.first < asked.stop and 0 < asked.keep <= header.rows):
                raise Broken(f"a span that cannot be: {asked}")
            check(rows, (header.rows, header.hidden))
        case Kind.FREE | Kind.PING:
            if payload:
                raise Broken(f"a {header.kind.name} with a payload")
        case Kind.HELLO:
            if not isinstance(frames.unpack_text(payload), dict):
                raise Broken("a text that is no object")
        case Kind.ERROR:
            frames.refusal(payload)
        case other:
            raise Broken(f"this script does not know {other.name}: add it")
    return header.kind.name


def check(array: np.ndarray, shape: tuple[int, int]) -> None:
    if array.shape != shape or not np.isfinite(array).all():
        raise Broken(f"shape {array.shape} instead of {shape}, or values that are no numbers")


def valid_payloads(rng: Random) -> list[tuple[Codec, tuple[int, int], bytes]]:
    numbers = np.random.default_rng(rng.randrange(1 << 30))
    found = []
    for codec in wire.available():
        for shape in ((1, 1), (2, 24), (3, 70)):
            x = numbers.standard_normal(shape, np.float32)
            x[0, 0] *= 1000
            found.append((codec, shape, b"".join(wire.encode(codec, x, 0.05, forecast(x)).pieces)))
    return found


def read_rows(codec: Codec, shape: tuple[int, int], data: bytes) -> str:
    out = np.empty(shape, np.float32)
    wire.decode(codec, data, out, past(*shape))
    check(out, shape)
    return codec.name


def attempt(seen: Counter[str], data: bytes, reader: Callable[[], str]) -> None:
    """Count how one reading ended; anything but a FrameError is the parser's fault."""
    try:
        seen[reader()] += 1
    except FrameError:
        seen["refused"] += 1
    except Exception:
        print(f"bytes: {data.hex()}", file=sys.stderr)
        raise


def fuzz(count: int, seed: int) -> Counter[str]:
    """`count` mutations, nine of ten of whole frames; how they ended, by name."""
    rng, seen = Random(seed), Counter[str]()
    corpus, payloads = valid_frames(rng), valid_payloads(rng)
    raw = [data for _codec, _shape, data in payloads]
    for number in range(count):
        if number % 10:
            data = mutated(rng, corpus)
            attempt(seen, data, lambda data=data: read(data))
        else:
            codec, shape, whole = rng.choice(payloads)
            data = mutated(rng, [whole, whole, whole, rng.choice(raw)])
            attempt(seen, data, lambda c=codec, s=shape, d=data: read_rows(c, s, d))
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.monotonic()
    seen = fuzz(arguments.count, arguments.seed)
    took_s = time.monotonic() - started
    print(f"{arguments.count} mutations with seed {arguments.seed} in {took_s:.0f} s, no failure:")
    for name, times in seen.most_common():
        print(f"  {times:9} {name}")


if __name__ == "__main__":
    main()
