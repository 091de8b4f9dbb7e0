"""`coeld plan`: does a model fit these devices, how fast will it answer, what limits it, and why.

Reads sizes only, never weights. With --swarm the devices are those of the running swarm, with the
memory, speed and links that they told; a link that nobody told of counts as gigabit Ethernet.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from coeld.errors import ConfigError
from coeld.ids import NodeId
from coeld.measured import MeasuredLink
from coeld.model.store import Store, default_store
from coeld.ui.client import add_socket_options, get_json, socket_of
from coeld.ui.status_command import layers_owned, table_of

if TYPE_CHECKING:
    from coeld.planning.fleet import Machine
    from coeld.planning.forecast import Forecast
    from coeld.planning.shape import Shape

TOKENS_MAX: Final = 1 << 20


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "plan",
        help="will a model fit, how fast, what limits it",
        description="Predict how a model runs on devices, from its sizes and their speeds.",
    )
    parser.add_argument(
        "--model", metavar="NAME|SHAPE", help="an installed model, a known shape, a shape.toml, "
        "a folder with a config.json, or hf:ORG/NAME",
    )  # fmt: skip
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--devices", metavar="FLEET", help="a fleet.toml, or a line such as 4xraspberry-pi-5,n100"
    )
    where.add_argument("--swarm", action="store_true", help="the devices of the running swarm")
    add_socket_options(parser)
    parser.add_argument(
        "--bits", type=int, choices=(8, 4, 3, 2), help="per weight of experts; default: what fits"
    )
    parser.add_argument(
        "--trunk-bits", type=int, choices=(8, 4), default=8, help="per weight of attention (8)"
    )
    parser.add_argument(
        "--budget-mb", type=_tokens, metavar="N", help="memory.budget_mb of every device"
    )
    parser.add_argument("--split", action="store_true", help="spread layers where that is faster")
    parser.add_argument("--prompt-tokens", type=_tokens, default=128, metavar="N")
    parser.add_argument("--context-tokens", type=_tokens, default=2048, metavar="N")
    parser.add_argument("--list", action="store_true", help="show known shapes and profiles")
    parser.add_argument("--store", type=Path, metavar="DIR")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.set_defaults(run=run)


def _tokens(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) <= TOKENS_MAX):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 to {TOKENS_MAX}")
    return int(text)


def run(arguments: argparse.Namespace) -> int:
    from coeld.planning import forecast  # the market and its data: only when planning
    from coeld.planning.fleet import read_fleet
    from coeld.planning.shape import Shape, find_demand

    if arguments.list:
        return _list()
    status = get_json(socket_of(arguments), "/status") if arguments.swarm else None
    if status is None and not arguments.devices:
        raise ConfigError("Say which devices: --devices FLEET, or --swarm for those that run now.")
    machines = swarm_machines(status) if status else read_fleet(arguments.devices)
    if arguments.budget_mb:
        budget_bytes = arguments.budget_mb * 1_000_000
        machines = tuple(replace(machine, budget_bytes=budget_bytes) for machine in machines)
    model = arguments.model or _running(status)
    found = find_demand(model, Store(arguments.store or default_store()))
    context = arguments.context_tokens
    bits = None
    if isinstance(found, Shape):
        bits = arguments.bits or forecast.choose_width(
            found, machines, context, arguments.trunk_bits
        )
        demand = found.demand(bits, arguments.trunk_bits)
    else:
        demand = found
    if status and any(member.get("stays_wide") for member in status["node"]["members"]):
        demand = replace(demand, narrow_lot_bytes=0)
    spans = status is None or status["agent"].get("spans", True)
    told = arguments.prompt_tokens, context, arguments.split, spans
    plan = forecast.forecast(demand, machines, *told)
    changed = forecast.changes(plan, *told)
    shape = found if isinstance(found, Shape) else None
    if arguments.json:
        print(json.dumps(as_json(plan, changed, shape, bits), indent=1))
    else:
        show(plan, changed, shape, bits, arguments)
    return 0 if plan.missing_bytes == 0 else 3


def _running(status: dict[str, Any] | None) -> str:
    model = status["node"]["model"] if status else None
    if not model:
        raise ConfigError("Say which model: --model NAME. `coeld plan --list` shows known shapes.")
    return str(model["name"])


def swarm_machines(status: dict[str, Any]) -> "tuple[Machine, ...]":
    """The devices of a running swarm, as they told themselves. Raises ConfigError."""
    from coeld.deployment.cost import CUT_US
    from coeld.planning.fleet import DEVICES_MAX, Machine

    members = [m for m in status["node"]["members"] if m["status"] == "alive" and m["engine"]]
    if not 1 <= len(members) <= DEVICES_MAX:
        raise ConfigError(
            f"the running swarm has {len(members)} devices with an engine, expected 1 to "
            f"{DEVICES_MAX}. See coeld status."
        )
    return tuple(
        Machine(
            name=member["name"] or member["node"],
            profile="this kind",
            budget_bytes=member["memory_budget_bytes"],
            kernel_mb_per_s=max(1, member["kernel_mb_per_s"]),
            row_mb_per_s=member.get("row_mb_per_s") or 8 * max(1, member["kernel_mb_per_s"]),
            cut_us=member.get("cut_us") or CUT_US,
            link="ethernet",
            asks=True,
            measured=True,
            node=NodeId(member["node"]),
            links=tuple(MeasuredLink(*link) for link in member.get("links", ())),
        )
        for member in members
    )


def as_json(
    plan: "Forecast",
    changed: "list[tuple[str, Forecast]]",
    shape: "Shape | None",
    bits: int | None,
) -> dict[str, Any]:
    """Everything, for programs."""
    from coeld.planning.forecast import limit

    holds = [0] * len(plan.machines)
    for index in plan.owners.values():
        holds[index] += 1
    fits = plan.missing_bytes == 0
    return {
        "model": plan.demand.name,
        "bits": bits,
        "fits": fits,
        "missing_bytes": plan.missing_bytes,
        "weights_bytes": plan.demand.trunk_bytes
        + plan.demand.layers * plan.demand.experts * plan.demand.lot_bytes,
        "devices": [
            {
                "name": machine.name,
                "budget_bytes": machine.budget_bytes,
                "trunk_bytes": plan.demand.trunk_bytes,
                "lots": lots,
                "lots_bytes": _lots_bytes(plan, index),
                "speed_measured": machine.measured,
            }
            for index, (machine, lots) in enumerate(zip(plan.machines, holds, strict=True))
        ],
        "whole_layers": plan.whole,
        "narrow_experts": len(plan.narrow) * plan.demand.experts,
        "asked": plan.machines[plan.asker].name,
        "tokens_per_s": round(plan.tokens_per_s, 3),
        "token_us": plan.token_us,
        "legs": [[plan.machines[leg.site].name, leg.first, leg.stop] for leg in plan.legs],
        "time_to_first_token_us": plan.prefill_us + plan.token_us,
        "parts": [{"what": p.what, "us": p.us, "arithmetic": p.arithmetic} for p in plan.parts],
        "limit": limit(plan) if fits else "memory",
        "changes": [
            {
                "what": what,
                "fits": other.missing_bytes == 0,
                "tokens_per_s": round(other.tokens_per_s, 3),
            }
            for what, other in changed
        ],
        "published": [
            {"what": p.what, "tokens_per_s": p.tokens_per_s, "source": p.source}
            for p in (shape.published if shape else ())
        ],
    }


def show(
    plan: "Forecast",
    changed: "list[tuple[str, Forecast]]",
    shape: "Shape | None",
    bits: int | None,
    arguments: argparse.Namespace,
) -> None:
    """Tables for people."""
    from rich.console import Console

    from coeld.planning.forecast import limit

    console = Console(highlight=False)
    demand = plan.demand
    weights = demand.trunk_bytes + demand.layers * demand.experts * demand.lot_bytes
    width = f", experts in {bits} bits" if bits else ""
    console.print(f"{demand.name}{width}: {weights / 1e9:.2f} GB, {demand.layers} layers of "
                  f"{demand.experts} experts, {demand.used} used")  # fmt: skip
    console.print(_devices(plan))
    if plan.missing_bytes:
        console.print(
            f"Does not fit: {plan.missing_bytes / 1e9:.2f} GB of memory are missing. Every device "
            f"also holds the trunk ({demand.trunk_bytes / 1e9:.2f} GB). Add a device, take fewer "
            f"bits, or give {_enough_mb(plan, arguments)} MB of each (memory.budget_mb, here "
            "--budget-mb) if they have it."
        )
    else:
        if plan.narrow:
            console.print(
                f"Fits with {len(plan.narrow) * demand.experts} of {demand.layers * demand.experts}"
                " experts in 4 bits instead of 8: answers are worse (memory.narrow)."
            )
        first_s = (plan.prefill_us + plan.token_us) / 1e6
        console.print(
            f"Fits. Predicted at {plan.machines[plan.asker].name}: {plan.tokens_per_s:.1f} tok/s; "
            f"first token of a prompt of {arguments.prompt_tokens} tokens after {first_s:.1f} s."
        )
        console.print(f"A token goes through {_way(plan)}. Limited by {limit(plan)}.")
        console.print(_arithmetic(plan))
    console.print(_changes(plan, changed))
    if shape and shape.published:
        console.print(_published(plan, shape))
    if not all(machine.measured for machine in plan.machines):
        console.print("* an estimated speed, see the profile's source")


def _lots_bytes(plan: "Forecast", index: int) -> int:
    """Of the experts that a device would hold."""
    mine = (lot for lot, owner in plan.owners.items() if owner == index)
    return sum(plan.demand.sizes[lot.layer in plan.narrow] for lot in mine)


def _way(plan: "Forecast") -> str:
    """Layers and whose spans they are; the asked device's among them."""
    return ", ".join(
        f"{plan.machines[leg.site].name} (layers {leg.first} to {leg.stop - 1})"
        for leg in plan.legs
    )


