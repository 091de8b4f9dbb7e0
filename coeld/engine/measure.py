"""What `coeld bench` and `coeld eval` measure: one device, in process, everything local.

Both go through the same OpenModel as the daemon's engine.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coeld.datapath.request import Request
from coeld.engine.open_model import OpenModel
from coeld.engine.sessions import PAGE_BYTES, use_threads
from coeld.errors import BadRequest, PeerGone
from coeld.ids import NodeId
from coeld.model.manifest import Manifest
from coeld.model.store import Store

ME: Final = NodeId("0" * 16)
LOGIT_ROWS_MAX: Final = 64
"""Rows of logits held at once: 49152 x 4 bytes each."""


class NoPeers:
    """The peers of a device that is alone."""

    def call(self, node: NodeId, *_rest: Any) -> Any:
        raise PeerGone(f"{node} cannot be called: this measurement is of one device")


class Silent:
    """Listens to a request and keeps its tokens."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def token(self, token: int) -> bool:
        self.tokens.append(token)
        return False

    def done(self, request: Request, reason: str) -> None: ...

    def failed(self, request: Request, error: Exception) -> None:
        raise error


def open_local(store: Store, manifest: Manifest, threads: int, context_tokens: int) -> OpenModel:
    """The model on this device alone, one graph. Call once per process."""
    use_threads(threads)
    model = OpenModel(manifest, store, me=ME, peers=NoPeers(), context_tokens=context_tokens)
    model.hold_everything()
    return model


@dataclass(frozen=True, slots=True)
class Speed:
    """One bench run; medians over its repeats."""

    prompt_tokens: int
    gen_tokens: int
    threads: int
    load_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    weights_bytes: int
    kv_bytes: int
    resident_bytes: int


def bench(
    store: Store, name: str, prompt_tokens: int, gen_tokens: int, threads: int, repeats: int
) -> Speed:
    """Prefill of random tokens, then greedy decode that ignores end-of-turn, `repeats` times.

    Raises UnknownModel, BadRequest when the tokens do not fit the model's context.
    """
    manifest = store.manifest(name)
    need = prompt_tokens + gen_tokens
    if need > manifest.shape.context_max:
        raise BadRequest(
            f"{prompt_tokens} + {gen_tokens} tokens do not fit the context of "
            f"{manifest.shape.context_max}: ask for fewer."
        )
    started = time.perf_counter()
    model = open_local(store, manifest, threads, need)
    load_s = time.perf_counter() - started
    tokens = np.random.default_rng(0).integers(0, manifest.shape.vocab, prompt_tokens).tolist()
    runs = [_run(model, tokens, gen_tokens) for _ in range(repeats + 1)][1:]  # the first warms up
    cache_bytes = max(cache for *_times, cache in runs)
    return Speed(
        prompt_tokens=prompt_tokens,
        gen_tokens=gen_tokens,
        threads=threads,
        load_s=round(load_s, 3),
        prefill_tokens_per_s=round(prompt_tokens / median(run[0] for run in runs), 1),
        decode_tokens_per_s=round(gen_tokens / median(run[1] for run in runs), 1),
        weights_bytes=manifest.weights_bytes,
        kv_bytes=cache_bytes,
        resident_bytes=resident_bytes(),
    )


def _run(model: OpenModel, tokens: Sequence[int], gen_tokens: int) -> tuple[float, float, int]:
    """Seconds of prefill and of decode, and bytes of the KV cache."""
    request = Request("bench", list(tokens), gen_tokens + 1, Silent())
    model.scheduler.submit(request)
    cache_bytes = 0
    while model.scheduler.active:
        cache_bytes = max(cache_bytes, getattr(request.cache, "bytes", 0))
        model.scheduler.turn()
    return request.prefill_s, request.decode_s, cache_bytes


def logits_of(model: OpenModel, tokens: Sequence[int], rows: Sequence[int]) -> NDArray[np.float32]:
    """Logits (len(rows), V) of a fresh pass over `tokens`."""
    request = Request("logits", list(tokens), 0, Silent())
    return np.array(model.decoder.forward(model.trunk.new_cache(), tokens, rows, request))


def perplexity(
    model: OpenModel,
    tokens: Sequence[int],
    context: int,
    chunks: int,
    progress: Callable[[int, float], None],
) -> tuple[float, float, int]:
    """Perplexity as llama.cpp's llama-perplexity computes it: (perplexity, standard error, scored).

    Windows of `context` tokens one after the other; in each, the tokens of the second half but
    the first are scored, given everything before them in the window. `progress(chunk, so_far)`.
    Raises BadRequest when the text is shorter than the chunks asked for.
    """
    if len(tokens) < context * chunks or chunks < 1 or context < 4:
        raise BadRequest(
            f"The text has {len(tokens)} tokens, {chunks} chunks of {context} were asked for: "
            "ask for fewer, or give a longer text."
        )
    losses: list[float] = []
    first = context // 2
    for chunk in range(chunks):
        window = tokens[chunk * context : (chunk + 1) * context]
        losses += _losses(model, window, range(first, context - 1))
        progress(chunk + 1, float(np.exp(np.mean(losses))))
    mean, deviation = np.mean(losses), np.std(losses, ddof=1) / np.sqrt(len(losses))
    return float(np.exp(mean)), float(np.exp(mean) * deviation), len(losses)


def _losses(model: OpenModel, window: Sequence[int], rows: range) -> list[float]:
    """-log p of the token after each row."""
    cache = model.trunk.new_cache()
    request = Request("eval", list(window), 0, Silent())
    losses: list[float] = []
    at = 0
    while at < len(window):
        size = len(window) - at if at >= rows.start else rows.start
        size = min(size, LOGIT_ROWS_MAX) if at >= rows.start else size
        inside = [row - at for row in range(at, at + size) if row in rows]
        logits = model.decoder.forward(cache, window[at : at + size], inside or [0], request)
        for row, values in zip(inside, logits, strict=False):
            wide = values.astype(np.float64)
            top = wide.max()
            total = top + np.log(np.exp(wide - top).sum())
            losses.append(float(total - wide[window[at + row + 1]]))
        at += size
    return losses


def resident_bytes() -> int:
    """Resident set of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES
