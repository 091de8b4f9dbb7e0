"""Dispatch: the rows of a cut layer go to the owners of the chosen experts, partial sums come back.

Each owner gets one copy of each row that chose one of its experts, with their gate weights, and
adds up its experts' outputs before it answers; local experts run while peers compute. A device
that serves all that were chosen is preferred to several that share them: its sum has the bits that
one device alone would compute. Partial sums added in another order differ in the last bit, which
int8 rounding of activations amplifies to the size of its own error (median 0.17 in a logit of
SmolLM2), enough to flip near-ties in greedy decoding.

Owners are stateless, so a layer that failed is simply asked again: another owner, this device if
the lots have been loaded meanwhile, or whoever the next route table names. Only when nobody holds
an expert and the swarm comes no further for `patience_s` does the request fail: while lots are
being loaded elsewhere it waits on, up to `PATIENCES_MAX` times as long.

Slow is not dead. An owner whose answers come late is asked less and less (`choice.py`), which
nobody is told; the control plane hears of an owner only when a connection breaks or an answer does
not come before the deadline of a call.
"""

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Final, NamedTuple

import numpy as np

from coeld.datapath.branches import Branch, Branches, Picked
from coeld.datapath.costs import Costs, lots_work, reach_work
from coeld.datapath.ports import ExpertRunner, Gates, Held, PeerLink, Rows, Waiter
from coeld.datapath.quality import Errors
from coeld.errors import NotCovered, PeerError, PeerRefused
from coeld.ids import Lot, NodeId
from coeld.routes import RouteTable

COOLDOWN_S: Final = 0.5
"""A peer that failed is tried last for this long: others first, but nobody is written off here."""

PATIENCES_MAX: Final = 6
"""A swarm that reads lots from slow cards gets whole again step by step; one that only loses them
and gets them back has no end."""

WAIT_S_MAX: Final = 0.05
"""Between two looks at the routes while waiting; a new table wakes the waiter at once."""


class RouteBoard:
    """Where the control plane pins the current route table and the data path reads it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._version = 0
        self.table: RouteTable | None = None
        self.pinned_s = 0.0
        """When it was pinned (time.monotonic)."""

    def pin(self, table: RouteTable) -> None:
        with self._changed:
            self.table, self.pinned_s = table, time.monotonic()
            self._bump()

    def nudge(self) -> None:
        """Something else changed: experts were loaded, a request was cancelled."""
        with self._changed:
            self._bump()

    @property
    def version(self) -> int:
        return self._version

    @property
    def covered(self) -> int:
        """How many lots somebody serves."""
        table = self.table
        return len(table.owners) if table else 0

    def wait(self, version: int, timeout_s: float) -> None:
        """Return when the version is no longer `version`, or after `timeout_s`."""
        with self._changed:
            self._changed.wait_for(lambda: self._version != version, timeout_s)

    def _bump(self) -> None:
        self._version += 1
        self._changed.notify_all()


@dataclass(slots=True)
class Stall:
    """One layer's wait for experts that nobody serves."""

    began_s: float
    _covered: int = -1
    _moved_s: float = 0.0
    """When the swarm was last seen to serve more lots or fewer than before."""

    def left_s(self, covered: int, patience_s: float, now: float) -> float:
        """For how long it is worth waiting on: lots are lost once and come back in batches."""
        if covered != self._covered:
            self._covered, self._moved_s = covered, now
        ends = self._moved_s + patience_s, self.began_s + PATIENCES_MAX * patience_s
        return min(ends) - now


class _Shares(NamedTuple):
    """Who runs which of the chosen experts of a layer."""

    here: Held | None
    """All that are here, chosen or not; None: no chosen one runs here."""
    calls: Sequence[tuple[tuple[NodeId, ...], list[int]]]
    """Owners of all of these experts, the first to be preferred."""
    addresses: Mapping[NodeId, tuple[str, int]]


class _Owners:
    """Who can be called for a layer, worked out once per route table. Sets of devices are bits."""

    def __init__(self, by_expert: Sequence[tuple[NodeId, ...]]) -> None:
        """Per expert its owners, the first to be preferred."""
        bits = {node: 1 << at for at, node in enumerate(dict.fromkeys(chain(*by_expert)))}
        self.by_expert = by_expert
        self._bits = bits
        self._sets = [sum(bits[node] for node in nodes) for nodes in by_expert]
        self.whole = self.of_all(range(len(by_expert)))
        """Owners of every expert."""

    def of_all(self, experts: Sequence[int]) -> tuple[NodeId, ...]:
        """Those that own all of these experts, in the order of the first one's owners."""
        first, common = self.by_expert[experts[0]], self._sets[experts[0]]
        for expert in experts:
            common &= self._sets[expert]
        if common == self._sets[experts[0]]:
            return first
        return tuple(node for node in first if self._bits[node] & common) if common else ()


