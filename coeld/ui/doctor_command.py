"""`coeld doctor`: what works, what does not, and what to do about it."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from coeld.config import load
from coeld.errors import CoeldError
from coeld.host.places import places
from coeld.model.store import Store
from coeld.ui.client import add_socket_options, get_json, socket_of


class Check(NamedTuple):
    """One line of the report. `advice` is empty when all is well."""

    name: str
    found: str
    advice: str = ""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("doctor", help="check what is missing and say what to do")
    add_socket_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    failed = 0
    for check in checks(arguments):
        print(f"{'--' if check.advice else 'ok'} {check.name}: {check.found}")
        if check.advice:
            failed += 1
            print(f"   {check.advice}")
    return 1 if failed else 0


def checks(arguments: argparse.Namespace) -> Iterator[Check]:
    """Each check in the order in which things depend on each other."""
    version = ".".join(map(str, sys.version_info[:3]))
    old = sys.version_info < (3, 11)
    yield Check("python", version, "coeld needs Python 3.11 or newer." if old else "")
    try:
        config = load(arguments.config)
        yield Check("configuration", "valid")
        socket = socket_of(arguments)
    except CoeldError as exc:
        yield Check("configuration", "wrong", str(exc))
        return
    try:
        status = get_json(socket, "/status")
    except CoeldError as exc:
        yield _model(Store(places(config).store_dir))
        yield Check("daemon", "does not answer", str(exc))
        return
    yield _model(Store(Path(status["agent"]["store_dir"])))
    yield Check("daemon", f"answers on {socket}")
    trouble = status["engine"]["trouble"]
    yield Check("engine", "not ready" if trouble else f"has {status['engine']['model']}", trouble)
    yield _swarm(status["node"])


def _model(store: Store) -> Check:
    try:
        names = [manifest.name for manifest in store.models()]
    except CoeldError as exc:
        return Check("model", "damaged", str(exc))
    if not names:
        advice = "Install one: coeld model add smollm2-135m-instruct"
        return Check("model", f"none in {store.root}", advice)
    return Check("model", ", ".join(names))


def _swarm(node: dict[str, Any]) -> Check:
    routes, members = node["routes"], node["members"]
    alive = sum(member["status"] == "alive" for member in members)
    found = f"{alive} devices, {routes['covered']} of {routes['total']} experts served"
    if routes["missing_bytes"]:
        megabytes = routes["missing_bytes"] / 1e6
        return Check(
            "swarm",
            found,
            f"{megabytes:,.1f} MB of memory are missing: raise memory.budget_mb or add a device.",
        )
    if routes["covered"] < routes["total"]:
        return Check("swarm", found, "Some experts are still being loaded: look again soon.")
    return Check("swarm", found)
