"""Which of several equal owners is asked, and when a second one is asked as well. Pure.

Replicas that hold all that is asked give the same bits, so the choice is free. The route table's
order stands (the auction weighed what calls cost) unless another owner is clearly quicker by what
their calls took: a device that turned slow is passed over after one or two late answers.

Who is passed over must be heard again, or it would stay so for ever: with few rows it is asked
*along with* the quick one, once a second, which costs a little work and no time; with many rows it
is asked first again after ten seconds, and the quick one follows when it is late. An owner that was
never measured is asked along once.

A call that is late is asked again at the next best owner ("hedged request": Dean and Barroso, The
Tail at Scale, 2013); the first answer wins. At most one call in ten is: on a network that is slow
everywhere, twice the calls would make it slower still. Where packets get lost (`losses.py`) a small
call is asked again and again over other connections, by turns at all owners, until one answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from coeld.datapath.pace import LATE_FACTOR, Paces
from coeld.ids import NodeId

CLEARLY: Final = 1.3
"""An owner is passed over when its calls take this many times those of another."""
PROBE_S: Final = 1.0
PROBE_ROWS_MAX: Final = 16
RETRY_S: Final = 10.0
SECOND_SHARE: Final = 0.1
SECOND_BURST: Final = 10.0
"""Second calls saved up at most: a device that has just turned slow, before that is known."""
SECONDS_PER_LOSS: Final = 4
"""Earned by a packet that was sent again: as often an answer was lost, and what is sent instead may
be lost too."""
LOSSY_S_MIN: Final = 0.008
"""Where packets get lost, a call is late after this time at the earliest."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Owners of the same lots, in the order in which they are to be asked."""

    nodes: tuple[NodeId, ...]
    along: bool
    """Ask the second one at once as well."""
    late_s: float
    """Ask the next one when there is no answer after this time; inf: never."""
    again_s: float = float("inf")
    """Then one more each time that this time has passed; inf: no more."""


def choose(nodes: Sequence[NodeId], rows: int, paces: Paces, now_s: float) -> Choice:
    """Order owners (at least one, the route table's favourite first) for a call with `rows`."""
    ranked = list(nodes)
    lossy_s = _lossy_s(ranked, rows, paces, now_s)
    if len(ranked) == 1:
        return Choice((ranked[0],), False, lossy_s, lossy_s)
    favourite = ranked[0]
    expected = {node: paces.expected_s(node, rows, now_s) for node in nodes}
    known = {node: s for node, s in expected.items() if s is not None}
    if favourite in known and len(known) > 1:
        quickest = min(known, key=lambda node: known[node])
        if known[favourite] > CLEARLY * known[quickest] and not _due(favourite, rows, paces, now_s):
            ranked.sort(key=lambda node: known.get(node, known[favourite]))
    along = rows <= PROBE_ROWS_MAX and _worth_hearing(ranked, favourite, rows, paces, now_s)
    late_s = min(lossy_s, _late_s(ranked, rows, paces))
    return Choice(tuple(ranked), along, late_s, lossy_s)


def _due(favourite: NodeId, rows: int, paces: Paces, now_s: float) -> bool:
    """Has it been passed over so long with many rows that it is tried again?"""
    pace = paces.of(favourite, rows)
    assert pace is not None
    silent = now_s - pace.at_s >= RETRY_S and not paces.owing(favourite)
    return rows > PROBE_ROWS_MAX and silent


def _worth_hearing(
    ranked: list[NodeId], favourite: NodeId, rows: int, paces: Paces, now_s: float
) -> bool:
    """Move to the second place who was passed over or never measured, if it is time to hear it."""
    passed = [favourite] if ranked[0] != favourite else []
    for node in [*passed, *ranked[1:]]:
        pace = paces.of(node, rows)
        overdue = node in passed and pace is not None and now_s - pace.at_s >= PROBE_S
        if (pace is None or overdue) and not paces.owing(node):
            ranked.remove(node)
            ranked.insert(1, node)
            return True
    return False


def _late_s(ranked: Sequence[NodeId], rows: int, paces: Paces) -> float:
    """By the pace of the first; if it has none, or a slower one than the next, by that one's."""
    paced = [pace.late_s for node in ranked[:2] if (pace := paces.of(node, rows)) is not None]
    return min(paced) if paced and len(ranked) > 1 else float("inf")


def _lossy_s(nodes: Sequence[NodeId], rows: int, paces: Paces, now_s: float) -> float:
    """After what time a call is late that would have been answered if no packet had been lost; inf:
    none are lost, or the call is so large that more of them would be lost for it."""
    if rows > PROBE_ROWS_MAX or not paces.losses.lossy(nodes, now_s):
        return float("inf")
    paced = [pace.quarter_s for node in nodes if (pace := paces.of(node, rows)) is not None]
    return max(LOSSY_S_MIN, LATE_FACTOR * min(paced)) if paced else float("inf")


@dataclass(slots=True)
class Seconds:
    """How many second calls may be made: a share of the first ones, and some per lost packet."""

    saved: float = SECOND_BURST
    _lost_packets: int = 0

    def first(self) -> None:
        self.saved = min(self.saved + SECOND_SHARE, SECOND_BURST)

    def lost(self, packets: int) -> None:
        """So many packets have been lost so far."""
        earned = SECONDS_PER_LOSS * (packets - self._lost_packets)
        self._lost_packets = packets
        self.saved = min(self.saved + earned, SECOND_BURST)

    def take(self) -> bool:
        """Whether one more is allowed; counts it."""
        if self.saved < 1:
            return False
        self.saved -= 1
        return True
