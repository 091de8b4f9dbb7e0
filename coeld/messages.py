"""What devices say to each other over MQTT: four kinds of message, as JSON, strictly checked.

A `Beat` is a sign of life of constant size: one fingerprint stands for all that its sender knows,
and fresh news ride along. Who sees another fingerprint sends an `Ask` with fingerprints of parts
of its view; the answer is a `Digest`, the entries of the parts that differ. A `Delta` carries
whole records. A `Record` is everything one device says about itself, written by that device alone
and versioned by (incarnation, seq), so merging is "keep the newest" and no order of arrival
matters. JSON because control traffic is a few kilobytes a second and people must be able to read
it with `mosquitto_sub`; lots travel as runs [layer, first, count, …] so that a record stays small.
`decode` checks everything at this edge: inside, every value is valid.
"""

import json
import re
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import pairwise
from typing import Any, NamedTuple

from coeld.asked import NOTHING, Asked, asked_from_json, asked_to_json
from coeld.errors import FrameError
from coeld.ids import Lot, ModelHash, NodeId
from coeld.json_values import address as _address
from coeld.json_values import distinct as _distinct
from coeld.json_values import integer as _int
from coeld.json_values import items as _list
from coeld.json_values import matching as _match
from coeld.json_values import node as _node
from coeld.json_values import text as _text
from coeld.lot_sets import LOTS_PER_RECORD_MAX, pack, unpack
from coeld.measured import LINKS_MAX, MeasuredLink, links_from_json
from coeld.releases import NO_VERSIONS, Versions, versions_from_json
from coeld.routes import LAYERS_MAX

VERSION = 3
KIND_DIGEST = 1  # kinds are append-only: never renumber, never reuse
KIND_DELTA = 2
KIND_BEAT = 3
KIND_ASK = 4

MESSAGE_BYTES_MAX = 256 * 1024
ENTRIES_MAX = 1024
WANTED_MAX = 256
PARTS_MAX = 256
RECORDS_MAX = 64
LOTS_PER_DELTA_MAX = 2 * LOTS_PER_RECORD_MAX  # claimed and served: a few bytes name thousands
SPANS_MAX = 256
COPIES_MAX = 8
NAME_CHARS_MAX = 64
COUNTER_MAX = 2**53 - 1  # what every JSON reader keeps exact
CUT_US_MAX = 10**7
BID_MAX = 2**62

_MODEL = re.compile(r"[0-9a-f]{64}\Z")
_MODEL_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}\Z")
_FINGERPRINT = re.compile(r"(?:[0-9a-f]{16})?\Z")
_SUMS = re.compile(r"(?:[0-9a-f]{8}){1,256}\Z")


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
    spans: tuple[tuple[int, int], ...] = ()
    """(first, stop) of layers that it serves whole, in one call; ascending."""
    epoch: int = 0
    fingerprint: str = ""
    """Of the route table it uses: 16 hex digits, or empty."""
    blob_host: str = ""
    blob_port: int = 0
    """Where it serves the weights it has on disk; 0: nowhere."""
    row_mb_per_s: int = 0
    """0: unknown. See coeld.view.Resources, as of `cut_us`."""
    cut_us: int = 0
    sparing: bool = False
    """It runs on a low battery: it takes what nobody else can."""
    asked: Asked = NOTHING
    """How much it is asked for itself, and what that uses."""
    stays_wide: bool = False
    """It wants no lot of its model in fewer bits than stored."""
    narrow: tuple[tuple[int, int], ...] = ()
    """(first, stop) of layers that it holds, or will hold as claimed, in fewer bits than stored;
    ascending."""
    versions: Versions = NO_VERSIONS
    """Which version of the model it has open, and how far it is from the next."""
    context_tokens: int = 0
    """The longest request that its engine keeps keys and values for."""
    links: tuple[MeasuredLink, ...] = ()
    """To other devices, as it measured them, in steps; ascending. Others are as is assumed."""
    probed: bool = False
    """It has measured its links to all who were there: what is assumed of the others holds."""
    _json: list[str] = field(default_factory=list, init=False, repr=False, compare=False)
    """Its text, once made: a record never changes and is given to many."""

    def to_json(self) -> str:
        """As it travels inside a delta."""
        if not self._json:
            self._json.append(_compact(_record_to_json(self)))
        return self._json[0]


