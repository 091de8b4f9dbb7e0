"""`coeld config`: every key of agent.toml, explained, at its default."""

import argparse
from typing import Any

from coeld.config import example


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("config", help="print agent.toml with every key explained")
    parser.set_defaults(run=run)


def run(_: argparse.Namespace) -> int:
    print(example(), end="")
    return 0