@dataclass(slots=True)
class Dispatcher:
    """Runs cut layers, for the decoder's thread and for those of guests. Holds nothing of a call;
    what it knows of failures all threads share."""

    me: NodeId
    experts: int
    """Per layer."""
    runner: ExpertRunner
    peers: PeerLink
    board: RouteBoard
    patience_s: float
    on_failure: Callable[[NodeId, PeerError], None]
    """Told about each failed call, so that the control plane can suspect the peer."""
    costs: Costs = field(default_factory=Costs)
    """What is learned from every row that is decoded."""
    failures: int = 0
    """Calls that failed at a peer that had not just failed."""
    _failed_at: dict[NodeId, float] = field(default_factory=dict)
    _known: tuple[RouteTable | None, dict[int, _Owners]] = field(default_factory=lambda: (None, {}))
    """Owners by layer, of the table that was looked at last."""
    _branches: Branches = field(init=False)

    def __post_init__(self) -> None:
        self._branches = Branches(self.peers, self._fail)

    def run(self, layer: int, x: Rows, gates: Gates | None, waiter: Waiter) -> Rows:
        """Sum over the layer's experts of gate * expert(x), x (n, H); no gates: all 1.

        What `waiter.quality` allows to be lost may be lost. Raises NotCovered, and what the waiter
        raises.
        """
        waiter.split.cuts += 1
        errors = waiter.quality.errors(layer)
        if (
            gates is not None
            and errors[1] > 0
            and len(self.runner.here(layer).order) < self.experts
        ):
            gates, errors = waiter.quality.prune(layer, gates)
        chosen = self._chosen(gates)
        stall: Stall | None = None
        while True:
            version, failures = self.board.version, self.failures
            total = self._attempt(layer, chosen, x, gates, errors, waiter)
            if total is not None:
                break
            waiter.check()  # there may be a better way by now than to ask again
            now = time.monotonic()
            stall = stall or Stall(now)
            left_s = stall.left_s(self.board.covered, self.patience_s, now)
            if left_s <= 0:
                raise self._not_covered(layer)
            if self.failures == failures:  # else one failed that had not just: another may do
                self.board.wait(version, min(left_s, WAIT_S_MAX))
                waiter.check()
        if stall is not None:
            stall_s = time.monotonic() - stall.began_s
            waiter.stalls_s.append(stall_s)
            waiter.split.wait_s += stall_s
        return total

    def shared(self, layers: Iterable[int]) -> int:
        """How many of these layers are not wholly here."""
        return sum(len(self.runner.here(layer).order) < self.experts for layer in layers)

    def _chosen(self, gates: Gates | None) -> list[int]:
        """The experts that some row needs, by number."""
        if gates is None:
            return list(range(self.experts))
        columns: Any = gates if len(gates) == 1 else gates.any(axis=0, keepdims=True)
        found: list[int] = columns[0].nonzero()[0].tolist()
        return found

    def _attempt(
        self,
        layer: int,
        chosen: list[int],
        x: Rows,
        gates: Gates | None,
        errors: Errors,
        waiter: Waiter,
    ) -> Rows | None:
        """Call every owner, run what is here, collect: the sum, or None if any part is missing.

        Never keeps a part: the whole layer is asked again, so that a failure leaves no trace in
        the order of additions.
        """
        shares = self._share(layer, chosen)
        if shares is None:
            return None
        split, quality = waiter.split, waiter.quality
        started_s, here_s, branches = time.monotonic(), 0.0, []
        for nodes, ids in shares.calls:
            branch = Branch(ids, nodes, *_rows_for(ids, x, gates), errors)
            self._branches.begin(layer, branch, shares.addresses)
            branches.append(branch)
        parts: list[Rows] = []
        if shares.here is not None:
            self._branches.send(branches)
            began_s = time.monotonic()
            mine = self._run_here(layer, shares.here, x, gates)
            here_s = time.monotonic() - began_s
            split.experts_s += here_s
            if mine is None:
                self._branches.give_up(branches)
                return None
            parts.append(mine)
        if not self._branches.collect(layer, branches, shares.addresses):
            return None
        for branch in branches:
            assert branch.part is not None
            assert branch.answer is not None
            rows, hidden = branch.x.shape
            traffic = branch.answer.traffic
            quality.count(layer, traffic, rows, hidden, len(branches) + (shares.here is not None))
            parts.append(_spread(branch.part, branch.picked, len(x)))
            gates_bytes = 0 if branch.gates is None else branch.gates.nbytes
            split.sent_bytes += traffic.sent_bytes + gates_bytes
            split.received_bytes += traffic.received_bytes
        if branches:
            took_s = time.monotonic() - started_s - here_s
            computed_us = max(b.answer.computed_us for b in branches if b.answer is not None)
            split.away(took_s, computed_us / 1e6 - here_s)
        if len(x) == 1 and self.costs.listening:
            away = sum(len(branch.experts) for branch in branches)
            self._note(len(chosen) - away, here_s, branches)
        return parts[0] if len(parts) == 1 else sum(parts[1:], start=parts[0].copy())

    def _note(self, lots: int, here_s: float, branches: list[Branch]) -> None:
        """What one row cost at each owner, and to reach it where that could be seen.

        `lots`: those here that the row chose; a layer that is all here is run by one graph, which
        skips the others."""
        if lots:
            self.costs.note(lots_work(lots), here_s)
        for branch in branches:
            call = branch.answer
            assert call is not None
            self.costs.note(lots_work(len(branch.experts), call.node), call.computed_us / 1e6)
            if call.beyond_s is not None:
                self.costs.note(reach_work(call.node), call.beyond_s)

    def _run_here(self, layer: int, here: Held, x: Rows, gates: Gates | None) -> Rows | None:
        """Those that no row chose have no weight."""
        weights = None if gates is None else gates.take(here.columns, axis=1)
        try:
            return self.runner.run(layer, here.order, x, weights)
        except PeerError:
            return None  # dropped between the look and the run: the next attempt goes elsewhere

    def _share(self, layer: int, chosen: list[int]) -> _Shares | None:
        """Who runs what, or None while some expert has no owner that can be asked.

        Whole if one device can; otherwise local experts here and each other expert at its first
        owner.
        """
        here, table = self.runner.here(layer), self.board.table
        if here.experts.issuperset(chosen):
            return _Shares(here, (), {})
        if table is None:
            return None
        owned = self._owners(table, layer)
        if whole := owned.whole or owned.of_all(chosen):
            return _Shares(None, [(whole, chosen)], table.addresses)
        by_owner: dict[NodeId, list[int]] = {}
        for expert in chosen:
            if expert not in here.experts:
                owners = owned.by_expert[expert]
                if not owners:
                    return None
                by_owner.setdefault(owners[0], []).append(expert)
        calls = [(owned.of_all(experts), experts) for experts in by_owner.values()]
        mine = None if here.experts.isdisjoint(chosen) else here
        return _Shares(mine, calls, table.addresses)

    def _owners(self, table: RouteTable, layer: int) -> _Owners:
        """Owners of a layer's experts, other than this device; those that have just failed only
        where there is no other."""
        known = self._known  # one reference: other threads may look at another table
        if known[0] is not table:
            known = self._known = table, {}
        found = known[1].get(layer)
        if found is None:
            present = table.addresses.keys() - {self.me}
            lots = (table.owners_of(Lot(layer, expert)) for expert in range(self.experts))
            found = known[1][layer] = _Owners(
                [tuple(node for node in nodes if node in present) for nodes in lots]
            )
        if not self._failed_at:
            return found
        # A copy: another thread may note a failure meanwhile.
        cooling = {node for node in list(self._failed_at) if self._cooling(node)}
        return _Owners([_rested(nodes, cooling) for nodes in found.by_expert]) if cooling else found

    def _fail(self, node: NodeId, exc: PeerError) -> None:
        self.failures += not self._cooling(node)
        self._failed_at[node] = time.monotonic()
        if not isinstance(exc, PeerRefused):  # who refuses is alive
            self.on_failure(node, exc)

    def _cooling(self, node: NodeId) -> bool:
        failed = self._failed_at.get(node)
        return failed is not None and time.monotonic() - failed < COOLDOWN_S

    def _not_covered(self, layer: int) -> NotCovered:
        missing = self.board.table.missing_bytes if self.board.table else 0
        if missing:
            return not_covered(missing)
        return NotCovered(
            f"Experts of layer {layer} could not be reached for {self.patience_s:g} s: the swarm "
            "is re-organising or a link is down. See coeld status, and ask again.",
            0,
        )


