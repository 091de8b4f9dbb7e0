"""`coeld doctor`: what works, what does not, and what to do about it."""

import argparse
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from coeld.config import load
from coeld.errors import CoeldError
from coeld.host.places import places
from coeld.model.store import Store
from coeld.ui.client import add_socket_options, get_json, socket_of

PRESSED_PERCENT: Final = 10
"""From here on the budget shrinks as well (coeld.perception.resources)."""
DISK_FREE_MIN: Final = 200_000_000


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
    if trouble := status["engine"]["load_trouble"]:
        yield Check("experts", "some could not be loaded", trouble)
    yield from machine(status["sensors"])
    yield _swarm(status["node"])


def _model(store: Store) -> Check:
    try:
        names = sorted({manifest.name for manifest in store.models()})
    except CoeldError as exc:
        return Check("model", "damaged", str(exc))
    if not names:
        command = f"coeld model add smollm2-135m-instruct --store {shlex.quote(str(store.root))}"
        return Check("model", f"none in {store.root}", f"Install one: {command}")
    return Check("model", ", ".join(names))


def machine(sensors: dict[str, Any]) -> Iterator[Check]:
    """Memory, heat, battery and disk, where this machine has them."""
    memory, battery, disk = sensors["memory"], sensors["battery"], sensors["disk"]
    found = f"{memory['available_bytes'] / 1e6:,.0f} of {memory['total_bytes'] / 1e6:,.0f} MB free"
    advice = ""
    if memory["pressure_percent"] >= PRESSED_PERCENT:
        found += f", programs wait for it {memory['pressure_percent']} % of the time"
        advice = "More memory is wanted than there is: end something, or lower memory.budget_mb."
    yield Check("memory", found, advice)
    yield from _heat(sensors["heat"])
    if battery:
        low = "Plug it in: until then it takes only parts that no other device can hold."
        yield Check("battery", f"{battery['percent']} %", low if battery["spared"] else "")
    speed = f", reads {disk['read_mb_per_s']:,} MB/s" if disk["read_mb_per_s"] else ""
    full = disk["free_bytes"] < DISK_FREE_MIN
    advice = "The store's disk is nearly full: no weights can be fetched." if full else ""
    yield Check("disk", f"{disk['free_bytes'] / 1e9:,.1f} GB free{speed}", advice)
    for gpu in sensors["gpus"]:
        yield Check("gpu", f"{gpu['name']}: seen, but coeld computes on the CPU")


def _heat(heat: dict[str, Any]) -> Iterator[Check]:
    parts = []
    if heat["celsius"] is not None:
        parts.append(f"{heat['celsius']} °C")
    if heat["limit_celsius"]:
        parts.append(f"slows down at {heat['limit_celsius']}")
    if heat["clock_full_mhz"]:
        parts.append(f"clock {heat['clock_mhz']:,} of {heat['clock_full_mhz']:,} MHz")
    advice = ""
    if "under-voltage" in heat["complaints"]:
        advice = "The power supply is too weak: use the one made for this device."
    elif heat["complaints"]:
        advice = f"It is held back ({', '.join(heat['complaints'])}): cool it better."
    if parts or advice:
        yield Check("heat", ", ".join(parts) or "not measured", advice)


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
