"""`coeld`: parse the command line, run one subcommand, turn errors into one line and a status.

Exit status: 0 done, 1 an error that is explained on stderr, 2 a wrong command line, 130 Ctrl-C.
Every subcommand is a file whose `add_parser` sets `run`; the file is imported when the command
line names it, so that the daemon stays small.
"""

import argparse
import errno
import importlib
import io
import os
import sys
from pathlib import Path
from typing import Final

from coeld import __version__
from coeld.errors import CoeldError

COMMANDS: Final = {
    "up": "coeld.ui.up_command",
    "ask": "coeld.ui.ask_command",
    "chat": "coeld.ui.chat_command",
    "status": "coeld.ui.status_command",
    "doctor": "coeld.ui.doctor_command",
    "config": "coeld.ui.config_command",
    "model": "coeld.ui.model_command",
    "plan": "coeld.ui.plan_command",
    "bench": "coeld.ui.bench_command",
    "eval": "coeld.ui.eval_command",
    "sim": "coeld.ui.sim_command",
}
HELP: Final = {
    "up": "run a device in the foreground",
    "ask": "ask one question, stream the answer",
    "chat": "talk, with memory of what was said",
    "status": "show devices, who owns what, links",
    "doctor": "check what is missing and say what to do",
    "config": "print agent.toml with every key explained",
    "model": "add, list and remove models",
    "plan": "will a model fit, how fast, what limits it",
    "bench": "measure one device",
    "eval": "measure a model's quality on a text",
    "sim": "simulate a swarm with faults",
}

UNWRITABLE: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Why a file takes no more."""


def parser_for(words: list[str]) -> argparse.ArgumentParser:
    """The parser, with arguments only for the subcommand that `words` names."""
    parser = argparse.ArgumentParser(
        prog="coeld",
        description="Turns the small computers you own into one machine that runs a language "
        "model none of them could run well alone.",
    )
    parser.add_argument("--version", action="version", version=f"coeld {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    named = next((word for word in words if word in COMMANDS), None)
    for name, module in COMMANDS.items():
        if name == named:
            importlib.import_module(module).add_parser(commands)
        else:
            commands.add_parser(name, help=HELP[name])
    return parser


def main(words: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    _mend_streams()
    words = sys.argv[1:] if words is None else words
    arguments = parser_for(words).parse_args(words)
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except CoeldError as exc:
        print(f"coeld: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except OSError as exc:
        return _without_output(exc)
    return status


def _mend_streams() -> None:
    """Standard streams that are closed lead nowhere; characters that their encoding lacks are
    written as escapes, and bytes that are none are read as U+FFFD."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115 - open to the end
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def _without_output(exc: OSError) -> int:
    """The exit status when what was to be written cannot be. Raises `exc` if it is another one."""
    read_on = not isinstance(exc, BrokenPipeError)  # `coeld config | head` is no error
    if read_on and exc.errno not in UNWRITABLE:
        raise exc
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python tries it again
    if read_on:
        advice = "Make room, or send the output elsewhere."
        print(f"coeld: writing failed: {exc.strerror}. {advice}", file=sys.stderr)
    return int(read_on)
