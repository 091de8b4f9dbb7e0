"""Frames of the data path: a fixed header, then experts and rows. Pure, bounded, versioned.

    offset  size  field
    0       4     magic "CoEL"
    4       1     version (5)
    5       1     kind: HELLO 1, EXPERTS 2, RESULT 3, ERROR 4, SPAN 5, FREE 6, PING 7
    6       1     codec of the rows (coeld.compression.wire): 0 none, 1 float32, …
    7       1     flags: 1 gate weights are there, 2 the next call may refer to these rows
    8       4     call id: a RESULT or ERROR repeats that of its request
    12      2     layer; of a SPAN the first one
    14      2     experts: how many expert ids precede the rows; of a SPAN how many layers
    16      4     rows
    20      4     hidden: values per row
    24      4     payload bytes after this header
    28      4     float32 error: of EXPERTS, SPAN: what the answer may make; of RESULT: what it made

All little-endian. EXPERTS carries `experts` uint16 ids, padded to a multiple of 4 bytes, then, with
the flag, the gate weights (rows, experts) float32, then the rows once; RESULT carries uint32
microseconds of compute, then one row per row: the sum over those experts of gate weight (without
the flag: 1) times output. HELLO and ERROR carry JSON. Rows travel as their codec says. Those of
STEPS_AHEAD refer to the EXPERTS before on this connection, which must have had flag 2 (for rows in
steps only) and a RESULT.

SPAN asks for whole layers, attention and KV cache included: three uint32 (the caller's number of
the request; its position: tokens that the cache there holds; how many of the last rows to answer
with), then the rows of the residual stream, the experts of the layer before included. Position 0
begins a new cache. RESULT carries the residual stream after the last of the layers. FREE names a
request in the place of the call id, lets its caches go, carries nothing and is not answered. PING
carries nothing and is answered by itself: a round trip that is measured.
"""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from coeld.compression.prediction import Past
from coeld.compression.transfer import Coded
from coeld.compression.wire import ERROR_MAX, STEPS, Codec, decode, payload_bytes
from coeld.errors import CacheLost, FrameError, PeerError, PeerRefused
from coeld.routes import EXPERTS_PER_LAYER_MAX, LAYERS_MAX

MAGIC: Final = b"CoEL"
VERSION: Final = 5
HEADER: Final = struct.Struct("<4sBBBBIHHIIIf")
ROWS_MAX: Final = 512
"""Twice a prompt chunk; what a peer can make the arena of activations grow by."""
HIDDEN_MAX: Final = 32768
PAYLOAD_BYTES_MAX: Final = 64 << 20
"""All rows of the widest model; what a peer can make us allocate per connection."""
TEXT_BYTES_MAX: Final = 4096
POSITION_MAX: Final = 1 << 24
"""Tokens in a cache: more than any context."""
GATED, KEPT = 1, 2
"""Flags."""
SPAN_HEAD: Final = struct.Struct("<III")
COMPUTED: Final = struct.Struct("<I")


class Kind(IntEnum):
    """Append only."""

    HELLO = 1
    EXPERTS = 2
    RESULT = 3
    ERROR = 4
    SPAN = 5
    FREE = 6
    PING = 7


BEFORE_ROWS: Final = {Kind.SPAN: SPAN_HEAD.size, Kind.RESULT: COMPUTED.size}
"""Bytes of numbers at the beginning of the payload."""


class Header(NamedTuple):
    """A checked header. A tuple, because one is made for every frame."""

    kind: Kind
    call_id: int
    layer: int
    experts: int
    rows: int
    hidden: int
    payload_bytes: int
    gated: bool = False
    """Gate weights precede the rows."""
    kept: bool = False
    """Both ends keep rows and answer: the next call's rows may refer to them."""
    codec: Codec = Codec.FLOAT32
    error: float = 0.0
    """Relative, of rows: see above."""


@dataclass(frozen=True, slots=True)
class SpanCall:
    """What a SPAN asks for."""

    number: int
    """The caller's number of the request."""
    position: int
    """Tokens that the request's cache holds already."""
    first: int
    stop: int
    keep: int
    """How many of the last rows are wanted back: 1 to all."""


def parse_header(data: bytes | bytearray | memoryview) -> Header:
    """HEADER.size bytes to a Header. Raises FrameError if any field is out of its limits."""
    (
        magic, version, kind, dtype, flags, call_id, layer, experts, rows, hidden, size, error
    ) = HEADER.unpack(data)  # fmt: skip
    if magic != MAGIC:
        raise FrameError("not a coeld data connection: the magic bytes are wrong")
    if version != VERSION:
        raise FrameError(f"the peer speaks version {version} of the data path, this one {VERSION}")
    if not 0 <= error <= ERROR_MAX:  # not so for NaN
        raise FrameError(f"frame out of limits: a relative error of {error}")
    if layer + (experts if kind == Kind.SPAN else 1) > LAYERS_MAX:
        raise FrameError(f"frame out of limits: layer {layer}")
    plain = layer == 0 and error == 0
    what, codec = _checked(kind, dtype, flags, experts, rows, hidden, size, plain)
    return Header(
        what, call_id, layer, experts, rows, hidden, size,
        bool(flags & GATED), bool(flags & KEPT), codec, error,
    )  # fmt: skip


