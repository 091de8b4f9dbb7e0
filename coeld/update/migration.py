"""From the lots this device holds to the lots it won: make before break, never above the budget.

Each lot walks through one table of states; a move that the table does not know is a programming
mistake. A lot that another device won is kept until that device, or any other, serves it. When
memory is short for a lot that nobody serves, room is made in this order: lots won by others that
others serve, own replicas that others serve, and only then lots won by others that nobody else
serves yet (a hole is traded for a hole that is ours to fill). Loading and draining lots count
against the budget, because their bytes are in memory.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from coeld.ids import Lot


class LotState(Enum):
    FREE = "free"
    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "draining"


class Move(Enum):
    LOAD = "load"
    LOADED = "loaded"
    FAILED = "failed"
    DROP = "drop"
    DROPPED = "dropped"


TRANSITIONS: Mapping[tuple[LotState, Move], LotState] = {
    (LotState.FREE, Move.LOAD): LotState.LOADING,
    (LotState.LOADING, Move.LOADED): LotState.SERVING,
    (LotState.LOADING, Move.FAILED): LotState.FREE,
    (LotState.SERVING, Move.DROP): LotState.DRAINING,
    (LotState.DRAINING, Move.DROPPED): LotState.FREE,
}

RETRY_S = 1.0
RETRY_MAX_S = 60.0


@dataclass(frozen=True, slots=True)
class Wish:
    """What the other stages want of this device, and what they know of others."""

    won: Mapping[Lot, int]
    """Lots won here, and which copy."""
    elsewhere: Collection[Lot]
    """Lots that another present device serves."""
    capacity: int
    fill: int
    """What loading may fill up to: less than `capacity` where layers are kept whole, so that room
    is made and filled by whole layers and no layer is torn on the way."""
    urgent: bool
    """The auction rested long enough to load lots that nobody serves."""
    settled: bool
    """It rested long enough for moves and replicas too."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Effects to be: lots to free first, then lots to load."""

    drop: tuple[Lot, ...] = ()
    load: tuple[Lot, ...] = ()


class Migration:
    """The states of this device's lots. Lots that are not mentioned are free."""

    def __init__(self, batch_bytes: int) -> None:
        self._states: dict[Lot, LotState] = {}
        self._batch_bytes = batch_bytes
        self._failures: dict[Lot, tuple[int, float]] = {}

    def _in(self, state: LotState) -> list[Lot]:
        return [lot for lot, held in self._states.items() if held is state]

    @property
    def serving(self) -> tuple[Lot, ...]:
        return tuple(sorted(self._in(LotState.SERVING)))

    @property
    def loading(self) -> tuple[Lot, ...]:
        return tuple(sorted(self._in(LotState.LOADING)))

    @property
    def held(self) -> int:
        """Lots whose bytes are in memory, or will be in a moment."""
        return len(self._states)

    def keeps(self, lot: Lot) -> bool:
        """Is the lot in memory to stay, or about to be?"""
        return self._states.get(lot) in (LotState.LOADING, LotState.SERVING)

    def state(self, lot: Lot) -> LotState:
        return self._states.get(lot, LotState.FREE)

    def barred(self, now: float) -> set[Lot]:
        """Lots that failed to load and are not tried again yet."""
        return {lot for lot, (_, until) in self._failures.items() if until > now}

    def retry_at(self, now: float) -> float:
        """When the next barred lot may be tried again."""
        waiting = [until for _, until in self._failures.values() if until > now]
        return min(waiting, default=float("inf"))

    def apply(self, move: Move, lots: Iterable[Lot]) -> None:
        """Raises KeyError (a programming mistake) on a move that the table does not know."""
        for lot in lots:
            after = TRANSITIONS[self.state(lot), move]
            if after is LotState.FREE:
                del self._states[lot]
            else:
                self._states[lot] = after
            if move is Move.LOADED:
                self._failures.pop(lot, None)

    def failed(self, lots: Iterable[Lot], now: float) -> float:
        """These lots did not load; returns the longest time until they are tried again."""
        longest = 0.0
        for lot in lots:
            times = self._failures.get(lot, (0, 0.0))[0]
            wait_s = min(RETRY_MAX_S, RETRY_S * 2**times)
            self._failures[lot] = (times + 1, now + wait_s)
            longest = max(longest, wait_s)
        self.apply(Move.FAILED, lots)
        return longest

    def engine_lost(self) -> None:
        """Nothing is in memory any more."""
        self._states.clear()
        self._failures.clear()

    def plan(self, wish: Wish, lot_bytes: int) -> Plan:
        """The next drops and the next batch of loads, already applied to the states.

        One batch is in flight at a time, so what is decided while it loads is decided on facts.
        """
        drop = self._surplus(wish)
        room = wish.fill - len(self._states)
        holes, rest = self._wanted(wish)
        if holes and len(holes) > room:
            drop += self._room_for(holes, wish, len(holes) - room - self._draining(drop), drop)
        self.apply(Move.DROP, drop)
        load: list[Lot] = []
        if not self._in(LotState.LOADING):
            wanted = holes or rest
            batch = max(1, self._batch_bytes // max(1, lot_bytes))
            load = wanted[: _to_layer_end(wanted, min(room, batch), room)]
            self.apply(Move.LOAD, load)
        return Plan(tuple(sorted(drop)), tuple(load))

    def _wanted(self, wish: Wish) -> tuple[list[Lot], list[Lot]]:
        """Lots to load now: first those that nobody serves, else moves and replicas."""
        free = sorted(lot for lot in wish.won if lot not in self._states)
        holes = [lot for lot in free if lot not in wish.elsewhere and wish.won[lot] == 0]
        if not wish.settled:
            return (holes if wish.urgent else []), []
        moves = [lot for lot in free if lot in wish.elsewhere and wish.won[lot] == 0]
        return holes, moves + [lot for lot in free if wish.won[lot] > 0]

    def _surplus(self, wish: Wish) -> list[Lot]:
        """Lots that may go at once, and lots that must because the budget shrank."""
        serving = self._in(LotState.SERVING)
        drop = []
        if wish.settled:
            drop = [lot for lot in serving if lot not in wish.won and lot in wish.elsewhere]
        excess = len(self._states) - wish.capacity - self._draining(drop)
        if excess > 0:
            drop += self._room_for([], wish, excess, drop)
        return drop

    def _draining(self, drop: Collection[Lot]) -> int:
        return len(self._in(LotState.DRAINING)) + len(drop)

    def _room_for(
        self, holes: Collection[Lot], wish: Wish, count: int, taken: Collection[Lot]
    ) -> list[Lot]:
        """Up to `count` more lots to drop, those that are missed least first."""
        if count <= 0:
            return []

        def pain(lot: Lot) -> int:
            if lot in wish.elsewhere:
                return 0 if lot not in wish.won else 1 if wish.won[lot] > 0 else 2
            return 3 if lot not in wish.won else 4

        victims = [lot for lot in self._in(LotState.SERVING) if lot not in taken]
        ceiling = 3 if holes else 4  # for a hole of ours never open one that is ours as well
        ranked = sorted((pain(lot), lot) for lot in victims if pain(lot) <= ceiling)
        return [lot for _, lot in ranked[:count]]


def _to_layer_end(lots: list[Lot], count: int, room: int) -> int:
    """`count`, or as many more as complete the last lot's layer: layers are served whole."""
    while 0 < count < min(room, len(lots)) and lots[count].layer == lots[count - 1].layer:
        count += 1
    return max(0, count)