class Entry(NamedTuple):
    """What the sender knows of one device: versions and state only."""

    node: NodeId
    incarnation: int
    seq: int
    """Of the record that the sender holds; 0: it has none of this incarnation."""
    heartbeat: int
    """The latest sign of life that the sender knows of, directly or not."""
    status: Status
    accuser: NodeId | None = None
    """Who came to suspect it by itself; only with SUSPECT."""


@dataclass(frozen=True, slots=True)
class Beat:
    """To all who listen, at every heartbeat and when there are news: "I live and know this"."""

    swarm: str
    sender: NodeId
    incarnation: int
    seq: int
    heartbeat: int
    view: str
    """Fingerprint of everything the sender knows: 16 hex digits."""
    news: tuple[Entry, ...] = ()


@dataclass(frozen=True, slots=True)
class Ask:
    """To one device: which parts of our views differ, and give me these records."""

    swarm: str
    sender: NodeId
    incarnation: int
    sums: tuple[int, ...] = ()
    """32 bits for each part of the sender's view: 1, 2, 4 … PARTS_MAX; empty: no question."""
    wanted: tuple[NodeId, ...] = ()


@dataclass(frozen=True, slots=True)
class Digest:
    """To one device: all that the sender knows of some parts, or where it knows better."""

    swarm: str
    sender: NodeId
    incarnation: int
    entries: tuple[Entry, ...]
    parts: int = 0
    """How many parts the view was cut into; 0: `entries` is not complete for any part."""
    differing: tuple[int, ...] = ()
    """The parts of which `entries` names every present device; ascending."""


@dataclass(frozen=True, slots=True)
class Delta:
    """Records: the sender's own when it changed, or those that were asked for."""

    swarm: str
    sender: NodeId
    incarnation: int
    records: tuple[Record, ...]


Message = Beat | Ask | Digest | Delta


def encode(message: Message) -> bytes:
    """One message as compact JSON, at most MESSAGE_BYTES_MAX bytes (the node sizes its deltas)."""
    body: dict[str, Any]
    match message:
        case Beat():
            kind, body = KIND_BEAT, {"seq": message.seq, "beat": message.heartbeat}
            body["view"] = message.view
            if message.news:
                body["news"] = [_entry_to_json(entry) for entry in message.news]
        case Ask():
            kind, body = KIND_ASK, {}
            if message.sums:
                body["sums"] = "".join(f"{part:08x}" for part in message.sums)
            if message.wanted:
                body["wanted"] = message.wanted
        case Digest():
            kind, body = KIND_DIGEST, {"members": [_entry_to_json(e) for e in message.entries]}
            if message.parts:
                body |= {"parts": message.parts, "differing": message.differing}
        case Delta():
            kind, body = KIND_DELTA, {"records": []}
    head = {"v": VERSION, "kind": kind, "swarm": message.swarm, "from": message.sender}
    head["inc"] = message.incarnation
    text = _compact(head | body)
    if isinstance(message, Delta):  # their texts exist already
        text = f"{text[:-2]}{','.join(record.to_json() for record in message.records)}]}}"
    data = text.encode()
    assert len(data) <= MESSAGE_BYTES_MAX, f"{len(data)} bytes: the sender must split its deltas"
    return data


def decode(data: bytes) -> Message:
    """The inverse of `encode`. Raises FrameError on anything malformed; never anything else."""
    value = _json_object(data)
    head = (
        _text(value, "swarm", NAME_CHARS_MAX),
        _node(value.get("from")),
        _int(value.get("inc"), "inc", COUNTER_MAX),
    )
    kind = value.get("kind")
    if kind == KIND_BEAT:
        return Beat(
            *head,
            _int(value.get("seq"), "seq", COUNTER_MAX),
            _int(value.get("beat"), "beat", COUNTER_MAX),
            _match(value.get("view"), _FINGERPRINT, "view"),
            _entries(value, "news") if "news" in value else (),
        )
    if kind == KIND_ASK:
        sums = _sums(value["sums"]) if "sums" in value else ()
        wanted = _list(value, "wanted", WANTED_MAX) if "wanted" in value else []
        nodes = tuple(_node(item) for item in wanted)
        _distinct(nodes, "wanted")
        return Ask(*head, sums, nodes)
    if kind == KIND_DIGEST:
        entries = _entries(value, "members")
        return Digest(*head, entries, *_differing(value))
    if kind == KIND_DELTA:
        return Delta(*head, _records(_list(value, "records", RECORDS_MAX)))
    raise FrameError(f"unknown kind of control message {str(kind)[:16]}: ignored")


