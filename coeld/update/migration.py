"""From the lots this device holds to the lots it won: make before break, never above the budget.

Each lot walks through one table of states; a move that the table does not know is a programming
mistake. A lot that others won is kept until they all serve it, for who loads slowly should take no
replica away, and for `linger_s` more: requests whose caches lie along this device go over to
another way meanwhile. Where its room is needed it goes as soon as any other serves it, and a
replica gives way to what is none, so that full devices do not wait for each other in a circle, and
one layer after the other is exchanged. When memory is short for a lot that nobody serves, room is
made in this order: lots won by others that others serve, own replicas that others serve, and only
then lots won by others that nobody else serves yet (a hole is traded for a hole that is ours to
fill). Loading and draining lots count against the budget, because their bytes are in memory.

A lot may be held in fewer bits than it is stored in (coeld.deployment.widths). One that changes its
width is read again beside itself and answers meanwhile, so both forms count. What gets narrower
goes before what is loaded, because it makes room, and what gets wider after it. Where not even one
lot fits beside itself, some of one layer are dropped first.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from coeld.ids import Lot


class LotState(Enum):
    FREE = "free"
    LOADING = "loading"
    SERVING = "serving"
    CHANGING = "changing"
    """Serving, and being read again in the other width."""
    DRAINING = "draining"


class Move(Enum):
    LOAD = "load"
    LOADED = "loaded"
    FAILED = "failed"
    CHANGE = "change"
    DROP = "drop"
    DROPPED = "dropped"


TRANSITIONS: Mapping[tuple[LotState, Move], LotState] = {
    (LotState.FREE, Move.LOAD): LotState.LOADING,
    (LotState.LOADING, Move.LOADED): LotState.SERVING,
    (LotState.LOADING, Move.FAILED): LotState.FREE,
    (LotState.SERVING, Move.CHANGE): LotState.CHANGING,
    (LotState.CHANGING, Move.LOADED): LotState.SERVING,
    (LotState.CHANGING, Move.FAILED): LotState.SERVING,
    (LotState.SERVING, Move.DROP): LotState.DRAINING,
    (LotState.DRAINING, Move.DROPPED): LotState.FREE,
}

READ: Final = (LotState.LOADING, LotState.CHANGING)
"""Of lots that are being read."""
RETRY_S = 1.0
RETRY_MAX_S = 60.0


@dataclass(frozen=True, slots=True)
class Wish:
    """What the other stages want of this device, and what they know of others."""

    won: Mapping[Lot, int]
    """Lots won here, and which copy."""
    elsewhere: Collection[Lot]
    """Lots that another present device serves."""
    capacity_bytes: int
    fill_bytes: int
    """What loading may fill up to: less than `capacity_bytes` where layers are kept whole, so that
    room is made and filled by whole layers and no layer is torn on the way."""
    urgent: bool
    """The auction rested long enough to load lots that nobody serves."""
    settled: bool
    """It rested long enough for moves and replicas too."""
    narrow: Collection[int] = ()
    """Layers whose lots are to be held in fewer bits than they are stored in."""
    now: float = 0.0
    replaced: Collection[Lot] = ()
    """Of `elsewhere`, lots that all who won them serve."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Effects to be: lots to free first, then lots to load."""

    drop: tuple[Lot, ...] = ()
    load: tuple[Lot, ...] = ()
    narrow: bool = False
    """Whether `load` is to be held in fewer bits than it is stored in."""


