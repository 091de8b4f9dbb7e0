"""Fitting: keeping the graphs in memory in line with what is held and who is there.

A device that is alone with what it holds runs long fused spans; one that peers call runs its
experts in sessions of their own. Going from one to the other is work of seconds, and answers must
go on meanwhile. So the loader builds the graphs of one chunk of layers beside the present ones,
the decoder adopts them between two tokens, and only then do the old ones go and the next chunk
begins: in memory twice is never more than a chunk, and no token waits for a load.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coeld.datapath.dispatch import RouteBoard
from coeld.datapath.plan import Span, Step, chunks, compile_plan, fusible_layers
from coeld.engine.experts import ExpertSet
from coeld.engine.sessions import Session, give_memory_back
from coeld.engine.trunk import Trunk
from coeld.ids import NodeId


@dataclass(frozen=True, slots=True)
class Change:
    """A plan whose graphs are ready to be adopted."""

    fused: frozenset[int]
    steps: Sequence[Step]
    sessions: Mapping[Span, Session]


class Fitter:
    """`prepare` belongs to the loader's thread, `adopt` to the decoder's."""

    def __init__(self, trunk: Trunk, experts: ExpertSet, board: RouteBoard, me: NodeId) -> None:
        self._trunk, self._experts, self._board, self._me = trunk, experts, board, me
        self._fused: frozenset[int] = frozenset()
        self._under_way = False

    def prepare(self) -> Change | None:
        """Build what the first chunk that is out of line needs. None: nothing to do, or a change
        waits to be adopted."""
        if self._under_way:
            return None
        shape = self._trunk.shape
        wanted = fusible_layers(shape.experts, self._experts.lots, self._board.table, self._me)
        fused = self._next(wanted)
        if fused is None:
            return None
        self._experts.unfuse(self._fused - fused)
        steps = compile_plan(shape.layers, fused)
        self._under_way = True
        return Change(fused, steps, self._trunk.compile(steps))

    def adopt(self, change: Change) -> None:
        """Run the new graphs from the next token on and let go of the old ones."""
        self._trunk.adopt(change.steps, change.sessions)
        self._fused = change.fused
        self._experts.fuse(change.fused)
        self._under_way = False
        give_memory_back()

    def _next(self, wanted: frozenset[int]) -> frozenset[int] | None:
        """What is to be fused after the next change; at first everything at once: there is
        nothing yet that would be held twice."""
        if not self._trunk.steps:
            return wanted
        for chunk in chunks(self._trunk.shape.layers):
            layers = frozenset(chunk)
            if wanted & layers != self._fused & layers:
                return self._fused - layers | wanted & layers
        return None
