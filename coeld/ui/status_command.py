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
    console.print(f"this device: {this_device(status)}")
    if text := token(status):
        console.print(text)
    console.print(devices(status))
    if text := asked(status):
        console.print(text)
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
    if routes["narrow"]:
        text += (
            f"\nfor want of memory {routes['narrow']} of them are held in fewer bits than stored: "
            "answers are worse"
        )
    if routes["missing_bytes"]:
        text += f"\n{routes['missing_bytes']:,} bytes of memory are missing in the swarm"
    if engine["trouble"]:
        text += f"\n{engine['trouble']}"
    if engine["load_trouble"]:
        text += f"\nthis device could not load all its experts: {engine['load_trouble']}"
    return text + rollout(status)


def rollout(status: dict[str, Any]) -> str:
    """Who has which version of the model, a line each, while not all have the same."""
    node = status["node"]
    told = {m["name"] or m["node"]: m["versions"] for m in node["members"]}
    same = {
        name: versions
        for name, versions in told.items()
        if versions and versions["model"] == node["model"]["name"]
    }
    if len({n for v in same.values() for n in (v["open"], v["next"]) if n}) < 2:
        return ""
    text = "".join(f"\n  {name}: {_version(versions)}" for name, versions in same.items())
    trouble = status["weights"]["next"]["trouble"]
    return f"\na new version is being rolled out:{text}" + (f"\n{trouble}" if trouble else "")


def _version(versions: dict[str, Any]) -> str:
    text = f"version {versions['open']}"
    if versions["requests"] != "serving":
        text += ", ends its answers" if versions["requests"] == "draining" else ", answers ended"
    if versions["next"]:
        progress = {
            "fetching": "is being fetched",
            "ready": "is on disk",
            "failed": "cannot be had",
        }[versions["progress"]]
        text += f"; version {versions['next']} {progress}"
    return text


def this_device(status: dict[str, Any]) -> str:
    """What its sensors say, in a line: only what this machine has."""
    sensors, kernels = status["sensors"], status["engine"]["kernels"]
    memory, heat, battery = sensors["memory"], sensors["heat"], sensors["battery"]
    parts = [f"{memory['available_bytes'] / 1e6:,.0f} MB of memory available"]
    if memory["pressure_percent"]:
        parts[0] += f" (pressure {memory['pressure_percent']} %)"
    if heat["celsius"] is not None:
        parts.append(f"{heat['celsius']} °C")
    if heat["clock_mhz"] < heat["clock_full_mhz"]:
        parts.append(f"clock {heat['clock_mhz']:,} of {heat['clock_full_mhz']:,} MHz")
    parts += heat["complaints"]
    if battery:
        how = ", spared" if battery["spared"] else "" if battery["discharging"] else ", plugged in"
        parts.append(f"battery {battery['percent']} %{how}")
    disk = sensors["disk"]
    speed = f", reads {disk['read_mb_per_s']:,} MB/s" if disk["read_mb_per_s"] else ""
    parts.append(f"disk {disk['free_bytes'] / 1e9:,.1f} GB free{speed}")
    for kind in ("dense", "experts"):
        if kind in kernels:
            parts.append(f"{kind} kernels {kernels[kind]['1']['gb_per_s']:.1f} GB/s")
    parts += [f"{gpu['name']} (not used)" for gpu in sensors["gpus"]]
    return ", ".join(parts)


def token(status: dict[str, Any]) -> str:
    """What a token takes here, and what the cost model says that it should."""
    found = status["engine"].get("token")
    if not found or not found["predicted_us"]:
        return ""
    text = f"a token should take {found['predicted_us'] / 1000:.1f} ms here"
    if found["measured_us"]:
        text += f", and took {found['measured_us'] / 1000:.1f} ms"
        text += f" (the prediction is {found['error_percent']:+.0f} % off)"
    return text