def _enough_mb(plan: "Forecast", arguments: argparse.Namespace) -> int:
    from coeld.planning.forecast import enough_each

    each = enough_each(plan.demand, plan.machines, arguments.context_tokens)
    return -(-each // 1_000_000)


def _devices(plan: "Forecast") -> Any:
    table = table_of("devices", "device", "memory", "trunk", "experts", "holds", "speed", "link")
    layers: list[dict[int, int]] = [{} for _ in plan.machines]
    for lot, index in plan.owners.items():
        layers[index][lot.layer] = layers[index].get(lot.layer, 0) + 1
    for index, (machine, held) in enumerate(zip(plan.machines, layers, strict=True)):
        if plan.whole:
            what = "layers " + layers_owned(
                [[layer, 0, count] for layer, count in sorted(held.items())], plan.demand.experts
            )
        else:
            what = f"parts of {len(held)} layers"
        table.add_row(
            machine.name,
            f"{machine.budget_bytes / 1e9:.1f} GB",
            f"{plan.demand.trunk_bytes / 1e9:.1f}",
            f"{_lots_bytes(plan, index) / 1e9:.1f}",
            what if held else "nothing",
            f"{machine.kernel_mb_per_s / 1000:.1f} GB/s{'' if machine.measured else ' *'}",
            machine.link_kind,
        )
    return table


def _arithmetic(plan: "Forecast") -> Any:
    table = table_of("time per token", "part", "ms", "how")
    for part in plan.parts:
        table.add_row(part.what, f"{part.us / 1000:.1f}", part.arithmetic)
    table.add_row("together", f"{plan.token_us / 1000:.1f}", f"{plan.tokens_per_s:.1f} tok/s")
    return table


def _changes(plan: "Forecast", changed: "list[tuple[str, Forecast]]") -> Any:
    table = table_of("what would change", "with", "tok/s", "")
    for what, other in changed:
        if other.missing_bytes:
            table.add_row(what, "", f"{other.missing_bytes / 1e9:.2f} GB still missing")
        else:
            gain = round(100 * (plan.token_us / other.token_us - 1)) if plan.token_us else 0
            table.add_row(what, f"{other.tokens_per_s:.1f}", f"{gain:+d} %" if gain else "the same")
    return table


def _published(plan: "Forecast", shape: "Shape") -> Any:
    table = table_of("published figures of the same model", "what", "tok/s", "source")
    for item in shape.published:
        table.add_row(item.what, f"{item.tokens_per_s:.2f}", item.source)
    if plan.token_us:
        table.add_row("this plan, predicted", f"{plan.tokens_per_s:.2f}", "")
    return table


def _list() -> int:
    from rich.console import Console

    from coeld.planning.fleet import profiles
    from coeld.planning.shape import shipped

    console = Console(highlight=False)
    console.print("shapes: " + ", ".join(shipped()))
    table = table_of("profiles", "name", "device", "weights", "rows", "source")
    for profile in profiles().values():
        speed = f"{profile.kernel_mb_per_s / 1000:.1f} GB/s"
        source = profile.source if profile.measured else f"estimated: {profile.source}"
        rows = f"{profile.row_mb_per_s / 1000:.1f}"
        table.add_row(profile.name, profile.title, speed, rows, source)
    console.print(table)
    return 0
