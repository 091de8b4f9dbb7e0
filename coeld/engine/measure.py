"""What `coeld bench` and `coeld eval` measure: one device, in process, everything local.

Both go through the same OpenModel as the daemon's engine.
"""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coeld.datapath.pace import Paces
from coeld.datapath.request import Request
from coeld.engine.calibrate import memory_mb_per_s
from coeld.engine.open_model import OpenModel
from coeld.engine.sessions import PAGE_BYTES, use_threads
from coeld.errors import BadRequest, PeerGone
from coeld.ids import NodeId
from coeld.model.footprint import Part, footprint, token_bytes
from coeld.model.manifest import Manifest
from coeld.model.narrow import narrow_first
from coeld.model.store import Store

ME: Final = NodeId("0" * 16)
LOGIT_ROWS_MAX: Final = 64
"""Rows of logits held at once: 49152 x 4 bytes each."""


class NoPeers:
    """The peers of a device that is alone."""

    def __init__(self) -> None:
        self.paces = Paces()

    def call(self, node: NodeId, *_rest: Any) -> Any:
        raise PeerGone(f"{node} cannot be called: this measurement is of one device")

    span = call

    def ready(self, *_calls: Any) -> list[Any]:
        return []

    def send(self, *_calls: Any) -> None: ...
    def give_up(self, _call: Any) -> None: ...

    def another_way(self, node: NodeId) -> bool:
        return False

    def free(self, node: NodeId, number: int, line: int) -> None:
        """Nobody holds anything."""


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
    return _open(store, manifest, context_tokens)


