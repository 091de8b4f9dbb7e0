"""`coeld eval`: how good a model is after import, measured on a text."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from coeld.errors import BadRequest
from coeld.model.store import Store, default_store
from coeld.ui.bench_command import positive


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser("eval", help="measure a model's quality on a text")
    kinds = parser.add_subparsers(required=True, metavar="WHAT")
    perplexity = kinds.add_parser("perplexity", help="as llama.cpp's llama-perplexity computes it")
    perplexity.add_argument("model", help="a model of `coeld model list`")
    perplexity.add_argument("file", type=Path, help="a text, UTF-8")
    perplexity.add_argument("--context", type=positive, default=512, metavar="TOKENS")
    perplexity.add_argument("--chunks", type=positive, default=24, metavar="N")
    perplexity.add_argument("--threads", type=positive, default=os.cpu_count() or 1, metavar="N")
    perplexity.add_argument("--store", type=Path, default=None, metavar="DIR")
    perplexity.add_argument("--json", action="store_true", help="print one JSON object")
    perplexity.set_defaults(run=run_perplexity)


def run_perplexity(arguments: argparse.Namespace) -> int:
    from coeld.engine import measure  # numpy and ONNX Runtime: only when measuring

    try:
        text = arguments.file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise BadRequest(f"{arguments.file} cannot be read as UTF-8 text: {reason}.") from exc
    store = Store(arguments.store or default_store())
    manifest = store.manifest(arguments.model)
    if arguments.context > manifest.shape.context_max:
        raise BadRequest(f"--context: the model was trained for {manifest.shape.context_max}.")
    model = measure.open_local(store, manifest, arguments.threads, arguments.context)
    tokens = model.text.encode(text)
    started = time.monotonic()
    value, error, scored = measure.perplexity(
        model, tokens, arguments.context, arguments.chunks, _progress(arguments.json)
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


def _progress(quiet: bool) -> Callable[[int, float], None]:
    def show(chunk: int, so_far: float) -> None:
        if not quiet:
            print(f"[{chunk}] {so_far:.4f}", file=sys.stderr, flush=True)

    return show
