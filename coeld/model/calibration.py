"""Calibration: one pass over a short text, layer by layer, while the import reads the weights.

It serves two ends. Smoothing: the pass notes the loudest value of every channel that enters a
matrix, and hands back the same layer with smoothed channels. Statistics: it knows which rows each
expert is given and with which weight, from which its width follows (`importance`).

Experts are handed in one by one, and only the rows that chose an expert run through it. Smoothing
is folded where that is exact: into norms, and into the rows of v and up that produce what o and
down read. Not into routed experts' down: too few rows of a short text reach one expert to know its
loudest channels; and not where the activation is not linear in up.

Everything is float64, because of the hash: the imported weights must be the same on every machine,
and the noise of float32 sums would now and then choose another expert or another quarter octave.
The text is in this folder and the same everywhere.
"""

from copy import copy
from importlib.resources import files
from typing import Final

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from coeld.compression.smooth import carried, smoothing
from coeld.model.families.blueprint import Blueprint
from coeld.model.manifest import Activation, Routing

TOKENS_MAX: Final = 256
CHUNK_BYTES: Final = 32 << 20
"""Of a matrix that is float64 at a time."""

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Weights = dict[str, Floats]


def calibration_tokens(tokenizer: bytes) -> list[int]:
    """The text in the model's own tokens, at most TOKENS_MAX of them."""
    text = files("coeld.model").joinpath("calibration.txt").read_text("utf-8")
    ids: list[int] = Tokenizer.from_buffer(tokenizer).encode(text, add_special_tokens=False).ids
    return ids[:TOKENS_MAX]