_compact = json.JSONEncoder(separators=(",", ":")).encode


def _json_object(data: bytes) -> dict[str, Any]:
    """A JSON object of this protocol's version. Raises FrameError."""
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
    return value


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
    names = "rows", "cut", "sparing", "wide", "context", "probed"
    flags = record.sparing, record.stays_wide
    told = record.row_mb_per_s, record.cut_us, *flags, record.context_tokens, record.probed
    value |= {name: int(number) for name, number in zip(names, told, strict=True) if number}
    if record.asked != NOTHING:
        value["asked"] = asked_to_json(record.asked)
    if record.versions != NO_VERSIONS:
        value["versions"] = record.versions.to_json()
    if record.links:
        value["links"] = record.links
    if record.blob_port:
        value["blobs"] = [record.blob_host, record.blob_port]
    if record.model is not None:
        value["model"] = record.model
        value["data"] = [record.data_host, record.data_port]
        value["claims"] = pack((lot, (copy, bid)) for lot, copy, bid in record.claims)
        value["serving"] = pack((lot, ()) for lot in record.serving)
        if record.spans:
            value["spans"] = record.spans
        if record.narrow:
            value["narrow"] = record.narrow
    return value


def _records(rows: list[Any]) -> tuple[Record, ...]:
    records, lots = [], 0
    for row in rows:
        records.append(_record(row))
        lots += len(records[-1].claims) + len(records[-1].serving)
        if lots > LOTS_PER_DELTA_MAX:
            raise FrameError(f"records name more than {LOTS_PER_DELTA_MAX} lots: message ignored")
    return tuple(records)


