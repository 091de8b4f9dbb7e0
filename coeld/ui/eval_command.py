"""`coeld eval`: how good a model is after import, measured on a text."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from coeld.errors import BadRequest
from coeld.model.store import Store, default_store
from coeld.ui.bench_command import positive


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser("eval", help="measure a model's quality on a text")
    kinds = parser.add_subparsers(required=True, metavar="WHAT")
    perplexity = kinds.add_parser("perplexity", help="as llama.cpp's llama-perplexity computes it")
    perplexity.add_argument("model", help="a model of `coeld model list`")
    _add_common(perplexity)
    perplexity.set_defaults(run=run_perplexity)
    kl = kinds.add_parser("kl", help="how far predictions are from those of another model")
    kl.add_argument("model", help="a model of `coeld model list`")
    kl.add_argument("reference", help="the same one with more bits, best 32")
    kl.add_argument(
        "--narrow",
        type=_percent,
        default=0,
        metavar="PERCENT",
        help="of its layers held in fewer bits, as by devices that lack memory (0)",
    )
    _add_common(kl)
    kl.set_defaults(run=run_kl)


def _percent(text: str) -> int:
    value = positive(text)
    if value > 100:
        raise argparse.ArgumentTypeError("more than 100 %")
    return value


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="a text, UTF-8")
    parser.add_argument("--context", type=positive, default=512, metavar="TOKENS")
    parser.add_argument("--chunks", type=positive, default=24, metavar="N")
    parser.add_argument("--threads", type=positive, default=os.cpu_count() or 1, metavar="N")
    parser.add_argument("--store", type=Path, default=None, metavar="DIR")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run_perplexity(arguments: argparse.Namespace) -> int:
    from coeld.engine import measure  # numpy and ONNX Runtime: only when measuring

    text = _read(arguments.file)
    store = Store(arguments.store or default_store())
    manifest = store.manifest(arguments.model)
    if arguments.context > manifest.shape.context_max:
        raise BadRequest(f"--context: the model was trained for {manifest.shape.context_max}.")
    model = measure.open_local(store, manifest, arguments.threads, arguments.context)
    started = time.monotonic()
    value, error, scored = measure.perplexity(
        model,
        model.text.encode(text),
        arguments.context,
        arguments.chunks,
        _progress(arguments.json),
    )
    result = {
        "model": arguments.model,
        "perplexity": round(value, 4),
        "standard_error": round(error, 4),
        "context": arguments.context,
        "chunks": arguments.chunks,
        "tokens_scored": scored,
        "seconds": round(time.monotonic() - started, 1),
    }
    if arguments.json:
        print(json.dumps(result))
    else:
        print(f"perplexity {value:.4f} ± {error:.4f} over {scored} tokens, {result['seconds']} s")
    return 0


def run_kl(arguments: argparse.Namespace) -> int:
    from coeld.engine import measure

    text = _read(arguments.file)
    store = Store(arguments.store or default_store())
    names = (arguments.model, arguments.reference)
    model, reference = measure.open_two(
        store, names, arguments.threads, arguments.context, arguments.narrow
    )
    found = measure.compare(
        model,
        reference,
        model.text.encode(text),
        arguments.context,
        arguments.chunks,
        _progress(arguments.json),
    )
    if arguments.json:
        named = {"model": names[0], "reference": names[1], "narrow_percent": arguments.narrow}
        print(json.dumps(named | asdict(found)))
    else:
        print(
            f"KL {found.kl:.5f} ± {found.kl_error:.5f} nats per token, top-1 agreement "
            f"{100 * found.top1_agreement:.2f} %, perplexity {found.perplexity:.3f} against "
            f"{found.reference_perplexity:.3f}, over {found.tokens_scored} tokens"
        )
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise BadRequest(f"{path} cannot be read as UTF-8 text: {reason}.") from exc


def _progress(quiet: bool) -> Callable[[int, float], None]:
    def show(chunk: int, so_far: float) -> None:
        if not quiet:
            print(f"[{chunk}] {so_far:.4f}", file=sys.stderr, flush=True)

    return show
