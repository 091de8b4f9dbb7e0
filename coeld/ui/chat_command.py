"""`coeld chat`: a conversation in the terminal. The whole history is sent each time."""

import argparse
import contextlib
import sys
from functools import partial
from typing import Any

from coeld.errors import CoeldError
from coeld.ui.ask_command import add_sampling_options, sampling, show
from coeld.ui.client import add_socket_options, patiently, socket_of, stream


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
    messages: list[dict[str, str]] = []
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
        options = {"messages": messages, "stream_options": {"include_usage": True}}
        body = sampling(arguments) | options
        try:
            once = partial(stream, socket, "/v1/chat/completions", body)
            answer = show(patiently(once, arguments.wait), socket, stats=False)
        except KeyboardInterrupt:
            messages.pop()
            continue
        except CoeldError as exc:
            print(f"coeld: {exc}", file=sys.stderr)
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answer})