@lru_cache(maxsize=512)
def _checked(
    kind: int,
    dtype: int,
    flags: int,
    experts: int,
    rows: int,
    hidden: int,
    size: int,
    plain: bool,
) -> tuple[Kind, Codec]:
    """Kind and codec of a header whose numbers may stand together; the same come again and again.
    `plain`: layer and error are 0. Raises FrameError."""
    try:
        what, codec = Kind(kind), Codec(dtype or Codec.FLOAT32)
    except ValueError:
        raise FrameError(f"unknown kind of frame {kind}, or unknown codec {dtype}") from None
    if what in (Kind.EXPERTS, Kind.RESULT, Kind.SPAN):
        gates_bytes = 4 * rows * experts if flags & GATED else 0
        ids_bytes = _padded(2 * experts) if what is Kind.EXPERTS else 0
        before = BEFORE_ROWS.get(what, 0) + ids_bytes + gates_bytes
        least, most = payload_bytes(codec, rows, hidden)
        least, most = before + least, before + most
        fits = 0 < rows <= ROWS_MAX and 0 < hidden <= HIDDEN_MAX and dtype > 0
        fits = fits and (codec is not Codec.STEPS_AHEAD or what is Kind.EXPERTS)
        fits = fits and experts <= EXPERTS_PER_LAYER_MAX
        fits = fits and (experts > 0) == (what is not Kind.RESULT)
    elif what in (Kind.FREE, Kind.PING):
        least = most = 0
        fits = plain and dtype == experts == rows == hidden == 0
    else:
        least, most, fits = size, size, size <= TEXT_BYTES_MAX and plain and dtype == 0
    flagged = flags == 0 or (flags <= GATED | KEPT and what is Kind.EXPERTS)
    flagged = flagged and (codec in STEPS or not flags & KEPT)
    if not flagged or not fits or not least <= size <= most or size > PAYLOAD_BYTES_MAX:
        raise FrameError(
            f"frame out of limits: {what.name} with {experts} experts, {rows} rows of {hidden}, "
            f"{size} bytes"
        )
    return what, codec


def pack_experts(
    call_id: int,
    layer: int,
    experts: Sequence[int],
    x: NDArray[np.float32],
    gates: NDArray[np.float32] | None = None,
    coded: Coded | None = None,
    answer_error: float = 0.0,
    keep: bool = False,
) -> list[bytes | memoryview]:
    """An EXPERTS frame in pieces for scatter/gather sending; x (n, H) is not copied.

    `gates` (n, len(experts)), None: all 1. `coded` is `x` encoded, None: float32; the answer may
    err by `answer_error`; `keep`: the next call may refer to these rows.
    """
    ids = _ids(len(experts)).pack(*experts)
    weights = b"" if gates is None else gates.astype("<f4", copy=False).tobytes()
    rows, hidden = x.shape
    codec, pieces = _pieces(x, coded)
    size = len(ids) + len(weights) + sum(map(len, pieces))
    flags, count = GATED * (gates is not None) | KEPT * keep, len(experts)
    head = HEADER.pack(
        MAGIC, VERSION, Kind.EXPERTS, codec, flags, call_id, layer, count, rows, hidden, size,
        answer_error,
    )  # fmt: skip
    return [head + ids + weights, *pieces]


def pack_result(
    call_id: int,
    layer: int,
    y: NDArray[np.float32],
    computed_us: int = 0,
    coded: Coded | None = None,
) -> list[bytes | memoryview]:
    """A RESULT frame for y (n, H), which took `computed_us` here; `coded` is `y` encoded."""
    rows, hidden = y.shape
    codec, pieces = _pieces(y, coded)
    size = COMPUTED.size + sum(map(len, pieces))
    error = min(coded[1].error, ERROR_MAX) if coded is not None else 0.0
    head = HEADER.pack(
        MAGIC, VERSION, Kind.RESULT, codec, 0, call_id, layer, 0, rows, hidden, size, error
    )
    took = COMPUTED.pack(min(computed_us, 0xFFFFFFFF))
    return [head + took, *pieces]


def pack_span(
    call_id: int,
    call: SpanCall,
    x: NDArray[np.float32],
    coded: Coded | None = None,
    answer_error: float = 0.0,
) -> list[bytes | memoryview]:
    """A SPAN frame for x (n, H), which is not copied; `coded` and `answer_error` as above."""
    rows, hidden = x.shape
    codec, pieces = _pieces(x, coded)
    layers, size = call.stop - call.first, SPAN_HEAD.size + sum(map(len, pieces))
    head = HEADER.pack(
        MAGIC, VERSION, Kind.SPAN, codec, 0, call_id, call.first, layers, rows, hidden, size,
        answer_error,
    )  # fmt: skip
    numbers = SPAN_HEAD.pack(call.number, call.position, call.keep)
    return [head + numbers, *pieces]


def pack_free(number: int) -> list[bytes | memoryview]:
    """A FREE frame for the caller's request `number`."""
    return [HEADER.pack(MAGIC, VERSION, Kind.FREE, 0, 0, number, 0, 0, 0, 0, 0, 0.0)]


