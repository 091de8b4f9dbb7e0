"""`coeld status`: the swarm as this device sees it."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from coeld.ui.client import add_socket_options, get_json, socket_of

if TYPE_CHECKING:
    from rich.table import Table


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("status", help="show devices, who owns what, links")
    add_socket_options(parser)
    parser.add_argument("--json", action="store_true", help="everything, for programs")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    status = get_json(socket_of(arguments), "/status")
    if arguments.json:
        print(json.dumps(status, indent=1))
        return 0
    from rich.console import Console

    console = Console(highlight=False)
    console.print(headline(status))
    console.print(devices(status))
    console.print(links(status))
    return 0


def headline(status: dict[str, Any]) -> str:
    """Model, coverage and epoch in a line or two."""
    node, engine = status["node"], status["engine"]
    if not node["model"]:
        return f"no model: {engine['trouble']}"
    routes = node["routes"]
    text = (
        f"{node['model']['name']}: {routes['covered']} of {routes['total']} experts are served, "
        f"epoch {routes['epoch']}"
    )
    if routes["missing_bytes"]:
        text += f"\n{routes['missing_bytes']:,} bytes of memory are missing in the swarm"
    if engine["trouble"]:
        text += f"\n{engine['trouble']}"
    return text


def devices(status: dict[str, Any]) -> "Table":
    from rich.table import Table

    node = status["node"]
    total = node["routes"]["total"]
    experts = node["model"]["experts"] if node["model"] else 0
    table = Table(title="devices", title_justify="left")
    for name in (
        "device",
        "state",
        "memory",
        "kernels",
        "load",
        "owns",
        "layers, or layer: experts",
    ):
        table.add_column(name, overflow="fold")
    for member in node["members"]:
        mine = " (this one)" if member["node"] == node["me"] else ""
        runs = node["owners"].get(member["node"], [])
        table.add_row(
            f"{member['name'] or '?'}{mine}\n{member['node']}",
            member["status"] + ("" if member["engine"] else ", no engine"),
            f"{member['memory_budget_bytes'] / 1e6:,.0f} MB",
            f"{member['kernel_mb_per_s'] / 1e3:.1f} GB/s",
            f"{member['cpu_load_percent']} %",
            f"{member['serving']} of {total}" if total else "",
            layers_owned(runs, experts),
        )
    return table


def layers_owned(runs: list[list[int]], experts: int) -> str:
    """[[layer, first, count], …] as "0-2 5, 7: 0-3 6": whole layers first, then parts of layers."""
    whole: list[int] = []
    parts: dict[int, list[str]] = {}
    for layer, first, count in runs:
        if count == experts:
            whole.append(layer)
        else:
            parts.setdefault(layer, []).append(_span(first, first + count - 1))
    texts = [f"{layer}: {' '.join(spans)}" for layer, spans in sorted(parts.items())]
    return ", ".join([" ".join(_spans(whole)), *texts] if whole else texts)


def _spans(numbers: list[int]) -> list[str]:
    """Consecutive numbers joined: [0, 1, 2, 5] as ["0-2", "5"]."""
    ends: list[list[int]] = []
    for number in sorted(numbers):
        if ends and ends[-1][1] == number - 1:
            ends[-1][1] = number
        else:
            ends.append([number, number])
    return [_span(first, last) for first, last in ends]


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def links(status: dict[str, Any]) -> "Table":
    from rich.table import Table

    bus = status["bus"]
    peers = status["engine"]["stats"].get("peers", {})
    names = {member["node"]: member["name"] for member in status["node"]["members"]}
    table = Table(title=f"links ({bus['topology']} brokers)", title_justify="left")
    for name in ("to", "state", "messages", "expert calls", "round trip"):
        table.add_column(name)
    for link in bus["links"]:
        peer = peers.get(link["node"], {})
        rtt_us = peer.get("rtt_us_p50")
        table.add_row(
            f"{names.get(link['node']) or link['node'] or '?'} {link['host']}:{link['port']}",
            "up" if link["up"] else "down",
            f"{link['messages']:,}",
            f"{peer.get('calls', 0):,}",
            f"{rtt_us / 1000:.2f} ms" if rtt_us else "",
        )
    return table
