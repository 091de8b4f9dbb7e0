"""Dispatch: the rows of a cut layer go to the owners of its experts, partial sums come back.

Each owner gets one copy of the rows and adds up its experts' outputs before it answers; local
experts run while peers compute. A device that serves the whole layer is preferred to several that
share it: its sum has the bits that one device alone would compute. Partial sums added in another
order differ in the last bit, which int8 rounding of activations amplifies to the size of its own
error (median 0.17 in a logit of SmolLM2), enough to flip near-ties in greedy decoding.

Owners are stateless, so a failed call is simply made again: at another owner, here if the lot has
been loaded meanwhile, or at whoever the next route table names. Only when nobody holds an expert
for `patience_s` does the request fail.
"""

import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from coeld.datapath.ports import Call, ExpertRunner, PeerLink, Rows
from coeld.datapath.request import Cancelled, Request
from coeld.errors import NotCovered, PeerError
from coeld.ids import Lot, NodeId
from coeld.routes import RouteTable

COOLDOWN_S: Final = 0.5
"""A peer that failed is tried last for this long: others first, but nobody is written off here."""

WAIT_S_MAX: Final = 0.05
"""Between two looks at the routes while waiting; a new table wakes the waiter at once."""


class RouteBoard:
    """Where the control plane pins the current route table and the data path reads it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._version = 0
        self.table: RouteTable | None = None

    def pin(self, table: RouteTable) -> None:
        with self._changed:
            self.table = table
            self._bump()

    def nudge(self) -> None:
        """Something else changed: experts were loaded, a request was cancelled."""
        with self._changed:
            self._bump()

    @property
    def version(self) -> int:
        return self._version

    def wait(self, version: int, timeout_s: float) -> None:
        """Return when the version is no longer `version`, or after `timeout_s`."""
        with self._changed:
            self._changed.wait_for(lambda: self._version != version, timeout_s)

    def _bump(self) -> None:
        self._version += 1
        self._changed.notify_all()


@dataclass(slots=True)
class Dispatcher:
    """Runs cut layers. One thread (the decoder's)."""

    me: NodeId
    experts: int
    """Per layer."""
    lot_bytes: int
    runner: ExpertRunner
    peers: PeerLink
    board: RouteBoard
    patience_s: float
    on_failure: Callable[[NodeId, PeerError], None]
    """Told about each failed call, so that the control plane can suspect the peer."""
    _failed_at: dict[NodeId, float] = field(default_factory=dict)

    def run(self, layer: int, x: Rows, request: Request) -> Rows:
        """Sum over all experts of the layer on x (n, H). Raises NotCovered, Cancelled."""
        total = np.zeros_like(x)
        todo = set(range(self.experts))
        waiting_since: float | None = None
        while True:
            version = self.board.version
            again = self._attempt(layer, x, todo, total)
            if not todo:
                break
            if again:
                continue
            now = time.monotonic()
            waiting_since = now if waiting_since is None else waiting_since
            self._wait(layer, todo, version, waiting_since + self.patience_s - now, request)
        if waiting_since is not None:
            request.stalls_s.append(time.monotonic() - waiting_since)
        return total

    def _attempt(self, layer: int, x: Rows, todo: set[int], total: Rows) -> bool:
        """One round: call every owner, run what is here, collect.

        Shrinks `todo`, adds to `total`. True when another round at once may get further: an owner
        failed for the first time in a while, so that the next round asks another.
        """
        failures = 0
        here, groups = self._share(layer, todo)
        calls: list[tuple[NodeId, frozenset[int], Call]] = []
        for node, address, experts in groups:
            try:
                call = self.peers.call(node, address, layer, experts, x)
            except PeerError as exc:
                failures += self._fail(node, exc)
            else:
                calls.append((node, experts, call))
        if here:
            self._run_here(layer, here, x, todo, total)
        for node, experts, call in calls:
            try:
                total += call.result()
            except PeerError as exc:
                failures += self._fail(node, exc)
            else:
                todo -= experts
                self._failed_at.pop(node, None)
        return failures > 0

    def _run_here(
        self, layer: int, here: Collection[int], x: Rows, todo: set[int], total: Rows
    ) -> None:
        try:
            total += self.runner.run(layer, here, x)
        except PeerError:
            return  # dropped between the look and the run: the next round goes elsewhere
        todo -= set(here)

    def _share(
        self, layer: int, todo: set[int]
    ) -> tuple[frozenset[int], list[tuple[NodeId, tuple[str, int], frozenset[int]]]]:
        """Who runs what: the experts to run here, and the calls to make.

        Whole if one device can; otherwise local experts here and each other expert at its first
        owner. Owners that just failed come last.
        """
        here, table = self.runner.here(layer) & todo, self.board.table
        if here == todo or table is None:
            return here, []
        owners = {expert: self._owners(table, Lot(layer, expert)) for expert in sorted(todo)}
        for node in next(iter(owners.values())):
            if all(node in nodes for nodes in owners.values()) and not self._cooling(node):
                return frozenset(), [(node, table.addresses[node], frozenset(todo))]
        groups: dict[NodeId, set[int]] = {}
        for expert, nodes in owners.items():
            if nodes and expert not in here:
                groups.setdefault(nodes[0], set()).add(expert)
        calls = [(node, table.addresses[node], frozenset(mine)) for node, mine in groups.items()]
        return here, calls

    def _owners(self, table: RouteTable, lot: Lot) -> list[NodeId]:
        """Owners that can be called, those that did not just fail first."""
        nodes = [
            node for node in table.owners_of(lot) if node != self.me and node in table.addresses
        ]
        return sorted(nodes, key=self._cooling)

    def _fail(self, node: NodeId, exc: PeerError) -> bool:
        """Note a failure. True if this peer was not already cooling down."""
        fresh = not self._cooling(node)
        self._failed_at[node] = time.monotonic()
        self.on_failure(node, exc)
        return fresh

    def _cooling(self, node: NodeId) -> bool:
        failed = self._failed_at.get(node)
        return failed is not None and time.monotonic() - failed < COOLDOWN_S

    def _wait(
        self, layer: int, todo: set[int], version: int, left_s: float, request: Request
    ) -> None:
        if request.cancelled.is_set():
            raise Cancelled
        if left_s <= 0:
            raise self._not_covered(layer, todo)
        self.board.wait(version, min(left_s, WAIT_S_MAX))

    def _not_covered(self, layer: int, todo: set[int]) -> NotCovered:
        missing = self.board.table.missing_bytes if self.board.table else 0
        if missing:
            return not_covered(missing)
        return NotCovered(
            f"No device answered for {len(todo)} experts of layer {layer} within "
            f"{self.patience_s:g} s: the swarm is re-organising or a link is down. See coeld "
            "status, and ask again.",
            len(todo) * self.lot_bytes,
        )


def not_covered(missing_bytes: int) -> NotCovered:
    """The error for a swarm that is too small for the model."""
    return NotCovered(
        f"The devices of this swarm cannot hold the whole model: {missing_bytes} bytes of memory "
        "are missing. Bring a device back, add one, or raise memory.budget_mb; answers work again "
        "as soon as it fits.",
        missing_bytes,
    )
