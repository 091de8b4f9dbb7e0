"""`coeld bench`: how fast one device runs a model, measured in this process."""

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path

from coeld.model.store import Store, default_store


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "bench", help="measure one device", description="Measure one device, everything local."
    )
    parser.add_argument("model", help="a model of `coeld model list`")
    parser.add_argument("--prompt-tokens", type=positive, default=128, metavar="N")
    parser.add_argument("--gen-tokens", type=positive, default=64, metavar="N")
    parser.add_argument("--threads", type=positive, default=os.cpu_count() or 1, metavar="N")
    parser.add_argument("--repeats", type=positive, default=5, metavar="N", help="medians of these")
    parser.add_argument("--store", type=Path, default=None, metavar="DIR")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from coeld.engine import measure  # numpy and ONNX Runtime: only when measuring

    speed = measure.bench(
        Store(arguments.store or default_store()),
        arguments.model,
        arguments.prompt_tokens,
        arguments.gen_tokens,
        arguments.threads,
        arguments.repeats,
    )
    if arguments.json:
        print(json.dumps({"model": arguments.model, **asdict(speed)}))
        return 0
    print(f"{arguments.model}, {speed.threads} threads, median of {arguments.repeats}")
    print(f"  prefill {speed.prompt_tokens:5} tokens  {speed.prefill_tokens_per_s:8.1f} tok/s")
    print(f"  decode  {speed.gen_tokens:5} tokens  {speed.decode_tokens_per_s:8.1f} tok/s")
    print(
        f"  reads   {speed.token_bytes / 1e6:.1f} MB a token: {speed.bandwidth_share:.0%} of the "
        f"{speed.memory_mb_per_s / 1000:.1f} GB/s that memory gives"
    )
    print(f"  load    {speed.load_s:.2f} s")
    print(
        f"  memory  {speed.resident_bytes / 1e6:.0f} MB resident, of them "
        f"{speed.weights_bytes / 1e6:.0f} MB weights and {speed.kv_bytes / 1e6:.0f} MB KV cache"
    )
    for part in speed.parts:
        print(f"          {part.name}: {part.blobs} x {part.bytes / part.blobs / 1e6:.2f} MB")
    return 0


def positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)
