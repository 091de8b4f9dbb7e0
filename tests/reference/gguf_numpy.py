"""A llama model in plain numpy, straight from the GGUF file: the truth coeld is compared with.

Independent on purpose: it shares no code with coeld and does not use the `gguf` package. Slow and
obvious: all weights become float32, the whole sequence goes through whole matrices, no cache.

    reference = load(path)
    logits = reference.logits([1, 2, 3])    # (3, V) float32

Formats: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and ggml-common.h. The model:
RMSNorm, rotary embedding over pairs (2i, 2i+1) as llama.cpp does for this architecture, grouped
query attention, SwiGLU, and the embedding as head where the file has no separate one.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
STRING, ARRAY = 8, 9
F32, F16, Q4_1, Q8_0 = 0, 1, 3, 8


def read_scalar(file: BinaryIO, code: str) -> Any:
    return struct.unpack("<" + code, file.read(struct.calcsize("<" + code)))[0]


def read_text(file: BinaryIO) -> str:
    return file.read(read_scalar(file, "Q")).decode()


def read_value(file: BinaryIO, kind: int) -> Any:
    if kind == STRING:
        return read_text(file)
    if kind == ARRAY:
        inner, count = read_scalar(file, "I"), read_scalar(file, "Q")
        return [read_value(file, inner) for _ in range(count)]
    return read_scalar(file, SCALARS[kind])


def read_tensor(data: NDArray[np.uint8], shape: tuple[int, ...], kind: int) -> Floats:
    """The tensor that begins at data[0]. Blocks of 32 weights share a scale (and a minimum)."""
    count = int(np.prod(shape))
    if kind == F32:
        values = data[: 4 * count].view("<f4")
    elif kind == F16:
        values = data[: 2 * count].view("<f2").astype(np.float32)
    elif kind == Q8_0:  # half scale; 32 signed bytes
        blocks = data[: count // 32 * 34].reshape(-1, 34)
        scale = blocks[:, 0:2].copy().view("<f2").astype(np.float32)
        values = scale * blocks[:, 2:].view(np.int8).astype(np.float32)
    elif kind == Q4_1:  # half scale, half minimum; 16 bytes: low halves are 0..15, high 16..31
        blocks = data[: count // 32 * 20].reshape(-1, 20)
        scale = blocks[:, 0:2].copy().view("<f2").astype(np.float32)
        minimum = blocks[:, 2:4].copy().view("<f2").astype(np.float32)
        steps = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
        values = scale * steps.astype(np.float32) + minimum
    else:
        raise ValueError(f"tensor type {kind}")
    return np.ascontiguousarray(values, np.float32).reshape(shape)


def load(path: Path) -> "Reference":
    """Reads everything into memory as float32 (about 4 bytes a parameter)."""
    with path.open("rb") as file:
        magic, _version = file.read(4), read_scalar(file, "I")
        assert magic == b"GGUF"
        tensor_count, key_count = read_scalar(file, "Q"), read_scalar(file, "Q")
        keys = {}
        for _ in range(key_count):
            name = read_text(file)
            keys[name] = read_value(file, read_scalar(file, "I"))
        places = {}
        for _ in range(tensor_count):
            name, dimensions = read_text(file), read_scalar(file, "I")
            shape = tuple(read_scalar(file, "Q") for _ in range(dimensions))[::-1]
            places[name] = (shape, read_scalar(file, "I"), read_scalar(file, "Q"))
        alignment = keys.get("general.alignment", 32)
        start = -(-file.tell() // alignment) * alignment
    data = np.fromfile(path, np.uint8)
    tensors = {
        name: read_tensor(data[start + offset :], shape, kind)
        for name, (shape, kind, offset) in places.items()
    }
    return Reference(keys, tensors)


@dataclass
class Reference:
    """A loaded model: metadata by key, tensors by name."""

    keys: dict[str, Any]
    tensors: dict[str, Floats]

    def logits(self, tokens: list[int]) -> Floats:
        """Logits (n, V): row i scores what comes after tokens[: i + 1]."""
        embedding = self.tensors["token_embd.weight"]
        x = embedding[tokens]
        for layer in range(self.keys["llama.block_count"]):
            x = x + self.attention(self.norm(x, f"blk.{layer}.attn_norm"), layer)
            x = x + self.feed_forward(self.norm(x, f"blk.{layer}.ffn_norm"), layer)
        head = self.tensors.get("output.weight", embedding)
        return self.norm(x, "output_norm") @ head.T

    def linear(self, x: Floats, name: str) -> Floats:
        return x @ self.tensors[f"{name}.weight"].T

    def norm(self, x: Floats, name: str) -> Floats:
        epsilon = np.float32(self.keys["llama.attention.layer_norm_rms_epsilon"])
        mean_square = np.mean(x * x, axis=-1, keepdims=True)
        return x / np.sqrt(mean_square + epsilon) * self.tensors[f"{name}.weight"]

    def attention(self, x: Floats, layer: int) -> Floats:
        n = len(x)
        heads = self.keys["llama.attention.head_count"]
        kv_heads = self.keys.get("llama.attention.head_count_kv", heads)
        q = self.linear(x, f"blk.{layer}.attn_q").reshape(n, heads, -1).swapaxes(0, 1)
        k = self.linear(x, f"blk.{layer}.attn_k").reshape(n, kv_heads, -1).swapaxes(0, 1)
        v = self.linear(x, f"blk.{layer}.attn_v").reshape(n, kv_heads, -1).swapaxes(0, 1)
        q, k = self.rotate(q), self.rotate(k)
        k, v = (np.repeat(t, heads // kv_heads, axis=0) for t in (k, v))
        scores = q @ k.swapaxes(1, 2) / np.float32(np.sqrt(q.shape[-1]))
        future = np.triu(np.ones((n, n), bool), 1)
        scores[:, future] = -np.inf
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        mixed = (weights @ v).swapaxes(0, 1).reshape(n, -1)
        return self.linear(mixed, f"blk.{layer}.attn_output")

    def rotate(self, x: Floats) -> Floats:
        """Turns each pair (2i, 2i+1) of a head by position * base^(-2i/d). x: (heads, n, d)."""
        n, d = x.shape[1:]
        base = self.keys.get("llama.rope.freq_base", 10_000.0)
        angle = np.outer(np.arange(n), base ** (-np.arange(0, d, 2) / d))
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        even, odd = x[..., 0::2], x[..., 1::2]
        turned = np.empty_like(x)
        turned[..., 0::2] = even * cos - odd * sin
        turned[..., 1::2] = even * sin + odd * cos
        return turned

    def feed_forward(self, x: Floats, layer: int) -> Floats:
        gate = self.linear(x, f"blk.{layer}.ffn_gate")
        up = self.linear(x, f"blk.{layer}.ffn_up")
        with np.errstate(over="ignore"):  # exp(-gate) may be inf: silu is 0 there
            silu = gate / (1 + np.exp(-gate))
        return self.linear(silu * up, f"blk.{layer}.ffn_down")
