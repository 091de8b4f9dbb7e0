"""Fitting: keeping the graphs in memory in line with what is held and who is there.

A device that is alone with what it holds runs long fused spans; one that peers call runs its
experts in sessions of their own. Going from one to the other is work of seconds, and answers must
go on meanwhile. So the loader builds the graphs of one chunk of layers beside the present ones,
the decoder adopts them between two tokens, and only then does the loader let the old ones go and
begin with the next chunk: in memory twice is never more than a chunk. The decoder's part is to
exchange a few references: it takes no lock and frees nothing, so no token waits for a load.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

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
    retired: list[Session] = field(default_factory=list)
    """What ran before; freeing it takes milliseconds, which are the loader's."""


class Fitter:
    """`prepare` and `settle` belong to the loader's thread, `adopt` to the decoder's."""

    def __init__(self, trunk: Trunk, experts: ExpertSet, board: RouteBoard, me: NodeId) -> None:
        self._trunk, self._experts, self._board, self._me = trunk, experts, board, me
        self._fused: frozenset[int] = frozenset()
        self._under_way = False

    def prepare(self, check: Callable[[Span], None] | None = None) -> Change | None:
        """Build what the first chunk that is out of line needs. None: nothing to do, or a change
        waits to be settled. `check` is called with each span before it is built."""
        if self._under_way:
            return None
        shape = self._trunk.shape
        wanted = fusible_layers(shape.experts, self._experts.lots, self._board.table, self._me)
        fused = self._next(wanted)
        if fused is None:
            return None
        self._experts.unfuse(self._fused - fused)
        steps = compile_plan(shape.layers, fused)
        change = Change(fused, steps, self._trunk.compile(steps, check))
        self._under_way = True
        return change

    def adopt(self, change: Change) -> None:
        """Run the new graphs from the next token on."""
        change.retired.extend(self._trunk.adopt(change.steps, change.sessions))

    def settle(self, change: Change) -> None:
        """Let go of what the adopted change replaced."""
        self._fused = change.fused
        change.retired.clear()
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
