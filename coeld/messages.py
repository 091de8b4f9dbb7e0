"""What devices say to each other over MQTT: two kinds of message, as JSON, strictly checked.

A `Digest` is heartbeat and anti-entropy in one: who is known, how fresh, how well. A `Delta`
carries whole records. A `Record` is everything one device says about itself, written by that
device alone and versioned by (incarnation, seq), so merging is "keep the newest" and no order of
arrival matters. JSON because control traffic is a few kilobytes a second and people must be able
to read it with `mosquitto_sub`; lots travel as runs [layer, first, count, …] so that a record
stays small. `decode` checks everything at this edge: inside, every value is valid.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

from coeld.errors import FrameError
from coeld.ids import Lot, ModelHash, NodeId
from coeld.routes import EXPERTS_PER_LAYER_MAX, LAYERS_MAX

VERSION = 1
KIND_DIGEST = 1  # kinds are append-only: never renumber, never reuse
KIND_DELTA = 2

MESSAGE_BYTES_MAX = 256 * 1024
ENTRIES_MAX = 2048
RECORDS_MAX = 64
LOTS_PER_RECORD_MAX = 4096
COPIES_MAX = 8
NAME_CHARS_MAX = 64
HOST_CHARS_MAX = 253
COUNTER_MAX = 2**53 - 1  # what every JSON reader keeps exact
BID_MAX = 2**62

_NODE_ID = re.compile(r"[0-9a-f]{16}\Z")
_MODEL = re.compile(r"[0-9a-f]{64}\Z")
_FINGERPRINT = re.compile(r"(?:[0-9a-f]{16})?\Z")
_HOST = re.compile(r"[A-Za-z0-9._:%\-]*\Z")


class Status(IntEnum):
    """How a device is, in SWIM's words. Within one incarnation a larger value is worse."""

    ALIVE = 0
    SUSPECT = 1
    DEAD = 2
    LEFT = 3


class Claim(NamedTuple):
    """One device's bid for copy `copy` of `lot` (0: the owner; above: replicas)."""

    lot: Lot
    copy: int
    bid: int


@dataclass(frozen=True, slots=True)
class Record:
    """All that a device says about itself. Claims and serving are empty without an engine."""

    origin: NodeId
    incarnation: int
    seq: int
    name: str = ""
    mqtt_host: str = ""
    mqtt_port: int = 0
    """0: no broker of its own."""
    memory_budget_bytes: int = 0
    cpu_load_percent: int = 0
    kernel_mb_per_s: int = 0
    model: ModelHash | None = None
    """The model its engine has open; None: no engine, or no model."""
    data_host: str = ""
    data_port: int = 0
    claims: tuple[Claim, ...] = ()
    """Sorted by lot; at most one per lot."""
    serving: tuple[Lot, ...] = ()
    """Sorted."""
    epoch: int = 0
    fingerprint: str = ""
    """Of the route table it uses: 16 hex digits, or empty."""


class DigestEntry(NamedTuple):
    """What the sender knows of one device: versions only."""

    node: NodeId
    incarnation: int
    seq: int
    heartbeat: int
    status: Status


@dataclass(frozen=True, slots=True)
class Digest:
    """Published at every heartbeat; sent with `ask` to one device to hear what is newer there."""

    swarm: str
    sender: NodeId
    incarnation: int
    entries: tuple[DigestEntry, ...]
    ask: bool = False


@dataclass(frozen=True, slots=True)
class Delta:
    """Records: the sender's own when it changed, or the answer to an asking digest."""

    swarm: str
    sender: NodeId
    incarnation: int
    records: tuple[Record, ...]


Message = Digest | Delta


def encode(message: Message) -> bytes:
    """One message as compact JSON, at most MESSAGE_BYTES_MAX bytes (the node sizes its deltas)."""
    head = {
        "v": VERSION,
        "kind": KIND_DIGEST if isinstance(message, Digest) else KIND_DELTA,
        "swarm": message.swarm,
        "from": message.sender,
        "inc": message.incarnation,
    }
    if isinstance(message, Digest):
        body: dict[str, Any] = {"members": [[*e[:4], int(e.status)] for e in message.entries]}
        body["ask"] = int(message.ask)
    else:
        body = {"records": [_record_to_json(record) for record in message.records]}
    data = json.dumps(head | body, separators=(",", ":")).encode()
    assert len(data) <= MESSAGE_BYTES_MAX, f"{len(data)} bytes: the sender must split its deltas"
    return data


