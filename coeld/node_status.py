"""What `/status` shows of the decision core: a plain JSON value, for people and tools. Pure."""

from typing import Any

from coeld.ids import NodeId
from coeld.lot_sets import lot_runs
from coeld.messages import Record, Status
from coeld.perception.perceive import Perception
from coeld.releases import Versions
from coeld.routes import RouteTable
from coeld.view import ModelDemand


def describe(
    perception: Perception,
    demand: ModelDemand | None,
    table: RouteTable | None,
    fingerprint: str,
    counters: dict[str, int],
) -> dict[str, Any]:
    """Devices, model, routes, who serves what as {node: [[layer, first expert, count], …]}."""
    records = {record.origin: record for record in perception.present()}
    serving = [record for record in records.values() if demand and record.model == demand.model]
    return {
        "me": perception.me.origin,
        "incarnation": perception.me.incarnation,
        "members": _members(perception),
        "model": _model(demand),
        "routes": _routes(demand, table, fingerprint),
        "owners": {record.origin: lot_runs(record.serving) for record in serving},
        "counters": counters,
    }


def counters(perception: Perception, stale_reports: int) -> dict[str, int]:
    """What was ignored, and how often."""
    return {
        **perception.counters,
        "twin": perception.oneself.twins,
        "flooded": perception.admission.refused,
        "table_full": perception.membership.ignored_full,
        "stale_engine_reports": stale_reports,
    }


def _members(perception: Perception) -> list[dict[str, Any]]:
    me = perception.me
    rows = [_member(me.origin, me, me.incarnation, Status.ALIVE)]
    for member in perception.membership.members.values():
        record = perception.record(member)
        rows.append(_member(member.node, record, member.incarnation, member.status))
    return sorted(rows, key=lambda row: str(row["node"]))


def _member(
    node: NodeId, record: Record | None, incarnation: int, status: Status
) -> dict[str, Any]:
    known = record or Record(node, incarnation, 0)
    here = status <= Status.SUSPECT  # of who is gone the last record is history
    return {
        "node": node,
        "name": known.name,
        "status": status.name.lower(),
        "incarnation": incarnation,
        "host": known.data_host or known.mqtt_host,
        "data_port": known.data_port,
        "memory_budget_bytes": known.memory_budget_bytes,
        "kernel_mb_per_s": known.kernel_mb_per_s,
        "row_mb_per_s": known.row_mb_per_s,
        "cut_us": known.cut_us,
        "sparing": known.sparing,
        "stays_wide": known.stays_wide,
        "asked_per_min": _asked(known) if here else None,
        "cpu_load_percent": known.cpu_load_percent,
        "links": [list(link) for link in known.links],
        "probed": known.probed,
        "serving": len(known.serving) if here else 0,
        "narrow": _narrow(known) if here else 0,
        "claimed": len(known.claims) if here else 0,
        "engine": here and known.data_port > 0,
        "versions": _versions(known.versions) if here else None,
    }


def _versions(versions: Versions) -> dict[str, Any]:
    """Of a device on its way from one version of the model to the next, in words."""
    following = versions.next
    return {
        "model": versions.name,
        "open": versions.version,
        "requests": versions.phase.name.lower(),
        "next": following.version if following else None,
        "progress": versions.progress.name.lower() if following else None,
    }


def _asked(record: Record) -> dict[str, float]:
    """What it told of how much it is asked for, in steps of a factor of two."""
    return {name: round(rate / 60, 2) for name, rate in record.asked.rates._asdict().items()}


def _narrow(record: Record) -> int:
    """How many of the lots that it serves it holds in fewer bits than stored, or is about to."""
    layers = {layer for run in record.narrow for layer in range(*run)}
    return sum(lot.layer in layers for lot in record.serving)


def _model(demand: ModelDemand | None) -> dict[str, Any] | None:
    if demand is None:
        return None
    return {
        "name": demand.name,
        "version": demand.version,
        "hash": demand.model,
        "layers": demand.layers,
        "experts": demand.experts,
        "lot_bytes": demand.lot_bytes,
        "narrow_lot_bytes": demand.narrow_lot_bytes,
        "trunk_bytes": demand.trunk_bytes,
    }


def _routes(
    demand: ModelDemand | None, table: RouteTable | None, fingerprint: str
) -> dict[str, Any]:
    return {
        "epoch": table.epoch if table else 0,
        "fingerprint": fingerprint,
        "covered": len(table.owners) if table else 0,
        "total": demand.layers * demand.experts if demand else 0,
        "narrow": len(table.narrow) * demand.experts if table and demand else 0,
        "missing_bytes": table.missing_bytes if table else 0,
    }
