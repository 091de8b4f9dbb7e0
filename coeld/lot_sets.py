"""Sets of lots as they travel in records: in few bytes, checked when they arrive. Pure.

Whole layers are runs of neighbours, [layer, first, count, …]. Where an auction scatters the experts
of a layer over devices, one row names them all by bits in hexadecimal, [layer, first, "1f03", …]:
bit i (the lowest first) stands for expert first + i. Lots with other extra numbers, of a claim, go
into rows of their own. What arrives is bounded before it grows, and names no lot twice.
"""

import re
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, Final

from coeld.errors import FrameError
from coeld.ids import Lot
from coeld.json_values import integer
from coeld.routes import EXPERTS_PER_LAYER_MAX, LAYERS_MAX

LOTS_PER_RECORD_MAX: Final = 32768
"""A device may hold all of the largest models there are: 48 layers of 512 experts, 60 of 384."""
RUN_CHARS: Final = 8
"""A row that names one run of a layer takes at least so many more than its extras do."""

_BITS: Final = re.compile(rf"[0-9a-f]{{1,{EXPERTS_PER_LAYER_MAX // 4}}}\Z")

Row = list[int | str]


def lot_runs(lots: Iterable[Lot]) -> list[list[int]]:
    """Sorted lots as rows [layer, first expert, count]: for people."""
    rows: list[list[int]] = []
    for layer, expert in lots:
        last = rows[-1] if rows else None
        if last and last[0] == layer and last[1] + last[2] == expert:
            last[2] += 1
        else:
            rows.append([layer, expert, 1])
    return rows


def pack(items: Iterable[tuple[Lot, tuple[int, ...]]]) -> list[Row]:
    """Sorted lots with extra numbers as rows that `unpack` reads."""
    groups: dict[tuple[int, tuple[int, ...]], list[Lot]] = {}
    for lot, extra in items:
        groups.setdefault((lot.layer, extra), []).append(lot)
    rows: list[Row] = []
    for (layer, extra), lots in groups.items():
        runs, first = lot_runs(lots), lots[0].expert
        if (lots[-1].expert - first) // 4 >= RUN_CHARS * (len(runs) - 1):
            rows += [[*run, *extra] for run in runs]
        else:
            bits = sum(1 << lot.expert - first for lot in lots)
            rows.append([layer, first, f"{bits:x}", *extra])
    return rows


def unpack(rows: list[Any], extras: int, extra_max: int) -> list[tuple[Lot, tuple[int, ...]]]:
    """Lots, sorted, each with `extras` numbers of at most `extra_max`. Raises FrameError."""
    lots: list[tuple[Lot, tuple[int, ...]]] = []
    for row in rows:
        if not isinstance(row, list) or len(row) != 3 + extras:
            raise FrameError("a row of lots has the wrong shape: message ignored")
        layer = integer(row[0], "layer", LAYERS_MAX - 1)
        first = integer(row[1], "expert", EXPERTS_PER_LAYER_MAX - 1)
        extra = tuple(integer(item, "claim", extra_max) for item in row[3:])
        experts = _experts(row[2], first)
        if len(lots) + len(experts) > LOTS_PER_RECORD_MAX:
            raise FrameError(f"a record names more than {LOTS_PER_RECORD_MAX} lots: ignored")
        lots.extend((Lot(layer, expert), extra) for expert in experts)
    lots.sort()
    if any(a[0] == b[0] for a, b in pairwise(lots)):
        raise FrameError("a record names a lot twice: message ignored")
    return lots


def _experts(which: Any, first: int) -> list[int] | range:
    """Experts from `first` on: a count, or bits."""
    if not isinstance(which, str):
        count = integer(which, "count", EXPERTS_PER_LAYER_MAX - first, least=1)
        return range(first, first + count)
    if not _BITS.match(which):
        raise FrameError(f"{which[:24]!r} does not name experts: message ignored")
    bits = int(which, 16)
    if not bits or first + bits.bit_length() > EXPERTS_PER_LAYER_MAX:
        raise FrameError("bits name no expert, or one that cannot be: message ignored")
    return [first + i for i, bit in enumerate(reversed(f"{bits:b}")) if bit == "1"]