def open_two(
    store: Store,
    names: tuple[str, str],
    threads: int,
    context_tokens: int,
    narrow_percent: int = 0,
) -> tuple[OpenModel, OpenModel]:
    """Two models to compare, the first with some of its layers held in fewer bits. Call once per
    process.

    Raises UnknownModel, BadRequest when they do not have the same tokens or no tokenizer.
    """
    one, two = (store.manifest(name) for name in names)
    if one.tokenizer is None or one.tokenizer != two.tokenizer:
        raise BadRequest(
            f"{names[0]} and {names[1]} cannot be compared: they need the same tokenizer, and one. "
            "Import both from the same source, with different --bits."
        )
    for manifest in (one, two):
        if context_tokens > manifest.shape.context_max:
            raise BadRequest(f"--context: {manifest.name} goes to {manifest.shape.context_max}.")
    use_threads(threads)
    narrow = narrow_first(one)[: one.shape.layers * narrow_percent // 100]
    return _open(store, one, context_tokens, narrow), _open(store, two, context_tokens)


def _open(
    store: Store, manifest: Manifest, context_tokens: int, narrow: Collection[int] = ()
) -> OpenModel:
    model = OpenModel(manifest, store, me=ME, peers=NoPeers(), context_tokens=context_tokens)
    model.hold_everything(narrow)
    return model


@dataclass(frozen=True, slots=True)
class Speed:
    """One bench run; medians over its repeats."""

    prompt_tokens: int
    gen_tokens: int
    threads: int
    load_s: float
    """From nothing to ready, blobs verified; warm if the files are in the page cache."""
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    token_bytes: int
    """Read per token of decode."""
    memory_mb_per_s: int
    """What as many threads read from memory in plain sums, measured right after."""
    bandwidth_share: float
    """token_bytes x decode speed / memory bandwidth."""
    weights_bytes: int
    kv_bytes: int
    resident_bytes: int
    parts: list[Part]
    """What the weights consist of."""


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
    decode = gen_tokens / median(run[1] for run in runs)
    read = token_bytes(manifest, prompt_tokens + gen_tokens // 2)
    resident = resident_bytes()
    memory = memory_mb_per_s(threads)
    return Speed(
        prompt_tokens=prompt_tokens,
        gen_tokens=gen_tokens,
        threads=threads,
        load_s=round(load_s, 3),
        prefill_tokens_per_s=round(prompt_tokens / median(run[0] for run in runs), 1),
        decode_tokens_per_s=round(decode, 1),
        token_bytes=read,
        memory_mb_per_s=memory,
        bandwidth_share=round(read * decode / memory / 1e6, 3),
        weights_bytes=manifest.weights_bytes,
        kv_bytes=cache_bytes,
        resident_bytes=resident,
        parts=footprint(manifest),
    )


def _run(model: OpenModel, tokens: Sequence[int], gen_tokens: int) -> tuple[float, float, int]:
    """Seconds of prefill and of decode, and bytes of the KV cache."""
    request = Request("bench", list(tokens), gen_tokens + 1, Silent())
    model.scheduler.submit(request)
    cache_bytes = 0
    while model.scheduler.active:
        cache_bytes = max(cache_bytes, request.journey.bytes if request.journey else 0)
        model.scheduler.turn()
    return request.prefill_s, request.decode_s, cache_bytes


def logits_of(model: OpenModel, tokens: Sequence[int], rows: Sequence[int]) -> NDArray[np.float32]:
    """Logits (len(rows), V) of a fresh pass over `tokens`."""
    request = Request("logits", list(tokens), 0, Silent())
    return np.array(model.decoder.forward(model.decoder.depart(), tokens, rows, request))


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
    losses: list[float] = []
    for chunk, window in enumerate(_windows(tokens, context, chunks)):
        for row, logits in _scored(model, window, context // 2):
            losses.append(-float(_log_softmax(logits)[window[row + 1]]))
        progress(chunk + 1, float(np.exp(np.mean(losses))))
    mean, deviation = np.mean(losses), np.std(losses, ddof=1) / np.sqrt(len(losses))
    return float(np.exp(mean)), float(np.exp(mean) * deviation), len(losses)


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far a model's predictions are from a reference's."""

    kl: float
    """Mean Kullback-Leibler divergence from the reference, nats per token."""
    kl_error: float
    """Its standard error."""
    top1_agreement: float
    """Share of tokens for which both think the same one most likely."""
    perplexity: float
    reference_perplexity: float
    tokens_scored: int


def compare(
    model: OpenModel,
    reference: OpenModel,
    tokens: Sequence[int],
    context: int,
    chunks: int,
    progress: Callable[[int, float], None],
) -> Comparison:
    """Run both over the same windows and tokens that `perplexity` scores.

    Raises BadRequest when the text is shorter than the chunks asked for.
    """
    found: list[tuple[float, bool, float, float]] = []
    for chunk, window in enumerate(_windows(tokens, context, chunks)):
        first = context // 2
        both = zip(_scored(model, window, first), _scored(reference, window, first), strict=True)
        for (row, logits), (_, wanted) in both:
            ours, exact, token = _log_softmax(logits), _log_softmax(wanted), window[row + 1]
            kl = float(np.sum(np.exp(exact) * (exact - ours)))
            same = bool(ours.argmax() == exact.argmax())
            found.append((kl, same, -float(ours[token]), -float(exact[token])))
        progress(chunk + 1, float(np.mean([kl for kl, *_ in found])))
    columns = np.array(found, np.float64)
    means = columns.mean(axis=0)
    return Comparison(
        kl=float(means[0]),
        kl_error=float(columns[:, 0].std(ddof=1) / np.sqrt(len(found))),
        top1_agreement=float(means[1]),
        perplexity=float(np.exp(means[2])),
        reference_perplexity=float(np.exp(means[3])),
        tokens_scored=len(found),
    )


def _windows(tokens: Sequence[int], context: int, chunks: int) -> list[Sequence[int]]:
    if len(tokens) < context * chunks or chunks < 1 or context < 4:
        raise BadRequest(
            f"The text has {len(tokens)} tokens, {chunks} chunks of {context} were asked for: "
            "ask for fewer, or give a longer text."
        )
    return [tokens[chunk * context : (chunk + 1) * context] for chunk in range(chunks)]


def _scored(
    model: OpenModel, window: Sequence[int], first: int
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """(row, its logits (V,)) for rows `first` to the last but one of a window."""
    journey = model.decoder.depart()
    request = Request("eval", list(window), 0, Silent())
    model.decoder.forward(journey, window[:first], [0], request)
    for at in range(first, len(window) - 1, LOGIT_ROWS_MAX):
        some = window[at : min(at + LOGIT_ROWS_MAX, len(window) - 1)]
        logits = model.decoder.forward(journey, some, list(range(len(some))), request)
        yield from enumerate(np.array(logits), at)


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max()
    wide -= np.log(np.exp(wide).sum())
    return wide


def resident_bytes() -> int:
    """Resident set of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES
