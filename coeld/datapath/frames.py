"""Frames of the data path: a fixed header, then experts and rows. Pure, bounded, versioned.

    offset  size  field
    0       4     magic "CoEL"
    4       1     version (2)
    5       1     kind: HELLO 1, EXPERTS 2, RESULT 3, ERROR 4
    6       1     dtype of the rows: 0 none, 1 float32
    7       1     flags: 1 if gate weights are there
    8       4     call id: a RESULT or ERROR repeats that of its request
    12      2     layer
    14      2     experts: how many expert ids precede the rows
    16      4     rows
    20      4     hidden: values per row
    24      4     payload bytes after this header

All little-endian. EXPERTS carries `experts` uint16 ids, padded to a multiple of 4 bytes, then, with
the flag, the gate weights (rows, experts) float32, then the rows once; RESULT carries one row per
row: the sum over those experts of gate weight (without the flag: 1) times output. HELLO and ERROR
carry JSON. Rows travel as float32: exact mode.
"""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coeld.errors import FrameError, PeerRefused
from coeld.routes import EXPERTS_PER_LAYER_MAX, LAYERS_MAX

MAGIC: Final = b"CoEL"
VERSION: Final = 2
HEADER: Final = struct.Struct("<4sBBBBIHHIII")
ROWS_MAX: Final = 512
"""Twice a prompt chunk; what a peer can make the arena of activations grow by."""
HIDDEN_MAX: Final = 32768
PAYLOAD_BYTES_MAX: Final = 64 << 20
"""All rows of the widest model; what a peer can make us allocate per connection."""
TEXT_BYTES_MAX: Final = 4096


class Kind(IntEnum):
    """Append only."""

    HELLO = 1
    EXPERTS = 2
    RESULT = 3
    ERROR = 4


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header."""

    kind: Kind
    call_id: int
    layer: int
    experts: int
    rows: int
    hidden: int
    payload_bytes: int
    gated: bool = False
    """Gate weights precede the rows."""

    @property
    def ids_bytes(self) -> int:
        return _padded(2 * self.experts)

    @property
    def gates_bytes(self) -> int:
        return 4 * self.rows * self.experts if self.gated else 0


def parse_header(data: bytes | bytearray | memoryview) -> Header:
    """HEADER.size bytes to a Header. Raises FrameError if any field is out of its limits."""
    magic, version, kind, dtype, flags, call_id, layer, experts, rows, hidden, size = HEADER.unpack(
        data
    )
    if magic != MAGIC:
        raise FrameError("not a coeld data connection: the magic bytes are wrong")
    if version != VERSION:
        raise FrameError(f"the peer speaks version {version} of the data path, this one {VERSION}")
    try:
        header = Header(Kind(kind), call_id, layer, experts, rows, hidden, size, flags == 1)
    except ValueError:
        raise FrameError(f"unknown kind of frame {kind}") from None
    if header.kind in (Kind.EXPERTS, Kind.RESULT):
        expected = header.ids_bytes + header.gates_bytes + 4 * rows * hidden
        fits = 0 < rows <= ROWS_MAX and 0 < hidden <= HIDDEN_MAX and dtype == 1
        counts = layer < LAYERS_MAX and experts <= EXPERTS_PER_LAYER_MAX
        fits = fits and counts and (experts > 0) == (header.kind is Kind.EXPERTS)
    else:
        expected, fits = size, size <= TEXT_BYTES_MAX and dtype == 0
    flagged = flags == 0 or (flags == 1 and header.kind is Kind.EXPERTS)
    if not flagged or not fits or size != expected or size > PAYLOAD_BYTES_MAX:
        raise FrameError(
            f"frame out of limits: {header.kind.name} with {experts} experts, {rows} rows of "
            f"{hidden}, {size} bytes"
        )
    return header


def pack_experts(
    call_id: int,
    layer: int,
    experts: Sequence[int],
    x: NDArray[np.float32],
    gates: NDArray[np.float32] | None = None,
) -> list[bytes | memoryview]:
    """An EXPERTS frame in pieces for scatter/gather sending; x (n, H) is not copied.

    `gates` (n, len(experts)), None: all 1.
    """
    ids = np.asarray(experts, "<u2").tobytes()
    ids = ids.ljust(_padded(len(ids)), b"\0")
    weights = b"" if gates is None else gates.astype("<f4", copy=False).tobytes()
    rows, hidden = x.shape
    size = len(ids) + len(weights) + x.nbytes
    flags, count = int(gates is not None), len(experts)
    head = HEADER.pack(
        MAGIC, VERSION, Kind.EXPERTS, 1, flags, call_id, layer, count, rows, hidden, size
    )
    return [head + ids + weights, np.ascontiguousarray(x).data.cast("B")]


def pack_result(call_id: int, layer: int, y: NDArray[np.float32]) -> list[bytes | memoryview]:
    """A RESULT frame for y (n, H)."""
    rows, hidden = y.shape
    head = HEADER.pack(MAGIC, VERSION, Kind.RESULT, 1, 0, call_id, layer, 0, rows, hidden, y.nbytes)
    return [head, np.ascontiguousarray(y).data.cast("B")]


def pack_text(kind: Kind, call_id: int, value: dict[str, Any]) -> list[bytes | memoryview]:
    """A HELLO or ERROR frame. Long texts are cut to fit."""
    payload = json.dumps(value).encode()
    if len(payload) > TEXT_BYTES_MAX:
        payload = json.dumps({key: str(value[key])[:256] for key in list(value)[:8]}).encode()
    return [HEADER.pack(MAGIC, VERSION, kind, 0, 0, call_id, 0, 0, 0, 0, len(payload)), payload]


def unpack_experts(
    header: Header, payload: memoryview
) -> tuple[tuple[int, ...], NDArray[np.float32], NDArray[np.float32] | None]:
    """Expert ids (m,), rows (n, H) and gate weights (n, m), views of `payload`; None: all 1.

    Raises FrameError on repeated ids, on NaN or Inf, and on negative gate weights.
    """
    experts = tuple(np.frombuffer(payload, "<u2", header.experts).tolist())
    if len(set(experts)) != header.experts:
        raise FrameError("an expert is named twice")
    gates = None
    at = header.ids_bytes
    if header.gated:
        gates = np.frombuffer(payload, "<f4", header.rows * header.experts, at)
        if not np.isfinite(gates).all() or gates.min() < 0:
            raise FrameError("gate weights are negative, NaN or Inf")
        gates = gates.reshape(header.rows, header.experts)
    return experts, _rows(header, payload[at + header.gates_bytes :]), gates


def unpack_result(header: Header, payload: memoryview) -> NDArray[np.float32]:
    """Rows (n, H), a view of `payload`. Raises FrameError on NaN or Inf."""
    return _rows(header, payload)


def unpack_text(payload: memoryview) -> dict[str, Any]:
    """The JSON of a HELLO or ERROR. Raises FrameError."""
    try:
        value = json.loads(bytes(payload))
    except (ValueError, RecursionError) as exc:
        raise FrameError("a text frame is not JSON") from exc
    if not isinstance(value, dict):
        raise FrameError("a text frame is not an object")
    return value


def refusal(payload: memoryview) -> PeerRefused:
    """The error in an ERROR frame."""
    return PeerRefused(str(unpack_text(payload).get("message", "no reason given")))


def _rows(header: Header, payload: memoryview) -> NDArray[np.float32]:
    rows = np.frombuffer(payload, "<f4", header.rows * header.hidden)
    if not np.isfinite(rows).all():
        raise FrameError("rows contain NaN or Inf")
    return rows.reshape(header.rows, header.hidden)


def _padded(size: int) -> int:
    return size + -size % 4