class Calibration:
    """The hidden states of a text after the layers seen so far.

    For each layer: `trunk` first, then `expert` for each of its experts (of a dense layer: its
    whole feed-forward block), in any order. Between, `rows` and `gates` describe the layer.
    """

    def __init__(self, blueprint: Blueprint, tokens: list[int]) -> None:
        """Reads the embeddings of the tokens. Raises BadModelFile."""
        self._shape = shape = blueprint.shape
        self._layer = -1
        embedding, checkpoint = blueprint.embedding, blueprint.checkpoint
        found = [checkpoint.read(embedding.name, token, token + 1) for token in tokens]
        self._x: Doubles = np.concatenate(found).astype(np.float64) * shape.embedding_scale
        self.rows: Doubles = np.zeros((len(tokens), shape.hidden))
        """What the experts of the layer read: (tokens, H), after smoothing."""
        self.gates: Doubles = np.zeros((len(tokens), 1))
        """Each expert's weight in each row, 0 where it was not chosen: (tokens, E)."""
        self.into_gate: Floats = np.ones(shape.hidden, np.float32)
        """Mean square of what each channel of the layer's experts reads: (H,), after smoothing."""
        self.into_down: Floats = np.ones(1, np.float32)
        """The same for down of the last expert: (neurons,)."""

    def trunk(self, weights: Weights) -> Weights:
        """The next layer's trunk with smoothed channels: the same function."""
        self._layer += 1
        shape, smooth = self._shape, dict(weights)
        normed = rms_norm(self._x, weights["attention_norm"], shape.norm_epsilon)
        into_qkv = smoothing(np.abs(normed).max(0))
        mixed = self._attend(normed, weights)
        # v's rows are shared by the query heads of a group, so these share their factors.
        grouped = np.abs(mixed).max(0).reshape(shape.kv_heads, -1, shape.head_dim)
        into_v = smoothing(grouped.max(1).reshape(-1))
        per_head = into_v.reshape(shape.kv_heads, 1, -1)
        into_o = np.broadcast_to(per_head, grouped.shape).reshape(-1)
        self._x += times(mixed, weights["o"]) + weights.get("o.b", 0)
        smooth["attention_norm"] = weights["attention_norm"] / into_qkv
        smooth["qkv"] = weights["qkv"] * into_qkv
        smooth["qkv"][-into_v.size :] /= into_v[:, None]
        if "qkv.b" in weights:
            smooth["qkv.b"] = weights["qkv.b"].copy()
            smooth["qkv.b"][-into_v.size :] /= into_v
        smooth["o"] = weights["o"] * into_o
        self._before_experts(weights, smooth)
        return smooth

    @property
    def states(self) -> Doubles:
        """The residual: (tokens, H)."""
        return self._x

    def fork(self, error: Doubles) -> "Calibration":
        """The first tokens' states, with an error (n, H) added to them, on their own way."""
        other = copy(self)
        other._x = self._x[: len(error)] + error
        return other

    def _before_experts(self, weights: Weights, smooth: Weights) -> None:
        """Router and shared expert: what else reads the normed rows."""
        shape = self._shape
        normed = rms_norm(self._x, weights["ffn_norm"], shape.norm_epsilon)
        self._into_ffn = into = smoothing(np.abs(normed).max(0))
        self.rows = normed / into
        self.into_gate = carried(self.rows)
        smooth["ffn_norm"] = weights["ffn_norm"] / into
        for name in ("router.w", "shared_score"):
            if name in weights:
                smooth[name] = weights[name] * into
        if shape.routing is None:
            self.gates = np.ones((len(normed), 1))
        else:
            logits = times(normed, weights["router.w"]) + weights.get("router.b", 0)
            correction = weights.get("router.correction", np.zeros(1, np.float32))
            self.gates = route(logits, shape.routing, shape.top_k, correction)
        if shape.shared_width:
            parts = {name: weights[f"shared_{name}"] for name in ("gate", "up", "down")}
            smoothed, y = self._feed(parts, self.rows, every=True)
            smooth |= {f"shared_{name}": value for name, value in smoothed.items()}
            if "shared_score" in weights:
                y *= sigmoid(times(normed, weights["shared_score"]))
            self._x += y

    def expert(self, index: int, weights: Weights, *, spend: bool = False) -> Weights:
        """One expert with smoothed channels: the same function of smoothed rows. `spend`: in the
        memory of what was given, which nobody may look at again."""
        chosen = np.flatnonzero(self.gates[:, index])
        every = self._shape.routing is None
        smoothed, y = self._feed(weights, self.rows[chosen], every, spend)
        self._x[chosen] += y * self.gates[chosen, index, None]
        return smoothed

    def _feed(
        self, weights: Weights, rows: Doubles, every: bool, spend: bool = False
    ) -> tuple[Weights, Doubles]:
        """A feed-forward block, smoothed, and its output. `every`: these are all rows."""
        activation, into = self._shape.activation, self._into_ffn
        smooth = dict(weights)

        def scaled(name: str, factors: Floats) -> Floats:
            weight = weights[name]
            in_place = spend and weight.flags.writeable
            return np.multiply(weight, factors, out=weight if in_place else None)

        smooth["gate"], smooth["up"] = scaled("gate", into), scaled("up", into)
        gate = times(rows, smooth["gate"]) + weights.get("gate.b", 0)
        up = times(rows, smooth["up"]) + weights.get("up.b", 0)
        hidden = swiglu(gate, up, activation)
        y = times(hidden, weights["down"]) + weights.get("down.b", 0)
        self.into_down = carried(hidden)
        if every and activation.beta == 0 and activation.limit == 0:
            into_down = smoothing(np.abs(hidden).max(0))
            self.into_down = carried(hidden / into_down)
            smooth["up"] /= into_down[:, None]
            if "up.b" in weights:
                smooth["up.b"] = weights["up.b"] / into_down
            smooth["down"] = scaled("down", into_down)
        return smooth, y

    def _attend(self, normed: Doubles, weights: Weights) -> Doubles:
        """Causal attention over the whole text: (tokens, heads * head_dim)."""
        shape, n = self._shape, len(normed)
        heads, kv_heads, d = shape.heads, shape.kv_heads, shape.head_dim
        rows = times(normed, weights["qkv"]) + weights.get("qkv.b", 0)
        q, k, v = np.split(rows, [heads * d, (heads + kv_heads) * d], axis=1)
        if shape.qk_norm != "none":
            width = d if shape.qk_norm == "head" else None
            q = rms_norm(q, weights["q_norm"], shape.norm_epsilon, width)
            k = rms_norm(k, weights["k_norm"], shape.norm_epsilon, width)
        q, k, v = (part.reshape(n, -1, d).swapaxes(0, 1) for part in (q, k, v))
        q, k = self._rotate(q), self._rotate(k)
        past = np.arange(n)[:, None] - np.arange(n)
        window = shape.windows[self._layer] if shape.windows else 0
        hidden = (past < 0) | ((past >= window) & (window > 0))
        sinks = weights.get("sinks")
        mixed = np.empty((n, heads, d))
        for head in range(heads):
            source = head // (heads // kv_heads)
            scores = q[head] @ k[source].T * shape.attention_scale
            scores[hidden] = -np.inf
            sink = -np.inf if sinks is None else float(sinks[head])
            loudest = np.maximum(scores.max(-1, keepdims=True), sink)
            scores = np.exp(scores - loudest)
            mixed[:, head] = scores @ v[source]
            mixed[:, head] /= scores.sum(-1, keepdims=True) + np.exp(sink - loudest)
        return mixed.reshape(n, -1)

    def _rotate(self, x: Doubles) -> Doubles:
        """Half-rotated rotary embedding of (heads, tokens, head_dim)."""
        rope, half = self._shape.rope, self._shape.head_dim // 2
        angles = np.outer(np.arange(x.shape[1]), rope.inverse_frequencies)
        cos, sin = np.cos(angles) * rope.scale, np.sin(angles) * rope.scale
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def neurons(expert: Weights, index: int, count: int) -> Weights:
    """Slice `index` of `count`: its neurons' rows of gate and up, columns of down.

    down's bias, which is no neuron's, goes with the first slice.
    """
    width = expert["gate"].shape[0] // count
    own = slice(index * width, (index + 1) * width)
    found = {name: value[own] for name, value in expert.items() if not name.startswith("down")}
    found["down"] = expert["down"][:, own]
    if "down.b" in expert and index == 0:
        found["down.b"] = expert["down.b"]
    return found


