"""Calibration: one float64 pass over a short text, layer by layer, to smooth each layer.

The pass sees a layer as it is imported, notes the loudest value of every channel that enters a
matrix, and hands back the same layer with smoothed channels. The text is in this folder and the
same everywhere: the imported weights depend on it.
"""

from dataclasses import replace
from importlib.resources import files
from typing import Final

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from coeld.compression.smooth import smoothing
from coeld.model.families.llama import Layer
from coeld.model.manifest import Shape

TOKENS_MAX: Final = 256

Doubles = NDArray[np.float64]


def calibration_tokens(tokenizer: bytes) -> list[int]:
    """The text in the model's own tokens, at most TOKENS_MAX of them."""
    text = files("coeld.model").joinpath("calibration.txt").read_text("utf-8")
    ids: list[int] = Tokenizer.from_buffer(tokenizer).encode(text, add_special_tokens=False).ids
    return ids[:TOKENS_MAX]


class Calibration:
    """The hidden states of the calibration text after the layers seen so far."""

    def __init__(self, shape: Shape, embedded: NDArray[np.float32]) -> None:
        """`embedded`: (tokens, H)."""
        self._shape = shape
        self._x: Doubles = embedded.astype(np.float64)

    def smooth(self, layer: Layer) -> Layer:
        """The next layer with smoothed channels: the same function."""
        shape = self._shape
        normed = self._norm(layer.attention_norm)
        into_qkv = smoothing(np.abs(normed).max(0))
        mixed = self._attend(normed, layer)
        # v's rows are shared by the query heads of a group, so these share their factors.
        grouped = np.abs(mixed).max(0).reshape(shape.kv_heads, -1, shape.head_dim)
        into_v = smoothing(grouped.max(1).reshape(-1)).reshape(shape.kv_heads, 1, -1)
        into_o = np.broadcast_to(into_v, grouped.shape).reshape(-1)
        self._x += mixed @ layer.o.T
        normed = self._norm(layer.ffn_norm)
        into_ffn = smoothing(np.abs(normed).max(0))
        gate = normed @ layer.gate.T
        hidden = gate / (1 + np.exp(-np.clip(gate, -500, 500))) * (normed @ layer.up.T)
        into_down = smoothing(np.abs(hidden).max(0))
        self._x += hidden @ layer.down.T

        qkv = layer.qkv * into_qkv
        qkv[-into_v.size :] /= into_v.reshape(-1, 1)
        return replace(
            layer,
            attention_norm=layer.attention_norm / into_qkv,
            ffn_norm=layer.ffn_norm / into_ffn,
            qkv=qkv,
            o=layer.o * into_o,
            gate=layer.gate * into_ffn,
            up=layer.up * into_ffn / into_down[:, None],
            down=layer.down * into_down,
        )

    def _norm(self, weight: NDArray[np.float32]) -> Doubles:
        mean_square = np.mean(self._x**2, axis=-1, keepdims=True)
        normed: Doubles = self._x / np.sqrt(mean_square + self._shape.norm_epsilon) * weight
        return normed

    def _attend(self, normed: Doubles, layer: Layer) -> Doubles:
        """Causal attention over the whole text: (tokens, heads * head_dim)."""
        shape, n = self._shape, len(normed)
        heads, kv_heads, d = shape.heads, shape.kv_heads, shape.head_dim
        rows = (normed @ layer.qkv.T).reshape(n, heads + 2 * kv_heads, d).swapaxes(0, 1)
        q, k, v = np.split(rows, [heads, heads + kv_heads])
        group = heads // kv_heads
        q = self._rotate(q).reshape(kv_heads, group, n, d)
        scores = q @ self._rotate(k)[:, None].swapaxes(2, 3) / np.sqrt(d)
        scores[..., np.triu(np.ones((n, n), bool), 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed: Doubles = (weights @ v[:, None]).reshape(heads, n, d).swapaxes(0, 1).reshape(n, -1)
        return mixed

    def _rotate(self, x: Doubles) -> Doubles:
        """Half-rotated rotary embedding of (heads, tokens, head_dim)."""
        d = self._shape.head_dim
        angles = np.outer(np.arange(x.shape[1]), self._shape.rope_base ** (-np.arange(0, d, 2) / d))
        cos, sin = np.cos(angles), np.sin(angles)
        a, b = x[..., : d // 2], x[..., d // 2 :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
