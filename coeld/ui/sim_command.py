"""`coeld sim`: a whole swarm in virtual time, with the decisions of the daemon and any faults."""

import argparse
import contextlib
import gc
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coeld.errors import CoeldError

if TYPE_CHECKING:
    from rich.table import Table

    from coeld.sim.scenario import Outcome

NODES_MAX = 2000
COLD_NODES_MAX = 200
"""Forming takes time with the square of the size: more begin acquainted."""
ROWS = (
    ("form_s", "to form: everybody knows everybody", "{} s"),
    ("settle_s", "until no expert moved, and views were equal", "{} s"),
    ("bytes_per_node_s", "sent at rest, per device", "{:,} bytes/s"),
    ("bytes_per_node_s_max", "the same, the busiest device", "{:,} bytes/s"),
    ("rounds_to_all", "gossip rounds until news had reached all", "{}"),
    ("news_s_max", "the slowest news took", "{} s"),
    ("crashes", "crashes", "{}"),
    ("detect_s_p50", "a silent crash was known everywhere, p50", "{} s"),
    ("detect_s_p99", "the same, p99", "{} s"),
    ("detect_reset_s_p50", "a crash that reset its links, p50", "{} s"),
    ("false_suspects", "accusations of devices that lived", "{}"),
    ("false_dead", "devices that lived, declared dead", "{}"),
    ("moves", "experts loaded during the trouble", "{}"),
    ("heal_s", "to heal: same view, everything served", "{} s"),
)


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "sim",
        help="simulate a swarm with faults",
        description="Simulate a swarm in virtual time with the code of the daemon: it forms, "
        "rests, hears news, suffers, heals. The same seed gives the same run. Exit status 1 if a "
        "promise was broken.",
    )
    parser.add_argument("--nodes", type=count, default=100, metavar="N", help="devices (100)")
    parser.add_argument("--seed", type=int, default=1, metavar="S")
    parser.add_argument(
        "--faults",
        default="",
        metavar="LIST",
        help="name=number,…: loss, dup, reorder (shares of messages), delay (s), crash (per "
        "minute), partition, asym, slow (shares of devices), stall (s), skew (share)",
    )
    parser.add_argument(
        "--minutes", type=float, default=1.0, metavar="M", help="how long the trouble lasts (1)"
    )
    parser.add_argument(
        "--engines", type=int, default=None, metavar="E", help="devices that run a model (16)"
    )
    parser.add_argument(
        "--cold",
        action="store_true",
        help=f"let them meet one by one, as up to {COLD_NODES_MAX} devices always do (slow)",
    )
    parser.add_argument("--json", action="store_true", help="the figures as one JSON object")
    parser.add_argument("--picture", type=Path, metavar="FILE.svg", help="draw the timeline")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from coeld.sim.faults import Faults
    from coeld.sim.picture import draw
    from coeld.sim.scenario import Plan, simulate

    plan = Plan(
        arguments.nodes,
        arguments.seed,
        Faults.parse(arguments.faults),
        min(max(arguments.minutes, 0.05), 24 * 60),
        None if arguments.engines is None else max(0, min(arguments.engines, arguments.nodes)),
        acquainted=arguments.nodes > COLD_NODES_MAX and not arguments.cold,
    )
    began = time.monotonic()
    show = sys.stderr.isatty() and not arguments.json
    with without_collector():
        outcome = simulate(
            plan, lambda text: print(f"  {text} …", file=sys.stderr) if show else None
        )
    if arguments.picture:
        title = (
            f"coeld sim --nodes {plan.nodes} --seed {plan.seed} --faults {arguments.faults or '-'}"
        )
        text = draw(title, outcome.samples, outcome.marks, outcome.crashes)
        try:
            arguments.picture.write_text(text, encoding="utf-8")
        except OSError as exc:
            raise CoeldError(
                f"the picture cannot be written to {arguments.picture}: {exc}"
            ) from exc
    if arguments.json:
        print(json.dumps(outcome.figures))
    else:
        report(outcome, time.monotonic() - began)
    return 1 if outcome.violations else 0


def report(outcome: "Outcome", wall_s: float) -> None:
    """For people."""
    from rich.console import Console

    figures = outcome.figures
    console = Console(highlight=False)
    console.print(
        f"{figures['nodes']} devices, seed {figures['seed']}: {figures['virtual_s']} virtual "
        f"seconds in {wall_s:.1f} s"
    )
    console.print(table(figures))
    for violation in outcome.violations:
        console.print(f"[bold red]broken promise[/]: {violation}", markup=True)
    if not outcome.violations:
        console.print("Every promise was kept: budgets, routes, coverage, equal views, no storm.")
    console.print(f"trace {figures['trace_sha256']}", soft_wrap=True)


def table(figures: dict[str, Any]) -> "Table":
    from rich import box
    from rich.table import Table

    found = Table("what", "figure", box=box.SIMPLE_HEAD)
    found.columns[1].justify = "right"
    for key, name, form in ROWS:
        value = figures.get(key)
        found.add_row(name, "-" if value is None else form.format(value))
    return found


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """A thousand nodes make millions of objects and hardly a cycle to collect: it took half the
    time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 2 <= int(text) <= NODES_MAX):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 2 to {NODES_MAX}")
    return int(text)
