"""How many bytes rows need, and what that costs: every codec on a real model and real text.

Every layer of SmolLM2 is cut: the rows that enter its feed-forward block and those that leave it go
through a codec, as if the block were on another device (in a swarm of three, 20 of 30 are). The
model is the slow float32 reference of the tests, so that nothing but the codec makes a difference;
each window of 256 tokens is one prompt chunk, one frame per layer and direction. Printed: bytes
against fp16, mean KL of the next-token distribution against the undisturbed model, top-1 agreement,
and perplexity.

The sensitivity c of each place (KL = c e²) is measured first, with white noise on the calibration
text that the package brings: the texts that are judged have no part in it. "Typical" is what the
data path assumes of every model. Hops are the residual stream's, on a way of three legs of which
two are elsewhere.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coeld.compression.fusion import fuse, unfuse
from coeld.compression.prediction import Past, forecast
from coeld.compression.transfer import (
    SENSITIVITY_HOP,
    error_allowed,
    fuse_within,
    sensitivity,
)
from coeld.compression.wire import Codec, decode, encode, loudness
from coeld.engine.text import Text
from coeld.model.catalogue import find
from coeld.model.fetch import fetched
from coeld.model.store import Store, default_store
from tests.reference import gguf_numpy

ROOT = Path(__file__).resolve().parent.parent
MODEL = "smollm2-135m-instruct"
WINDOW = 256
PLACES = (0, 7, 50, 100, 200, 300, 400, 500)
"""Windows of the text that are judged, in windows of 512 tokens."""
NOISE = 0.15
HOP_NOISE = 0.05
CALIBRATION_TOKENS = 128
LEGS = (10, 20, 20, 30)
"""Of 30 layers the first third is here; the stream goes to the second and comes back, to the third
and comes back: before these layers."""

Rows = NDArray[np.float32]
Block = Callable[[Rows], Rows]
Transfer = Callable[[int, Rows, Block], Rows]


class Cut(gguf_numpy.Reference):
    """The reference with every feed-forward block behind a transfer."""

    transfer: Transfer
    hop: Callable[[int, Rows], Rows] = staticmethod(lambda _layer, x: x)
    """What enters a layer, for the stream between layers; the last: what enters the head."""

    def feed_forward(self, x: Rows, layer: int) -> Rows:
        return self.transfer(layer, x, lambda rows: super(Cut, self).feed_forward(rows, layer))

    def layers(self) -> int:
        return int(self.keys["llama.block_count"])

    def states(self, tokens: list[int]) -> list[Rows]:
        """What enters each layer, and what leaves the last."""
        states = [self.tensors["token_embd.weight"][tokens]]
        for layer in range(self.layers()):
            states.append(self.after(self.hop(layer, states[-1]), layer))
        states[-1] = self.hop(self.layers(), states[-1])
        return states

    def after(self, x: Rows, layer: int) -> Rows:
        x = x + self.attention(self.norm(x, f"blk.{layer}.attn_norm"), layer)
        return x + self.feed_forward(self.norm(x, f"blk.{layer}.ffn_norm"), layer)

    def log_probabilities(self, state: Rows) -> Rows:
        head = self.tensors.get("output.weight", self.tensors["token_embd.weight"])
        logits = self.norm(state, "output_norm") @ head.T
        logits -= logits.max(-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def untouched(_layer: int, x: Rows, block: Block) -> Rows:
    return block(x)


def divergence(base: Rows, found: Rows) -> float:
    """Mean over positions of KL(base, found), nats."""
    return float((np.exp(base) * (base - found)).sum(-1, dtype=np.float64).mean())


def measured_sensitivity(model: Cut, tokens: list[int]) -> NDArray[np.float64]:
    """c of every layer (L, 3): rows out, results back, the residual stream that leaves it."""
    model.transfer = untouched
    states = model.states(tokens)
    base = model.log_probabilities(states[-1])
    found = np.zeros((model.layers(), 3))
    rng = np.random.default_rng(0)

    def noisy(x: Rows, noise: float = NOISE) -> Rows:
        size = (loudness(x) * noise).astype(np.float32)
        return x + size[:, None] * rng.standard_normal(x.shape, np.float32)

    def diverging(state: Rows, layer: int) -> float:
        for at in range(layer, model.layers()):
            state = model.after(state, at)
        return divergence(base, model.log_probabilities(state))

    for layer in range(model.layers()):
        model.transfer = untouched
        state = noisy(states[layer + 1], HOP_NOISE)
        found[layer, 2] = diverging(state, layer + 1) / HOP_NOISE**2
        for back in (0, 1):

            def disturbed(at: int, x: Rows, block: Block, layer=layer, back=back) -> Rows:
                if at != layer:
                    return block(x)
                return noisy(block(x)) if back else block(noisy(x))

            model.transfer = disturbed
            found[layer, back] = diverging(states[layer], layer) / NOISE**2
        print(f"layer {layer}: c = {found[layer].round(3)}", file=sys.stderr, flush=True)
    return found


class Meter:
    """Carries rows through codecs and counts what they weigh."""

    hop: Callable[[int, Rows], Rows] | None = None

    def __init__(self) -> None:
        self.bytes = 0
        self.fp16_bytes = 0
        self.squares: list[float] = []

    def carry(self, codec: Codec, x: Rows, error: float = 0.0, past: Past | None = None) -> Rows:
        found = forecast(past, x, loudness(x)) if past is not None else None
        if codec is Codec.STEPS_AHEAD and found is None:
            codec = Codec.STEPS_ZLIB
        encoded = encode(codec, x, error, found)
        self.bytes += encoded.size
        self.squares.append(encoded.error**2)
        out = np.empty_like(x)
        decode(codec, b"".join(encoded.pieces), out, past)
        return out


def plain(codec: Codec, errors: NDArray[np.float64] | None = None) -> Callable[[Meter], Transfer]:
    """Both directions through one codec, for STEPS with the errors (L, 2) allowed."""

    def make(meter: Meter) -> Transfer:
        def transfer(layer: int, x: Rows, block: Block) -> Rows:
            meter.fp16_bytes += 4 * x.size
            out, back = (0.0, 0.0) if errors is None else errors[layer]
            return meter.carry(codec, block(meter.carry(codec, x, out)), back)

        return transfer

    return make


def ahead(errors: NDArray[np.float64], run: int) -> Callable[[Meter], Transfer]:
    """Steps of the difference to what the layer before tells, where one device has both: it has
    `run` layers in a row."""

    def make(meter: Meter) -> Transfer:
        past: Past | None = None

        def transfer(layer: int, x: Rows, block: Block) -> Rows:
            nonlocal past
            meter.fp16_bytes += 4 * x.size
            out, back = errors[layer]
            before = past if layer % run else None
            sent = meter.carry(Codec.STEPS_AHEAD, x, out, before)
            y = meter.carry(Codec.STEPS_ZLIB, block(sent), back)
            past = Past(sent, y)
            return y

        return transfer

    return make


def hopping(error: float) -> Callable[[Meter], Transfer]:
    """The residual stream in steps, there and back."""

    def make(meter: Meter) -> Transfer:
        def hop(layer: int, x: Rows) -> Rows:
            for _ in range(LEGS.count(layer)):
                meter.fp16_bytes += 2 * x.size
                x = meter.carry(Codec.STEPS_ZLIB, x, error)
            return x

        meter.hop = hop
        return untouched

    return make


def fusing(codec: Codec, tolerance: float) -> Callable[[Meter], Transfer]:
    """Rows within a tolerance of another one are not sent."""

    def make(meter: Meter) -> Transfer:
        def transfer(_layer: int, x: Rows, block: Block) -> Rows:
            meter.fp16_bytes += 4 * x.size
            fused = fuse(x, tolerance)
            meter.squares.append(fused.error**2)
            back = meter.carry(codec, block(meter.carry(codec, x[fused.leaders])))
            return unfuse(fused, x, back)

        return transfer

    return make


def together(errors: NDArray[np.float64]) -> Callable[[Meter], Transfer]:
    """Fusion and steps within one budget."""

    def make(meter: Meter) -> Transfer:
        def transfer(layer: int, x: Rows, block: Block) -> Rows:
            meter.fp16_bytes += 4 * x.size
            out, back = errors[layer]
            fused, left = fuse_within(x, out, back)
            sent = meter.carry(Codec.STEPS_ZLIB, x[fused.leaders], left)
            return unfuse(fused, x, meter.carry(Codec.STEPS_ZLIB, block(sent), back))

        return transfer

    return make


def variants(c: NDArray[np.float64]) -> dict[str, Callable[[Meter], Transfer]]:
    """Everything that is compared, by name."""
    found = {
        "fp16": plain(Codec.FLOAT16),
        "bf16": plain(Codec.BFLOAT16),
        "int8 per row": plain(Codec.INT8_ROW),
        "int8 per group of 64": plain(Codec.INT8_GROUP),
        "int8 with Hadamard": plain(Codec.INT8_HADAMARD),
        "fusion 0.1, fp16": fusing(Codec.FLOAT16, 0.1),
        "fusion 0.3, fp16": fusing(Codec.FLOAT16, 0.3),
    }
    typical = np.array([sensitivity(layer, len(c)) for layer in range(len(c))])
    for kl in (0.005, 0.01, 0.02, 0.025):
        even = np.full(c.shape, error_allowed(kl, c.size, float(c.mean())))
        placed = np.vectorize(lambda each, kl=kl: error_allowed(kl, c.size, each))(c)
        found[f"steps, same e everywhere, budget {kl}"] = plain(Codec.STEPS_ZLIB, even)
        found[f"steps, e by sensitivity, budget {kl}"] = plain(Codec.STEPS_ZLIB, placed)
        found[f"steps and fusion by sensitivity, budget {kl}"] = together(placed)
        found[f"steps ahead, e by sensitivity, budget {kl}"] = ahead(placed, len(c))
        usual = np.vectorize(lambda each, kl=kl: error_allowed(kl, c.size, each))(typical)
        found[f"steps ahead, typical e, budget {kl}"] = ahead(usual, len(c))
        found[f"steps ahead, typical e, ten layers a device, budget {kl}"] = ahead(usual, 10)
        hop = error_allowed(kl, len(LEGS), SENSITIVITY_HOP)
        found[f"hops in steps, budget {kl}"] = hopping(hop)
    return found


def judged(
    model: Cut, windows: list[list[int]], bases: list[Rows], make: Callable[[Meter], Transfer]
) -> dict[str, float]:
    meter = Meter()
    model.transfer = make(meter)
    model.hop = meter.hop or (lambda _layer, x: x)
    kls, same, losses = [], [], []
    for tokens, base in zip(windows, bases, strict=True):
        logs = model.log_probabilities(model.states(tokens)[-1])
        kls.append(divergence(base, logs))
        same.append(float((logs.argmax(-1) == base.argmax(-1)).mean()))
        losses += [-logs[at, tokens[at + 1]] for at in range(WINDOW // 2, WINDOW - 1)]
    return {
        "bytes": meter.bytes / meter.fp16_bytes,
        "e": float(np.sqrt(np.mean(meter.squares))),
        "kl": float(np.mean(kls)),
        "top1": float(np.mean(same)),
        "perplexity": float(np.exp(np.mean(losses))),
    }


def picture(results: dict[str, dict[str, float]]) -> str:
    """Bytes against KL, logarithmic upwards, as SVG."""
    wide, high, left, bottom = 900, 520, 70, 50
    low, top = -5.0, 0.0

    def x_of(share: float) -> float:
        return left + share * (wide - left - 30)

    def y_of(kl: float) -> float:
        part = (np.log10(max(kl, 10**low)) - low) / (top - low)
        return high - bottom - part * (high - bottom - 30)

    def text(x: float, y: float, words: str, more: str = "") -> str:
        return f'<text x="{x:.0f}" y="{y:.0f}" {more}>{words}</text>'

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{wide}" height="{high}" fill="white"/>',
    ]
    for tenth in range(0, 11, 2):
        x = x_of(tenth / 10)
        out.append(f'<path d="M{x:.0f} 30V{high - bottom}" stroke="#ddd"/>')
        out.append(text(x, high - bottom + 18, f"{tenth * 10} %", 'text-anchor="middle"'))
    for power in range(int(low), int(top) + 1):
        y = y_of(10.0**power)
        out.append(f'<path d="M{left} {y:.0f}H{wide - 30}" stroke="#ddd"/>')
        out.append(text(left - 8, y + 4, f"1e{power}", 'text-anchor="end"'))
    out.append(text(wide / 2, high - 12, "bytes against fp16", 'text-anchor="middle"'))
    out.append(text(left, 20, "mean KL (nats), every layer cut; box: what is aimed at"))
    corner = f"{x_of(0.25):.0f} {y_of(0.02):.0f}"
    out.append(
        f'<path d="M{corner}H{left}V{high - bottom}H{x_of(0.25):.0f}Z" fill="#2a7" '
        'fill-opacity="0.1" stroke="#2a7"/>'
    )
    groups = {
        "steps, same e everywhere": "#999",
        "steps, e by sensitivity": "#06c",
        "steps and fusion by sensitivity": "#c30",
        "steps ahead, e by sensitivity": "#080",
        "hops in steps": "#a0a",
    }
    for at, (group, colour) in enumerate(groups.items()):
        points = [
            (x_of(r["bytes"]), y_of(r["kl"])) for n, r in results.items() if n.startswith(group)
        ]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        out.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out.append(text(x_of(0.55), 60 + 18 * at, group, f'fill="{colour}"'))
    for name, result in results.items():
        colour = next((c for group, c in groups.items() if name.startswith(group)), "#000")
        x, y = x_of(result["bytes"]), y_of(result["kl"])
        out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
        if colour == "#000":
            anchor = "end" if result["bytes"] > 0.8 else "start"
            shift = -8 if anchor == "end" else 8
            out.append(text(x + shift, y + 4, name, f'text-anchor="{anchor}"'))
    return "\n".join([*out, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, default=ROOT / "tests" / "golden" / "text.txt")
    parser.add_argument("--windows", type=int, default=2, help="of 256 tokens")
    parser.add_argument("--gguf", type=Path, help="the model's file (default: it is fetched)")
    parser.add_argument("--sensitivity", type=Path, help="keep it here, or take it from here")
    parser.add_argument("--svg", type=Path, help="write the picture here")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    store = Store(default_store())
    if arguments.gguf:
        tensors = gguf_numpy.load(arguments.gguf)
    else:
        with store.lock(), fetched(store, find(MODEL), lambda *_progress: None) as path:
            tensors = gguf_numpy.load(path)
    model = Cut(tensors.keys, tensors.tensors)
    text = Text(store.manifest(MODEL), store)
    if arguments.sensitivity and arguments.sensitivity.exists():
        c = np.array(json.loads(arguments.sensitivity.read_text()))
    else:
        calibration = (ROOT / "coeld" / "model" / "calibration.txt").read_text("utf-8")
        c = measured_sensitivity(model, text.encode(calibration)[:CALIBRATION_TOKENS])
        if arguments.sensitivity:
            arguments.sensitivity.write_text(json.dumps(c.tolist()))
    for name, of in (("of cuts", c[:, :2]), ("of hops", c[:, 2])):
        print(f"sensitivity {name}: {of.min():.3f} to {of.max():.3f}, mean {of.mean():.3f}")
    c = c[:, :2]

    tokens = text.encode(arguments.text.read_text("utf-8"))
    starts = [2 * WINDOW * place for place in PLACES]
    if starts[arguments.windows - 1] + WINDOW > len(tokens):
        starts = list(range(0, len(tokens) - WINDOW + 1, WINDOW))
    windows = [tokens[start : start + WINDOW] for start in starts[: arguments.windows]]
    model.transfer = untouched
    bases = [model.log_probabilities(model.states(window)[-1]) for window in windows]
    results = {}
    print(f"{len(windows)} windows of {WINDOW} tokens of {arguments.text.name}")
    print("| rows travel as | bytes against fp16 | e | mean KL | top-1 | perplexity |")
    print("|---|---|---|---|---|---|")
    for name, make in {"float32": plain(Codec.FLOAT32), **variants(c)}.items():
        started = time.monotonic()
        r = results[name] = judged(model, windows, bases, make)
        print(
            f"| {name} | {r['bytes']:.1%} | {r['e']:.4f} | {r['kl']:.5f} | {r['top1']:.1%} "
            f"| {r['perplexity']:.3f} |",
            flush=True,
        )
        print(f"  {time.monotonic() - started:.0f} s", file=sys.stderr)
    if arguments.svg:
        arguments.svg.write_text(picture({n: r for n, r in results.items() if n != "float32"}))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