def times(x: Doubles, weight: Floats) -> Doubles:
    """x (n, K) @ weight (N, K).T, as float64."""
    out = np.empty((len(x), len(weight)))
    rows = max(1, CHUNK_BYTES // (8 * weight.shape[1]))
    for start in range(0, len(weight), rows):
        out[:, start : start + rows] = x @ weight[start : start + rows].astype(np.float64).T
    return out


def rms_norm(x: Doubles, weight: Floats, epsilon: float, width: int | None = None) -> Doubles:
    """Over the last dimension, or over each piece of `width` of it."""
    pieces = x.reshape(len(x), -1, width or x.shape[-1])
    mean_square = np.mean(pieces**2, axis=-1, keepdims=True)
    normed: Doubles = (pieces / np.sqrt(mean_square + epsilon) * weight).reshape(x.shape)
    return normed


def sigmoid(x: Doubles) -> Doubles:
    value: Doubles = 1 / (1 + np.exp(-np.clip(x, -500, 500)))
    return value


def swiglu(gate: Doubles, up: Doubles, activation: Activation) -> Doubles:
    if activation.limit:
        gate = np.minimum(gate, activation.limit)
        up = np.clip(up, -activation.limit, activation.limit)
    value: Doubles = gate * sigmoid(activation.alpha * gate) * (up + activation.beta)
    return value


def route(logits: Doubles, routing: Routing, top_k: int, correction: Floats) -> Doubles:
    """(n, E) logits to (n, E) weights, 0 for experts that are not chosen. Ties: the lower index."""
    if routing.score == "softmax":
        scores = np.exp(logits - logits.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
    else:
        scores = sigmoid(logits)
    chosen = np.argsort(-(scores + correction), axis=-1, kind="stable")[:, :top_k]
    gates = np.zeros_like(scores)
    np.put_along_axis(gates, chosen, np.take_along_axis(scores, chosen, -1), -1)
    if routing.renormalise:
        gates /= gates.sum(-1, keepdims=True)
    weights: Doubles = gates * routing.scale
    return weights
