"""`coeld up`: run a device in the foreground."""

import argparse
from pathlib import Path
from typing import Any

from coeld.config import load


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("up", help="run a device in the foreground")
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="default: ./agent.toml, then /etc/coeld/agent.toml, then what `coeld config` shows",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from coeld.agent import up

    up(load(arguments.config))
    return 0