def decode(data: bytes) -> Message:
    """The inverse of `encode`. Raises FrameError on anything malformed; never anything else."""
    if len(data) > MESSAGE_BYTES_MAX:
        raise FrameError(
            f"control message of {len(data)} bytes, allowed are {MESSAGE_BYTES_MAX}: ignored"
        )
    try:
        value = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as exc:
        raise FrameError(f"control message is not JSON ({exc}): ignored") from exc
    if not isinstance(value, dict):
        raise FrameError("control message is not a JSON object: ignored")
    if value.get("v") != VERSION:
        raise FrameError(
            f"control message of protocol version {str(value.get('v'))[:16]}, this device speaks"
            f" {VERSION}: update the older device"
        )
    swarm = _text(value, "swarm", NAME_CHARS_MAX)
    sender = _node(value.get("from"))
    incarnation = _int(value.get("inc"), "inc", COUNTER_MAX)
    kind = value.get("kind")
    if kind == KIND_DIGEST:
        entries = tuple(_entry(row) for row in _list(value, "members", ENTRIES_MAX))
        _distinct((entry.node for entry in entries), "members")
        return Digest(swarm, sender, incarnation, entries, _int(value.get("ask"), "ask", 1) == 1)
    if kind == KIND_DELTA:
        records = tuple(_record(row) for row in _list(value, "records", RECORDS_MAX))
        return Delta(swarm, sender, incarnation, records)
    raise FrameError(f"unknown kind of control message {str(kind)[:16]}: ignored")


# ---- records -------------------------------------------------------------------------------


def _record_to_json(record: Record) -> dict[str, Any]:
    value: dict[str, Any] = {
        "node": record.origin,
        "inc": record.incarnation,
        "seq": record.seq,
        "name": record.name,
        "mqtt": [record.mqtt_host, record.mqtt_port],
        "budget": record.memory_budget_bytes,
        "load": record.cpu_load_percent,
        "speed": record.kernel_mb_per_s,
        "epoch": record.epoch,
        "routes": record.fingerprint,
    }
    if record.model is not None:
        value["model"] = record.model
        value["data"] = [record.data_host, record.data_port]
        value["claims"] = _runs((lot, (copy, bid)) for lot, copy, bid in record.claims)
        value["serving"] = _runs((lot, ()) for lot in record.serving)
    return value


def _record(value: Any) -> Record:
    if not isinstance(value, dict):
        raise FrameError("a record is not a JSON object: message ignored")
    mqtt_host, mqtt_port = _address(value, "mqtt")
    model, data = None, ("", 0)
    claims: tuple[Claim, ...] = ()
    serving: tuple[Lot, ...] = ()
    if value.get("model") is not None:
        model = ModelHash(_match(value["model"], _MODEL, "model"))
        data = _address(value, "data")
        claims = _claims(_list(value, "claims", LOTS_PER_RECORD_MAX))
        serving = tuple(lot for lot, _ in _expand(_list(value, "serving", LOTS_PER_RECORD_MAX), 0))
    return Record(
        origin=_node(value.get("node")),
        incarnation=_int(value.get("inc"), "inc", COUNTER_MAX),
        seq=_int(value.get("seq"), "seq", COUNTER_MAX),
        name=_text(value, "name", NAME_CHARS_MAX),
        mqtt_host=mqtt_host,
        mqtt_port=mqtt_port,
        memory_budget_bytes=_int(value.get("budget"), "budget", COUNTER_MAX),
        cpu_load_percent=_int(value.get("load"), "load", 100),
        kernel_mb_per_s=_int(value.get("speed"), "speed", COUNTER_MAX),
        model=model,
        data_host=data[0],
        data_port=data[1],
        claims=claims,
        serving=serving,
        epoch=_int(value.get("epoch"), "epoch", COUNTER_MAX),
        fingerprint=_match(value.get("routes"), _FINGERPRINT, "routes"),
    )


