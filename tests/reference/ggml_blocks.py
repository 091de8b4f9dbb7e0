"""What the bytes of a ggml block stand for: one weight after the other, written out from the spec.

Independent of the `gguf` package, slow and obvious. Source: ggml-common.h and dequantize_row_* in
ggml-quants.c of llama.cpp.
"""

import struct
from collections.abc import Callable, Iterator
from random import Random

Block = Callable[[bytes], Iterator[float]]


def half(data: bytes, at: int = 0) -> float:
    return struct.unpack_from("<e", data, at)[0]


def bf16(data: bytes) -> Iterator[float]:
    yield struct.unpack("<f", b"\0\0" + data)[0]


def q4_0(data: bytes) -> Iterator[float]:
    nibbles = [byte & 15 for byte in data[2:]] + [byte >> 4 for byte in data[2:]]
    yield from (half(data) * (q - 8) for q in nibbles)


def q4_1(data: bytes) -> Iterator[float]:
    nibbles = [byte & 15 for byte in data[4:]] + [byte >> 4 for byte in data[4:]]
    yield from (half(data) * q + half(data, 2) for q in nibbles)


def fives(data: bytes) -> list[int]:
    """Four bytes of fifth bits, then nibbles."""
    high = int.from_bytes(data[:4], "little")
    nibbles = [byte & 15 for byte in data[4:]] + [byte >> 4 for byte in data[4:]]
    return [q | (high >> index & 1) << 4 for index, q in enumerate(nibbles)]


def q5_0(data: bytes) -> Iterator[float]:
    yield from (half(data) * (q - 16) for q in fives(data[2:]))


def q5_1(data: bytes) -> Iterator[float]:
    yield from (half(data) * q + half(data, 2) for q in fives(data[4:]))


def q8_0(data: bytes) -> Iterator[float]:
    yield from (half(data) * q for q in struct.unpack("<32b", data[2:]))


def scale_and_minimum(packed: bytes, index: int) -> tuple[int, int]:
    """Eight pairs of 6 bits in 12 bytes."""
    if index < 4:
        return packed[index] & 63, packed[index + 4] & 63
    low, top = packed[index + 4], packed[index - 4] >> 6
    return low & 15 | top << 4, low >> 4 | (packed[index] >> 6) << 4


def q4_k(data: bytes) -> Iterator[float]:
    d, least, packed, quants = half(data), half(data, 2), data[4:16], data[16:]
    for group in range(8):
        scale, minimum = scale_and_minimum(packed, group)
        for byte in quants[group // 2 * 32 : group // 2 * 32 + 32]:
            q = byte >> 4 if group % 2 else byte & 15
            yield d * scale * q - least * minimum


def q5_k(data: bytes) -> Iterator[float]:
    d, least, packed = half(data), half(data, 2), data[4:16]
    high, quants = data[16:48], data[48:]
    for group in range(8):
        scale, minimum = scale_and_minimum(packed, group)
        for index, byte in enumerate(quants[group // 2 * 32 : group // 2 * 32 + 32]):
            q = (byte >> 4 if group % 2 else byte & 15) + 16 * (high[index] >> group & 1)
            yield d * scale * q - least * minimum


def q6_k(data: bytes) -> Iterator[float]:
    low, high, scales, d = data[:128], data[128:192], data[192:208], half(data, 208)
    for index in range(256):
        part, rest = divmod(index, 128)
        quarter, lane = divmod(rest, 32)
        byte = low[64 * part + 32 * (quarter % 2) + lane]
        nibble = byte >> 4 if quarter >= 2 else byte & 15
        q = nibble | (high[32 * part + lane] >> 2 * quarter & 3) << 4
        (scale,) = struct.unpack_from("<b", scales, index // 16)
        yield d * scale * (q - 32)


def mxfp4(data: bytes) -> Iterator[float]:
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    values += [-value for value in values]
    nibbles = [byte & 15 for byte in data[1:]] + [byte >> 4 for byte in data[1:]]
    yield from (values[q] * 2.0 ** (data[0] - 127) for q in nibbles)


BLOCKS: dict[str, tuple[int, int, Block]] = {
    "BF16": (1, 2, bf16),
    "Q4_0": (32, 18, q4_0),
    "Q4_1": (32, 20, q4_1),
    "Q5_0": (32, 22, q5_0),
    "Q5_1": (32, 24, q5_1),
    "Q8_0": (32, 34, q8_0),
    "Q4_K": (256, 144, q4_k),
    "Q5_K": (256, 176, q5_k),
    "Q6_K": (256, 210, q6_k),
    "MXFP4": (32, 17, mxfp4),
}
"""Weights of a block, its bytes, and what they stand for."""


def random_block(kind: str, rng: Random) -> bytes:
    """Any bits at all, but for scales, which are small numbers."""
    data = bytearray(rng.randbytes(BLOCKS[kind][1]))
    numbers = struct.pack("<2e", rng.uniform(-2, 2), rng.uniform(-2, 2))
    if kind == "BF16":
        data[:] = struct.pack("<f", rng.uniform(-9, 9))[2:]
    elif kind == "MXFP4":
        data[0] = rng.randrange(110, 140)
    elif kind == "Q6_K":
        data[208:] = numbers[:2]
    elif kind in ("Q4_0", "Q5_0", "Q8_0"):
        data[:2] = numbers[:2]
    else:
        data[:4] = numbers
    return bytes(data)
