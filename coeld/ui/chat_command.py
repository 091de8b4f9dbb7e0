"""`coeld chat`: a conversation in the terminal. The whole history is sent each time.

What the context has no room for any more is forgotten, the oldest first.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from coeld.errors import BadRequest, CoeldError
from coeld.ui.ask_command import add_sampling_options, sampling, show
from coeld.ui.client import add_socket_options, patiently, socket_of, stream

Messages = list[dict[str, str]]


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("chat", help="talk, with memory of what was said")
    add_socket_options(parser)
    add_sampling_options(parser)
    parser.add_argument("--system", help="who the model shall be")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() line editing and history

    socket = socket_of(arguments)
    messages: Messages = []
    if arguments.system:
        messages.append({"role": "system", "content": arguments.system})
    print("Ctrl-C stops an answer, Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            text = input("> ")
        except EOFError:
            print()
            return 0
        if not text.strip():
            continue
        messages.append({"role": "user", "content": text})
        pieces: list[str] = []
        try:
            show(_fitting(messages, arguments, socket), pieces, socket, arguments.max_tokens)
        except KeyboardInterrupt:
            pass  # what was said stays said
        except CoeldError as exc:
            print(f"coeld: {exc}", file=sys.stderr)
            if not pieces:
                messages.pop()
                continue
        messages.append({"role": "assistant", "content": "".join(pieces)})


def _fitting(
    messages: Messages, arguments: argparse.Namespace, socket: Path
) -> Iterator[dict[str, Any]]:
    """The answer's chunks. Takes as many of the oldest turns out of `messages` as the context has
    no room for; raises CoeldError, and takes none out, when it has none for the last one alone."""
    kept = list(messages)
    while True:
        options = {"messages": kept, "stream_options": {"include_usage": True}}
        once = partial(stream, socket, "/v1/chat/completions", sampling(arguments) | options)
        chunks = patiently(once, arguments.wait)
        try:
            first = next(chunks)
            break
        except BadRequest as exc:
            if exc.code != "context_length_exceeded" or not _forget_a_turn(kept):
                raise
    if forgotten := len(messages) - len(kept):
        text = f"the context is full: the oldest {forgotten} messages are forgotten."
        print(f"coeld: {text}", file=sys.stderr)
        messages[:] = kept
    yield first
    yield from chunks


def _forget_a_turn(messages: Messages) -> bool:
    """Take the oldest question and its answer out; False if there is but the last one."""
    asked = [at for at, message in enumerate(messages) if message["role"] == "user"]
    if len(asked) < 2:
        return False
    del messages[asked[0] : asked[1]]
    return True