def _record(value: Any) -> Record:
    if not isinstance(value, dict):
        raise FrameError("a record is not a JSON object: message ignored")
    mqtt_host, mqtt_port = _address(value, "mqtt")
    blob_host, blob_port = _address(value, "blobs") if "blobs" in value else ("", 0)
    model, data = None, ("", 0)
    claims: tuple[Claim, ...] = ()
    serving: tuple[Lot, ...] = ()
    spans = narrow = _spans([])
    if value.get("model") is not None:
        model = ModelHash(_match(value["model"], _MODEL, "model"))
        data = _address(value, "data")
        claims = _claims(_list(value, "claims", LOTS_PER_RECORD_MAX))
        rows = _list(value, "serving", LOTS_PER_RECORD_MAX)
        serving = tuple(lot for lot, _ in unpack(rows, 0, 0))
        spans = _spans(_list(value, "spans", SPANS_MAX)) if "spans" in value else ()
        narrow = _spans(_list(value, "narrow", LAYERS_MAX // 2)) if "narrow" in value else ()
    return Record(
        origin=_node(value.get("node")),
        incarnation=_int(value.get("inc"), "inc", COUNTER_MAX),
        seq=_int(value.get("seq"), "seq", COUNTER_MAX),
        name=_text(value, "name", NAME_CHARS_MAX),
        mqtt_host=mqtt_host,
        mqtt_port=mqtt_port,
        blob_host=blob_host,
        blob_port=blob_port,
        memory_budget_bytes=_int(value.get("budget"), "budget", COUNTER_MAX),
        cpu_load_percent=_int(value.get("load"), "load", 100),
        kernel_mb_per_s=_int(value.get("speed"), "speed", COUNTER_MAX),
        row_mb_per_s=_int(value.get("rows", 0), "rows", COUNTER_MAX),
        cut_us=_int(value.get("cut", 0), "cut", CUT_US_MAX),
        sparing=bool(_int(value.get("sparing", 0), "sparing", 1)),
        asked=asked_from_json(value["asked"]) if "asked" in value else NOTHING,
        versions=_versions(value["versions"]) if "versions" in value else NO_VERSIONS,
        links=links_from_json(_list(value, "links", LINKS_MAX), _node) if "links" in value else (),
        model=model,
        data_host=data[0],
        data_port=data[1],
        claims=claims,
        serving=serving,
        spans=spans,
        stays_wide=bool(_int(value.get("wide", 0), "wide", 1)),
        narrow=narrow,
        context_tokens=_int(value.get("context", 0), "context", COUNTER_MAX),
        probed=bool(_int(value.get("probed", 0), "probed", 1)),
        epoch=_int(value.get("epoch"), "epoch", COUNTER_MAX),
        fingerprint=_match(value.get("routes"), _FINGERPRINT, "routes"),
    )


def _claims(rows: list[Any]) -> tuple[Claim, ...]:
    claims = tuple(Claim(lot, *extra) for lot, extra in unpack(rows, 2, BID_MAX))
    if any(claim.copy >= COPIES_MAX for claim in claims):
        raise FrameError(f"a claim names a copy above {COPIES_MAX - 1}: message ignored")
    return claims


def _spans(rows: list[Any]) -> tuple[tuple[int, int], ...]:
    found: list[tuple[int, int]] = []
    for row in rows:
        if not isinstance(row, list) or len(row) != 2:
            raise FrameError("a span is not [first, stop]: message ignored")
        first = _int(row[0], "first", LAYERS_MAX - 1)
        if found and found[-1][1] > first:
            raise FrameError("spans of a record are not ascending: message ignored")
        found.append((first, _int(row[1], "stop", LAYERS_MAX, least=first + 1)))
    return tuple(found)


def _versions(row: Any) -> Versions:
    return versions_from_json(
        row,
        lambda name: _match(name, _MODEL_NAME, "model name"),
        lambda model: _match(model, _MODEL, "model"),
    )


# ---- leaves --------------------------------------------------------------------------------


def _entry_to_json(entry: Entry) -> list[Any]:
    row = [*entry[:4], int(entry.status)]
    return row if entry.accuser is None else [*row, entry.accuser]


def _entry(row: Any) -> Entry:
    if not isinstance(row, list) or not 5 <= len(row) <= 6:
        raise FrameError("an entry has the wrong shape: message ignored")
    status = Status(_int(row[4], "status", Status.LEFT))
    if len(row) == 6 and status != Status.SUSPECT:
        raise FrameError("an accuser of a device that is not suspected: message ignored")
    return Entry(
        _node(row[0]),
        _int(row[1], "inc", COUNTER_MAX),
        _int(row[2], "seq", COUNTER_MAX),
        _int(row[3], "heartbeat", COUNTER_MAX),
        status,
        _node(row[5]) if len(row) == 6 else None,
    )


def _entries(value: dict[str, Any], key: str) -> tuple[Entry, ...]:
    entries = tuple(_entry(row) for row in _list(value, key, ENTRIES_MAX))
    _distinct((entry.node for entry in entries), key)
    return entries


def _power_of_two(count: int) -> int:
    if count & (count - 1):
        raise FrameError(f"a view in {count} parts, not in a power of two: message ignored")
    return count


def _sums(text: Any) -> tuple[int, ...]:
    _match(text, _SUMS, "sums")
    _power_of_two(len(text) // 8)
    return tuple(int(text[at : at + 8], 16) for at in range(0, len(text), 8))


def _differing(value: dict[str, Any]) -> tuple[int, tuple[int, ...]]:
    if "parts" not in value:
        return 0, ()
    parts = _power_of_two(_int(value["parts"], "parts", PARTS_MAX, least=1))
    indices = tuple(
        _int(item, "differing", parts - 1) for item in _list(value, "differing", PARTS_MAX)
    )
    if any(a >= b for a, b in pairwise(indices)):
        raise FrameError("the parts that differ are not ascending: message ignored")
    return parts, indices


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a number of JSON")