def pack_ping(call_id: int) -> list[bytes | memoryview]:
    """A PING frame, which its receiver sends back."""
    return [HEADER.pack(MAGIC, VERSION, Kind.PING, 0, 0, call_id, 0, 0, 0, 0, 0, 0.0)]


def pack_text(kind: Kind, call_id: int, value: dict[str, Any]) -> list[bytes | memoryview]:
    """A HELLO or ERROR frame. Long texts are cut to fit."""
    payload = json.dumps(value).encode()
    if len(payload) > TEXT_BYTES_MAX:
        payload = json.dumps({key: str(value[key])[:256] for key in list(value)[:8]}).encode()
    head = HEADER.pack(MAGIC, VERSION, kind, 0, 0, call_id, 0, 0, 0, 0, len(payload), 0.0)
    return [head, payload]


def unpack_experts(
    header: Header, payload: memoryview, past: Past | None = None
) -> tuple[tuple[int, ...], NDArray[np.float32], NDArray[np.float32] | None]:
    """Expert ids (m,), rows (n, H) and gate weights (n, m), None: all 1. Gate weights and float32
    rows are views of `payload`.

    Raises FrameError on repeated ids, on NaN or Inf, on negative gate weights, and on rows that
    refer to a past which is not `past`.
    """
    ids = _ids(header.experts)
    experts: tuple[int, ...] = ids.unpack_from(payload)
    if len(set(experts)) != header.experts:
        raise FrameError("an expert is named twice")
    gates = None
    at = ids.size
    if header.gated:
        gates = np.frombuffer(payload, "<f4", header.rows * header.experts, at)
        # Not so for NaN either.
        if not (np.minimum.reduce(gates) >= 0 and np.maximum.reduce(gates) < np.inf):
            raise FrameError("gate weights are negative, NaN or Inf")
        gates = gates.reshape(header.rows, header.experts)
        at += gates.nbytes
    return experts, _rows(header, payload[at:], past), gates


def unpack_result(header: Header, payload: memoryview) -> tuple[NDArray[np.float32], int]:
    """Rows (n, H), a view of `payload`, and the microseconds they took the peer. Raises FrameError
    on NaN or Inf."""
    (computed_us,) = COMPUTED.unpack_from(payload)
    return _rows(header, payload[COMPUTED.size :]), computed_us


def unpack_span(header: Header, payload: memoryview) -> tuple[SpanCall, NDArray[np.float32]]:
    """What is asked for, and the rows (n, H), a view of `payload`. Raises FrameError on numbers
    that cannot be, on NaN and Inf."""
    number, position, keep = SPAN_HEAD.unpack_from(payload)
    if position + header.rows > POSITION_MAX or not 0 < keep <= header.rows:
        raise FrameError(f"a span at position {position} of {header.rows} rows that keeps {keep}")
    call = SpanCall(number, position, header.layer, header.layer + header.experts, keep)
    return call, _rows(header, payload[SPAN_HEAD.size :])


def unpack_text(payload: memoryview) -> dict[str, Any]:
    """The JSON of a HELLO or ERROR. Raises FrameError."""
    try:
        value = json.loads(bytes(payload))
    except (ValueError, RecursionError) as exc:
        raise FrameError("a text frame is not JSON") from exc
    if not isinstance(value, dict):
        raise FrameError("a text frame is not an object")
    return value


def pack_refusal(call_id: int, exc: PeerError) -> list[bytes | memoryview]:
    """The ERROR frame that `refusal` turns into the same kind of error."""
    lost = {"lost": True} if isinstance(exc, CacheLost) else {}
    return pack_text(Kind.ERROR, call_id, {**lost, "message": str(exc)})


def refusal(payload: memoryview) -> PeerRefused:
    """The error in an ERROR frame."""
    value = unpack_text(payload)
    kind = CacheLost if value.get("lost") else PeerRefused
    return kind(str(value.get("message", "no reason given")))


def _rows(header: Header, payload: memoryview, past: Past | None = None) -> NDArray[np.float32]:
    if header.codec is not Codec.FLOAT32:
        out = np.empty((header.rows, header.hidden), np.float32)
        decode(header.codec, payload, out, past)
        return out
    rows = np.frombuffer(payload, "<f4", header.rows * header.hidden)
    if not np.logical_and.reduce(np.isfinite(rows)):
        raise FrameError("rows contain NaN or Inf")
    return rows.reshape(header.rows, header.hidden)


def _pieces(x: NDArray[np.float32], coded: Coded | None) -> tuple[Codec, list[memoryview]]:
    if coded is not None:
        return coded[0], list(coded[1].pieces)
    return Codec.FLOAT32, [np.ascontiguousarray(x).data.cast("B")]


@lru_cache(maxsize=EXPERTS_PER_LAYER_MAX + 1)
def _ids(count: int) -> struct.Struct:
    """Of so many expert ids, with what pads them."""
    return struct.Struct(f"<{count}H{_padded(2 * count) - 2 * count}x")


def _padded(size: int) -> int:
    return size + -size % 4
