"""What a call to a peer usually takes, and from when on it is late. Pure; time is handed in.

Per peer and number of rows (in powers of two) a smoothed mean and a smoothed mean deviation, as TCP
estimates its round trips (Jacobson 1988; RFC 6298): late is what exceeds the mean by four
deviations. Unlike there the memory is also bounded in time, about MEMORY_S: a peer that is asked
once a second is believed at once, one that answers a thousand calls a second is averaged over the
last eight.

Packets that get lost make both useless: most calls are quick then, and a few take a hundred times
as long. So there is also a time that one call in four stays below.

How long a call with many rows may take before its peer counts as gone nobody knows beforehand: a
slow device needs a hundred times as long as a quick one. Each row and layer is allowed ROW_LAYER_S,
twice as long after every call that this was too little for, and from the first answer on twice what
that took.

A peer that still owes an answer, because another was quicker, is expected to need at least as long
as it has been silent already.
"""

from dataclasses import dataclass, field
from math import exp
from typing import Final

from coeld.datapath.losses import Losses
from coeld.ids import NodeId

GAIN: Final = 1 / 8
DEVIATION_GAIN: Final = 1 / 4
LATE_DEVIATIONS: Final = 4
"""All four of RFC 6298."""
MEMORY_S: Final = 0.5
LATE_FACTOR: Final = 2.0
LATE_S_MIN: Final = 0.003
"""Above the mean: shorter waits are the operating system's, not the peer's."""
QUARTER_DOWN: Final = 0.91
QUARTER_UP: Final = 1.03
"""Steps after calls that took less, and more: three of these undo one of those."""
ROW_LAYER_S: Final = 0.005
"""What a deadline allows at least for each row and layer: computing, the link, others before us."""
ROW_LAYER_S_MAX: Final = 0.1
ALLOWED_FACTOR: Final = 2.0
TELLING: Final = 64
"""Rows times layers of a call that tells what one takes; of smaller ones the link is too large a
part."""


@dataclass(slots=True)
class Pace:
    """Calls of one size to one peer."""

    mean_s: float
    deviation_s: float
    at_s: float
    """When it was last heard."""
    quarter_s: float = 0.0
    """A quarter of the calls take less."""

    def __post_init__(self) -> None:
        self.quarter_s = self.mean_s

    def add(self, took_s: float, now_s: float) -> None:
        old = 1 - exp(-max(now_s - self.at_s, 0.0) / MEMORY_S)
        error_s = took_s - self.mean_s
        gain = max(DEVIATION_GAIN, old)
        self.deviation_s += gain * (abs(error_s) - self.deviation_s)
        self.mean_s += max(GAIN, old) * error_s
        self.at_s = now_s
        self.quarter_s *= QUARTER_DOWN if took_s < self.quarter_s else QUARTER_UP

    @property
    def late_s(self) -> float:
        """A call that takes longer is late."""
        late_s = self.mean_s + LATE_DEVIATIONS * self.deviation_s
        return max(late_s, LATE_FACTOR * self.mean_s, self.mean_s + LATE_S_MIN)


@dataclass(slots=True)
class Paces:
    """All peers of one decoder. At most one entry per peer and power of two."""

    losses: Losses = field(default_factory=Losses)
    _known: dict[tuple[NodeId, int], Pace] = field(default_factory=dict)
    _owing: dict[NodeId, float] = field(default_factory=dict)
    _row_layer_s: dict[NodeId, float] = field(default_factory=dict)

    def allowed_s(self, node: NodeId, row_layers: int) -> float:
        """For a call with so many rows, times layers, beyond the deadline of an empty one."""
        return row_layers * self._row_layer_s.get(node, ROW_LAYER_S)

    def overran(self, node: NodeId, row_layers: int) -> None:
        """A call was not answered in the time that was allowed. With few rows that was not for
        them: the peer is frozen, or gone."""
        before_s = self._row_layer_s.get(node, ROW_LAYER_S)
        if row_layers >= TELLING:
            self._row_layer_s[node] = min(ALLOWED_FACTOR * before_s, ROW_LAYER_S_MAX)

    def needed(self, node: NodeId, took_s: float, row_layers: int) -> None:
        """A call was answered after `took_s`."""
        if row_layers >= TELLING:
            needed_s = ALLOWED_FACTOR * took_s / row_layers
            self._row_layer_s[node] = min(max(ROW_LAYER_S, needed_s), ROW_LAYER_S_MAX)

    def took(self, node: NodeId, rows: int, took_s: float, now_s: float) -> None:
        """A call with that many rows was answered, or given up, after `took_s`."""
        pace = self.of(node, rows)
        if pace is None:
            self._known[node, _size(rows)] = Pace(took_s, took_s / 2, now_s)
        else:
            pace.add(took_s, now_s)

    def of(self, node: NodeId, rows: int) -> Pace | None:
        return self._known.get((node, _size(rows)))

    def owes(self, node: NodeId, since_s: float) -> None:
        """Its answer to a call begun at `since_s` is no longer waited for."""
        self._owing.setdefault(node, since_s)

    def settled(self, node: NodeId) -> None:
        """It owes nothing any more."""
        self._owing.pop(node, None)

    def owing(self, node: NodeId) -> bool:
        return node in self._owing

    def expected_s(self, node: NodeId, rows: int, now_s: float) -> float | None:
        """What a call begun now should take; None: never measured."""
        pace = self.of(node, rows)
        if pace is None:
            return None
        silent_s = now_s - self._owing.get(node, now_s)
        return pace.mean_s + silent_s


def _size(rows: int) -> int:
    """1, 2, 3 to 4, 5 to 8, …, 129 to 256, … rows."""
    return (rows - 1).bit_length()