def _runs(items: Iterable[tuple[Lot, tuple[int, ...]]]) -> list[list[int]]:
    """Sorted lots as rows [layer, first expert, count, *extra] of neighbours with equal extra."""
    rows: list[list[int]] = []
    for (layer, expert), extra in items:
        last = rows[-1] if rows else None
        if last and last[0] == layer and last[1] + last[2] == expert and last[3:] == [*extra]:
            last[2] += 1
        else:
            rows.append([layer, expert, 1, *extra])
    return rows


def lot_runs(lots: Iterable[Lot]) -> list[list[int]]:
    """Sorted lots as rows [layer, first expert, count]."""
    return _runs((lot, ()) for lot in lots)


def _expand(rows: list[Any], extras: int) -> list[tuple[Lot, tuple[int, ...]]]:
    """The inverse of `_runs`: ascending, without repetition, bounded before it grows."""
    lots: list[tuple[Lot, tuple[int, ...]]] = []
    for row in rows:
        if not isinstance(row, list) or len(row) != 3 + extras:
            raise FrameError("a run of lots has the wrong shape: message ignored")
        layer = _int(row[0], "layer", LAYERS_MAX - 1)
        first = _int(row[1], "expert", EXPERTS_PER_LAYER_MAX - 1)
        count = _int(row[2], "count", EXPERTS_PER_LAYER_MAX - first, least=1)
        extra = tuple(_int(item, "claim", BID_MAX) for item in row[3:])
        if len(lots) + count > LOTS_PER_RECORD_MAX:
            raise FrameError(f"a record names more than {LOTS_PER_RECORD_MAX} lots: ignored")
        if lots and lots[-1][0] >= (layer, first):
            raise FrameError("lots of a record are not ascending: message ignored")
        lots.extend((Lot(layer, first + i), extra) for i in range(count))
    return lots


def _claims(rows: list[Any]) -> tuple[Claim, ...]:
    claims = tuple(Claim(lot, extra[0], extra[1]) for lot, extra in _expand(rows, 2))
    if any(claim.copy >= COPIES_MAX for claim in claims):
        raise FrameError(f"a claim names a copy above {COPIES_MAX - 1}: message ignored")
    return claims


# ---- leaves --------------------------------------------------------------------------------


def _entry(row: Any) -> DigestEntry:
    if not isinstance(row, list) or len(row) != 5:
        raise FrameError("a digest entry has the wrong shape: message ignored")
    return DigestEntry(
        _node(row[0]),
        _int(row[1], "inc", COUNTER_MAX),
        _int(row[2], "seq", COUNTER_MAX),
        _int(row[3], "heartbeat", COUNTER_MAX),
        Status(_int(row[4], "status", Status.LEFT)),
    )


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a number of JSON")


def _int(value: Any, what: str, most: int, least: int = 0) -> int:
    if type(value) is not int or not least <= value <= most:
        raise FrameError(f"{what}={str(value)[:24]!r} is not an integer in {least}..{most}")
    return value


def _text(value: dict[str, Any], key: str, chars_max: int) -> str:
    text = value.get(key)
    if not isinstance(text, str) or len(text) > chars_max or not text.isprintable():
        raise FrameError(f"{key} is not printable text of at most {chars_max} characters")
    return text


def _match(value: Any, pattern: re.Pattern[str], what: str) -> str:
    if not isinstance(value, str) or not pattern.match(value):
        raise FrameError(f"{what}={str(value)[:24]!r} is malformed: message ignored")
    return value


def _node(value: Any) -> NodeId:
    return NodeId(_match(value, _NODE_ID, "node id"))


def _list(value: dict[str, Any], key: str, most: int) -> list[Any]:
    items = value.get(key)
    if not isinstance(items, list) or len(items) > most:
        raise FrameError(f"{key} is not a list of at most {most} items: message ignored")
    return items


def _address(value: dict[str, Any], key: str) -> tuple[str, int]:
    pair = _list(value, key, 2)
    if len(pair) != 2 or not isinstance(pair[0], str) or len(pair[0]) > HOST_CHARS_MAX:
        raise FrameError(f"{key} is not [host, port]: message ignored")
    return _match(pair[0], _HOST, f"{key} host"), _int(pair[1], f"{key} port", 65535)


def _distinct(items: Iterable[NodeId], what: str) -> None:
    seen: set[NodeId] = set()
    for item in items:
        if item in seen:
            raise FrameError(f"{what} names {item} twice: message ignored")
        seen.add(item)
