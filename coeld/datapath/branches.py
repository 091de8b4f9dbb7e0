"""The calls of one layer: every branch asks one owner, a late one also the next, first answers win.

A branch is what travels together: experts that one owner runs for the rows that chose them. Owners
that hold all of them give the same bits, so it does not matter who answers first; the answer that
comes second is given up. Branches wait together, so that two late ones cost the time of one.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coeld.datapath.choice import Seconds, choose
from coeld.datapath.ports import Call, Gates, PeerLink, Rows
from coeld.datapath.quality import EXACT, Errors
from coeld.errors import PeerError, PeerOwes
from coeld.ids import NodeId

NEVER: Final = float("inf")

Picked = NDArray[np.intp]
"""Indices of rows."""
Addresses = Mapping[NodeId, tuple[str, int]]


@dataclass(slots=True)
class Branch:
    """Experts of a layer, the rows that chose them, and who may be asked."""

    experts: list[int]
    nodes: tuple[NodeId, ...]
    """Owners of all of them, the route table's favourite first."""
    x: Rows
    gates: Gates | None
    picked: Picked | None
    """Which of the layer's rows `x` are; None: all."""
    errors: Errors = EXACT
    calls: list[tuple[NodeId, Any]] = field(default_factory=list)
    late_at_s: float = NEVER
    again_s: float = NEVER
    part: Rows | None = None
    answer: Call | None = None
    """The call that gave the part."""


@dataclass(slots=True)
class Branches:
    """Runs the branches of one layer at a time."""

    peers: PeerLink
    on_failure: Callable[[NodeId, PeerError], None]
    seconds: Seconds = field(default_factory=Seconds)

    def begin(self, layer: int, branch: Branch, addresses: Addresses) -> None:
        """Ask the best owner that can be asked, and another along with it if it is time to hear how
        quick it is."""
        self.seconds.first()
        paces = self.peers.paces
        if len(branch.nodes) == 1 and not paces.losses.packets:  # the usual case: nothing to choose
            self._ask(layer, branch, branch.nodes[0], addresses)
            return
        now_s = time.monotonic()
        choice = choose(branch.nodes, len(branch.x), paces, now_s)
        branch.nodes = choice.nodes
        branch.late_at_s, branch.again_s = now_s + choice.late_s, choice.again_s
        for node in choice.nodes:
            self._ask(layer, branch, node, addresses)
            if len(branch.calls) == 1 + choice.along:
                break

    def send(self, branches: list[Branch]) -> None:
        """Before this thread computes: see that the rows are on their way."""
        calls = [call for branch in branches for _node, call in branch.calls]
        self.peers.send(calls, min((branch.late_at_s for branch in branches), default=0.0))

    def collect(self, layer: int, branches: list[Branch], addresses: Addresses) -> bool:
        """Wait for all parts. False: one of them failed, and nothing is waited for any more."""
        while waiting := [branch for branch in branches if branch.part is None]:
            if not all(branch.calls for branch in waiting):
                self.give_up(branches)
                return False
            calls = [call for branch in waiting for _node, call in branch.calls]
            late_at_s = min(branch.late_at_s for branch in waiting)
            if self.peers.ready(calls, late_at_s):
                for branch in waiting:
                    self._take(branch)
                continue
            for branch in waiting:
                if branch.late_at_s <= late_at_s:
                    self._ask_again(layer, branch, addresses)
        return True

    def give_up(self, branches: list[Branch]) -> None:
        """Wait for nothing of these branches any more."""
        for branch in branches:
            for _node, call in branch.calls:
                self.peers.give_up(call)
            branch.calls.clear()

    def _take(self, branch: Branch) -> None:
        """The first good answer of a branch, if there is one by now."""
        for node, call in list(branch.calls):
            if isinstance(call.outcome, PeerError):
                branch.calls.remove((node, call))
                self.on_failure(node, call.outcome)
            elif call.outcome is not None and branch.part is None:
                branch.part, branch.answer = call.outcome, call
        if branch.part is not None:
            self.give_up([branch])

    def _ask_again(self, layer: int, branch: Branch, addresses: Addresses) -> None:
        """The branch is late: ask the next owner that has not been asked; where packets get lost,
        the one that has been asked least."""
        branch.late_at_s = time.monotonic() + branch.again_s
        asked = Counter(node for node, _call in branch.calls)
        node = min(branch.nodes, key=lambda node: asked[node])
        self.seconds.lost(self.peers.paces.losses.packets)
        if (not asked[node] or branch.again_s < NEVER) and self.seconds.take():
            self._ask(layer, branch, node, addresses)

    def _ask(self, layer: int, branch: Branch, node: NodeId, addresses: Addresses) -> None:
        try:
            call = self.peers.call(
                node, addresses[node], layer, branch.experts, branch.x, branch.gates, branch.errors
            )
            branch.calls.append((node, call))
        except PeerOwes:
            pass  # another may be asked instead
        except PeerError as exc:
            self.on_failure(node, exc)
