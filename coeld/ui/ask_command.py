"""`coeld ask`: one question, its answer streamed to the terminal."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coeld.errors import BadRequest, CoeldError
from coeld.ui.client import add_socket_options, get_json, patiently, socket_of, stream


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("ask", help="ask one question, stream the answer")
    parser.add_argument("text", help='what to ask; "-" reads it from standard input')
    add_socket_options(parser)
    add_sampling_options(parser)
    parser.add_argument("--system", help="who the model shall be")
    parser.add_argument("--raw", action="store_true", help="continue the text, without a template")
    parser.add_argument("--stats", action="store_true", help="say how fast it was, on stderr")
    parser.set_defaults(run=run)


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="must be the one that is served")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="default: until it has ended")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 (default): always the same"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="the same draws again")
    parser.add_argument(
        "--kl-budget",
        type=float,
        metavar="NATS",
        help="what the answer may lose for speed on slow links, per token; default: as configured",
    )
    parser.add_argument(
        "--wait",
        type=float,
        default=15.0,
        metavar="S",
        help="seconds to wait for a swarm that is still organising itself (default: 15)",
    )


def sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("model", "max_tokens", "temperature", "seed")
    chosen = {name: getattr(arguments, name) for name in names}
    if arguments.kl_budget is not None:
        chosen["x_coeld"] = {"kl_budget": arguments.kl_budget}
    return {name: value for name, value in chosen.items() if value is not None}


def run(arguments: argparse.Namespace) -> int:
    text = sys.stdin.read() if arguments.text == "-" else arguments.text
    if not text.strip():
        raise BadRequest("There is no question.")
    body = sampling(arguments) | {"stream_options": {"include_usage": True}}
    if arguments.raw:
        url = "/v1/completions"
        body["prompt"] = text
    else:
        url = "/v1/chat/completions"
        system = [{"role": "system", "content": arguments.system}] if arguments.system else []
        body["messages"] = [*system, {"role": "user", "content": text}]
    socket = socket_of(arguments)
    chunks = patiently(lambda: stream(socket, url, body), arguments.wait)
    show(chunks, [], socket, arguments.max_tokens, arguments.stats)
    return 0


def show(
    chunks: Iterator[dict[str, Any]],
    pieces: list[str],
    socket: Path,
    max_tokens: int | None,
    stats: bool = False,
) -> None:
    """Print an answer as it comes, adding it to `pieces`, then what is to be said about it."""
    usage: dict[str, Any] = {}
    reason = None
    try:
        for chunk in chunks:
            usage = chunk.get("usage", usage)
            for choice in chunk["choices"]:
                reason = choice["finish_reason"]
                piece = choice.get("text") or choice.get("delta", {}).get("content") or ""
                pieces.append(piece)
                print(piece, end="", flush=True)
    finally:
        if pieces:
            print(flush=True)
    if reason == "length" and usage.get("completion_tokens") != max_tokens:
        print(
            "coeld: the context is full: the answer ends here, unfinished. Ask for less, or raise "
            "engine.context_tokens of the daemon.",
            file=sys.stderr,
        )
    if usage and (stats or sys.stderr.isatty()):
        line = _summary(usage, socket)
        print(f"\x1b[2m{line}\x1b[0m" if sys.stderr.isatty() else line, file=sys.stderr)


def _summary(usage: dict[str, Any], socket: Path) -> str:
    ours = usage.get("x_coeld", {})
    speed = ours.get("decode_tokens_per_s")
    words = [f"{usage['completion_tokens']} tokens"]
    if speed:
        words.append(f"{speed:.1f} tok/s")
    if ours.get("stalls"):
        words.append(f"waited {sum(ours['stalls']):.1f} s for lost experts")
    wire = ours.get("wire", {})
    if wire.get("rows_bytes", 0) < wire.get("float32_bytes", 0):
        share = wire["rows_bytes"] / wire["float32_bytes"]
        words.append(f"rows at {share:.0%} of their size for {wire['kl_estimate']:.3f} nats")
    narrow = ours.get("narrow", {})
    if narrow.get("experts"):
        words.append(f"{narrow['experts']} of {narrow['of']} experts in {narrow['bits']} bits")
    try:
        owners = get_json(socket, "/status")["node"]["owners"]
        count = sum(1 for lots in owners.values() if lots)
        words.append(f"answered by {count} device{'s' if count != 1 else ''}")
    except (CoeldError, KeyError):
        pass  # the answer is there; who gave it is decoration
    return ", ".join(words)