class Migration:
    """The states of this device's lots. Lots that are not mentioned are free."""

    def __init__(self, batch_bytes: int, linger_s: float = 0.0) -> None:
        self._states: dict[Lot, LotState] = {}
        self._narrow: set[Lot] = set()
        """Of these, what is in fewer bits than stored; of what is changing, what it still is."""
        self._batch_bytes, self._linger_s = batch_bytes, linger_s
        self._spare_since: dict[Lot, float] = {}
        """When it was first seen that others serve what another won."""
        self._waiting: set[Lot] = set()
        """Of these, what may go as soon as all who won it serve it, or its room is needed."""
        self._failures: dict[Lot, tuple[int, float]] = {}
        self._why = ""

    def _in(self, state: LotState) -> list[Lot]:
        return [lot for lot, held in self._states.items() if held is state]

    @property
    def serving(self) -> tuple[Lot, ...]:
        return tuple(sorted([*self._in(LotState.SERVING), *self._in(LotState.CHANGING)]))

    @property
    def loading(self) -> tuple[Lot, ...]:
        return tuple(sorted(self._in(LotState.LOADING)))

    @property
    def busy(self) -> bool:
        """Is a batch being read?"""
        return any(state in READ for state in self._states.values())

    @property
    def narrow_layers(self) -> set[int]:
        """Layers of which something is here in fewer bits than stored, or is about to be."""
        return {lot.layer for lot in (*self._narrow, *self._in(LotState.CHANGING))}

    def bytes(self, lot_bytes: int, narrow_bytes: int = 0) -> int:
        """What is in memory, or will be in a moment."""
        narrow, changing = len(self._narrow), self._in(LotState.CHANGING)
        widening = sum(lot in self._narrow for lot in changing)
        wide = len(self._states) - narrow + widening
        return wide * lot_bytes + (narrow + len(changing) - widening) * narrow_bytes

    def staying(self, experts: int) -> set[int]:
        """Layers that are served whole, of which nothing is spare."""
        counts = Counter(lot.layer for lot in self.serving)
        spare = {lot.layer for lot in self._spare_since}
        return {layer for layer, count in counts.items() if count >= experts} - spare

    @property
    def due(self) -> float:
        """When the next lot that is spare may go."""
        lingers = [at for lot, at in self._spare_since.items() if lot not in self._waiting]
        return min(lingers, default=float("inf")) + self._linger_s

    @property
    def rests(self) -> bool:
        """Is nothing loading and nothing draining?"""
        return all(state is LotState.SERVING for state in self._states.values())

    @property
    def kept(self) -> set[Lot]:
        """Lots that are in memory to stay, or about to be."""
        return {lot for lot, state in self._states.items() if state is not LotState.DRAINING}

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
            before = self.state(lot)
            after = TRANSITIONS[before, move]
            if before is LotState.CHANGING and move is Move.LOADED:
                self._narrow ^= {lot}
            if after is LotState.FREE:
                del self._states[lot]
                self._narrow.discard(lot)
            else:
                self._states[lot] = after
            if move is Move.LOADED:
                self._failures.pop(lot, None)

    def trouble(self, now: float) -> str:
        """Why the last lots failed that are not tried again yet; "" when there are none."""
        return self._why if self.barred(now) else ""

    def failed(self, lots: Iterable[Lot], now: float, why: str = "") -> float:
        """These lots did not load; returns the longest time until they are tried again."""
        longest, self._why = 0.0, why
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
        self._spare_since.clear()
        self._waiting.clear()
        self._narrow.clear()
        self._failures.clear()

    def plan(self, wish: Wish, lot_bytes: int, narrow_bytes: int = 0) -> Plan:
        """The next drops and the next batch of loads, already applied to the states.

        One batch is in flight at a time, so what is decided while it loads is decided on facts.
        """
        sizes = lot_bytes, narrow_bytes
        room = wish.fill_bytes - self.bytes(*sizes)
        holes, rest = self._wanted(wish)
        narrower, wider = self._changes(wish)
        drop = self._surplus(wish, sizes, bool(narrower or wider))
        if rest and not holes and not self.busy:
            layer = [lot for lot in rest if lot.layer == rest[0].layer]
            need = sum(sizes[lot.layer in wish.narrow] for lot in layer) - room
            need -= self._draining_bytes(drop, sizes)
            drop += self._lost(wish, need, drop, sizes, wish.won[rest[0]] == 0)
        need = sum(sizes[lot.layer in wish.narrow] for lot in holes)
        if holes and need > room and not narrower:
            need -= room + self._draining_bytes(drop, sizes)
            drop += self._room_for(holes, wish, need, drop, sizes)
        load: list[Lot] = []
        wanted = narrower or holes or rest or wider
        if wanted and not self.busy:
            load = self._batch(wanted, wish.narrow, room, sizes)
            changes = self.state(wanted[0]) is LotState.SERVING
            if changes and not load and not self._draining_bytes(drop, sizes):
                drop += _instead(wanted, room, sizes, wish.narrow)
            self.apply(Move.CHANGE if changes else Move.LOAD, load)
        self.apply(Move.DROP, drop)
        narrow = bool(load) and load[0].layer in wish.narrow
        if narrow:
            self._narrow.update(lot for lot in load if self.state(lot) is LotState.LOADING)
        return Plan(tuple(sorted(drop)), tuple(load), narrow)

    def _changes(self, wish: Wish) -> tuple[list[Lot], list[Lot]]:
        """Lots won here that are to become narrower, and those that are to become wider."""
        mine = sorted(lot for lot in self._in(LotState.SERVING) if lot in wish.won)
        narrower = [lot for lot in mine if lot.layer in wish.narrow and lot not in self._narrow]
        wider = [lot for lot in mine if lot.layer not in wish.narrow and lot in self._narrow]
        return narrower if wish.urgent else [], wider if wish.settled else []

    def _batch(
        self, lots: Sequence[Lot], narrow: Collection[int], room: int, sizes: tuple[int, int]
    ) -> list[Lot]:
        """The first lots of one width that fit: a batch, or more to complete a layer, for layers
        are served whole."""
        width = lots[0].layer in narrow
        alike = [lot for lot in lots if (lot.layer in narrow) == width]
        size = max(1, sizes[width])
        fits = min(max(0, room) // size, len(alike))
        count = min(fits, max(1, self._batch_bytes // size))
        while 0 < count < fits and alike[count].layer == alike[count - 1].layer:
            count += 1
        return alike[:count]

    def _wanted(self, wish: Wish) -> tuple[list[Lot], list[Lot]]:
        """Lots to load now: first those that nobody serves, else moves and replicas."""
        free = sorted(lot for lot in wish.won if lot not in self._states)
        holes = [lot for lot in free if lot not in wish.elsewhere and wish.won[lot] == 0]
        if not wish.settled:
            return (holes if wish.urgent else []), []
        moves = [lot for lot in free if lot in wish.elsewhere and wish.won[lot] == 0]
        return holes, moves + [lot for lot in free if wish.won[lot] > 0]

    def _lost(
        self, wish: Wish, need: int, taken: Collection[Lot], sizes: tuple[int, int], moves: bool
    ) -> list[Lot]:
        """More lots to drop, of `need` bytes and to the end of a layer: spare ones that linger, or
        that not all who won them serve; then replicas, if it is not for one."""
        chosen: list[Lot] = []
        spare = sorted(self._spare_since.keys() - set(taken))
        serving = self._in(LotState.SERVING) if moves else []
        copies = (lot for lot in serving if wish.won.get(lot, 0) > 0 and lot in wish.elsewhere)
        for lot in [*spare, *sorted(copies)]:
            if need <= 0 and not (chosen and chosen[-1].layer == lot.layer):
                break
            chosen.append(lot)
            need -= sizes[lot in self._narrow]
        return chosen

    def _surplus(self, wish: Wish, sizes: tuple[int, int], all_spare: bool) -> list[Lot]:
        """Lots that may go at once, and lots that must because the budget shrank. `all_spare`: do
        not linger, nor wait until everybody serves them who won them."""
        serving = self._in(LotState.SERVING)
        spare = [lot for lot in serving if lot not in wish.won and lot in wish.elsewhere]
        self._spare_since = {lot: self._spare_since.get(lot, wish.now) for lot in spare}
        drop: list[Lot] = []
        self._waiting = set()
        if wish.settled:
            since, linger_s = self._spare_since, self._linger_s
            ready = [lot for lot in spare if all_spare or since[lot] + linger_s <= wish.now]
            drop = [lot for lot in ready if all_spare or lot in wish.replaced]
            self._waiting = set(ready).difference(drop)
            self._spare_since = {lot: at for lot, at in since.items() if lot not in drop}
        excess = self.bytes(*sizes) - wish.capacity_bytes - self._draining_bytes(drop, sizes)
        if excess > 0:
            drop += self._room_for([], wish, excess, drop, sizes)
        return drop

    def _draining_bytes(self, drop: Collection[Lot], sizes: tuple[int, int]) -> int:
        return sum(sizes[lot in self._narrow] for lot in (*self._in(LotState.DRAINING), *drop))

    def _room_for(
        self,
        holes: Collection[Lot],
        wish: Wish,
        need: int,
        taken: Collection[Lot],
        sizes: tuple[int, int],
    ) -> list[Lot]:
        """More lots to drop, of `need` bytes or as many as may go, those missed least first."""

        def pain(lot: Lot) -> int:
            if lot in wish.elsewhere:
                return 0 if lot not in wish.won else 1 if wish.won[lot] > 0 else 2
            return 3 if lot not in wish.won else 4

        victims = [lot for lot in self._in(LotState.SERVING) if lot not in taken]
        ceiling = 3 if holes else 4  # for a hole of ours never open one that is ours as well
        chosen: list[Lot] = []
        for _, lot in sorted((pain(lot), lot) for lot in victims if pain(lot) <= ceiling):
            if need <= 0:
                break
            chosen.append(lot)
            need -= sizes[lot in self._narrow]
        return chosen


def _instead(
    lots: Sequence[Lot], room: int, sizes: tuple[int, int], narrow: Collection[int]
) -> list[Lot]:
    """Lots of one layer to drop, that they may be read in their other width."""
    layer = [lot for lot in lots if lot.layer == lots[0].layer]
    if lots[0].layer in narrow:
        return layer
    return layer[: max(0, room) // max(1, sizes[0] - sizes[1])]