def devices(status: dict[str, Any]) -> "Table":
    """A line per device, within 80 columns unless it owns very scattered experts."""
    node, model = status["node"], status["node"]["model"]
    names = [member["name"] for member in node["members"]]
    table = table_of("devices", "device", "state", "memory", "speed", "load", "owns", "layers")
    for member in node["members"]:
        name = member["name"]
        if not name or names.count(name) > 1:  # then only the key tells them apart
            name = f"{name} {member['node']}".lstrip()
        runs = node["owners"].get(member["node"], [])
        table.add_row(
            name + (" *" if member["node"] == node["me"] else ""),
            member["status"] + ("" if member["engine"] else ", no engine"),
            _memory(member, model),
            f"{member['kernel_mb_per_s'] / 1e3:.1f} GB/s",
            f"{member['cpu_load_percent']} %",
            str(member["serving"]) if model else "",
            layers_owned(runs, model["experts"]) if model else "",
        )
    table.caption = "* this device   layers: 24[3-7] = experts 3 to 7 of layer 24"
    return table


def asked(status: dict[str, Any]) -> str:
    """Who is asked for how much, in a line for each that is; rates are told in powers of two."""
    lines = []
    for member in status["node"]["members"]:
        rates = member["asked_per_min"]
        if rates and any(rates.values()):
            lines.append(
                f"{member['name'] or member['node']} is asked, per minute, about"
                f" {rates['requests']:.2g} requests with {rates['prompt_tokens']:,.0f} tokens,"
                f" and answers {rates['tokens']:,.0f}"
            )
    return "\n".join(lines)


def _memory(member: dict[str, Any], model: dict[str, Any] | None) -> str:
    """Weights held, of the budget."""
    budget = f"{member['memory_budget_bytes'] / 1e6:,.0f} MB"
    if not model or not member["serving"]:
        return budget
    narrow = member["narrow"]
    held_bytes = model["trunk_bytes"] + narrow * model["narrow_lot_bytes"]
    held_bytes += (member["serving"] - narrow) * model["lot_bytes"]
    return f"{held_bytes / 1e6:,.0f} of {budget}"


def table_of(title: str, *columns: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(
        title=title,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def layers_owned(runs: list[list[int]], experts: int) -> str:
    """[[layer, first, count], …] as "0-2, 5, 7[0-3,6]": a layer in part names its experts."""
    whole: list[int] = []
    parts: dict[int, list[str]] = {}
    for layer, first, count in runs:
        if count == experts:
            whole.append(layer)
        else:
            parts.setdefault(layer, []).append(_span(first, first + count - 1))
    texts = [f"{layer}[{','.join(spans)}]" for layer, spans in sorted(parts.items())]
    return ", ".join([*_spans(whole), *texts])


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
    """Control links, and what is known of the data path to each device: of one that is not measured
    the market assumes gigabit Ethernet."""
    bus, engine = status["bus"], status["engine"]
    peers = engine["stats"].get("peers", {})
    measured = {link["node"]: link for link in engine.get("links", ())}
    names = {member["node"]: member["name"] for member in status["node"]["members"]}
    title = f"links ({bus['topology']} brokers)"
    table = table_of(
        title, "to", "state", "messages", "calls", "a call", "RTT p50 p99", "bandwidth"
    )
    rows = [
        (link["node"], f"{link['host']}:{link['port']}", "up" if link["up"] else "down",
         f"{link['messages']:,}") for link in bus["links"]
    ]  # fmt: skip
    listed = {row[0] for row in rows}
    rows += [(node, "", "", "") for node in sorted(measured) if node not in listed]
    for node, where, state, messages in rows:
        peer, link = peers.get(node, {}), measured.get(node)
        call_us = peer.get("rtt_us_p50")
        table.add_row(
            f"{names.get(node) or node or '?'} {where}".rstrip(),
            state,
            messages,
            f"{peer.get('calls', 0):,}",
            f"{call_us / 1000:.2f} ms" if call_us else "",
            f"{link['rtt_us'] / 1000:.2f} {link['rtt_p99_us'] / 1000:.2f} ms"
            if link
            else "assumed",
            f"{link['mb_per_s']:,} MB/s" if link and link["mb_per_s"] else "assumed",
        )
    return table