def _rested(nodes: tuple[NodeId, ...], cooling: set[NodeId]) -> tuple[NodeId, ...]:
    """Those that have not just failed; all of them if there is no other."""
    return tuple(node for node in nodes if node not in cooling) or nodes


def _rows_for(
    ids: list[int], x: Rows, gates: Gates | None
) -> tuple[Rows, Gates | None, Picked | None]:
    """The rows that chose one of these experts, their gate weights, and which rows they are."""
    if gates is None:
        return x, None, None
    if len(x) == 1:
        return x, gates.take(ids, axis=1), None
    weights = np.ascontiguousarray(gates[:, ids])
    picked = np.flatnonzero(weights.any(axis=1))
    if len(picked) == len(x):
        return x, weights, None
    return x[picked], weights[picked], picked


def _spread(part: Rows, picked: Picked | None, rows: int) -> Rows:
    """A partial sum of some rows as one of all rows."""
    if picked is None:
        return part
    whole = np.zeros((rows, part.shape[1]), np.float32)
    whole[picked] = part
    return whole


def not_covered(missing_bytes: int) -> NotCovered:
    """The error for a swarm that is too small for the model."""
    return NotCovered(
        f"The devices of this swarm cannot hold the whole model: {missing_bytes} bytes of memory "
        "are missing. Bring a device back, add one, or raise memory.budget_mb; answers work again "
        "as soon as it fits.",
        missing_bytes,
    )
