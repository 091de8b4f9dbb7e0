"""Fitting: keeping the graphs in memory in line with what is held and who is there.

A device that is alone with what it holds, or serves spans whole, runs long fused graphs; one that
peers call expert by expert runs its experts in sessions of their own. Going from one to the other
is work of seconds, and answers must go on meanwhile. So the loader builds the graphs of one chunk
of layers beside the present ones and has them adopted: every part of a request that begins from
then on runs them. When the last part on the old ones has ended, the loader lets these go and begins
with the next chunk: in memory twice is never more than a chunk, and no token waits for a load.

Where graphs must end (legs of requests, spans served) is part of the plan too: a chunk is also
built anew when the borders in it have changed. Borders of legs that are under way stay, whatever
newer routes say, and so do layers open that are called singly (coeld.datapath.doors).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from coeld.datapath.dispatch import RouteBoard
from coeld.datapath.doors import Doors
from coeld.datapath.plan import Span, Step, borders_of, chunks, compile_plan, fusible_layers
from coeld.engine.experts import ExpertSet
from coeld.engine.sessions import Session, give_memory_back, let_go
from coeld.engine.trunk import Trunk
from coeld.ids import NodeId


@dataclass(frozen=True, slots=True)
class Form:
    """What a plan is compiled from: fused layers, and layers that no graph may cross."""

    fused: frozenset[int] = frozenset()
    borders: frozenset[int] = frozenset()

    def only(self, chunk: range) -> "Form":
        """A border belongs to the chunk that it ends in."""
        return Form(
            self.fused & frozenset(chunk), self.borders & frozenset(stop + 1 for stop in chunk)
        )

    def changed(self, old: "Form", new: "Form") -> "Form":
        return Form(self.fused - old.fused | new.fused, self.borders - old.borders | new.borders)


@dataclass(frozen=True, slots=True)
class Change:
    """A plan whose graphs are ready to be adopted."""

    form: Form
    steps: Sequence[Step]
    sessions: Mapping[Span, Session]
    retired: list[Session] = field(default_factory=list)
    """What ran before."""


class Fitter:
    """One thread, the loader's."""

    def __init__(
        self,
        trunk: Trunk,
        experts: ExpertSet,
        board: RouteBoard,
        me: NodeId,
        doors: Doors,
        in_use: Callable[[], Collection[int]],
    ) -> None:
        """`in_use` are the borders of legs under way."""
        self._trunk, self._experts, self._board, self._me = trunk, experts, board, me
        self._doors, self._in_use = doors, in_use
        self._form = Form()
        self.adopted: Change | None = None
        """What waits to be settled."""

    def prepare(self, check: Callable[[Span], None] | None = None) -> Change | None:
        """Build what the first chunk that is out of line needs. None: nothing to do, or a change
        waits to be settled. `check` is called with each span before it is built."""
        if self.adopted is not None:
            return None
        form = self._next()
        if form is None:
            return None
        self._experts.unfuse(self._form.fused - form.fused)
        steps = compile_plan(self._trunk.shape.layers, form.fused, form.borders)
        return Change(form, steps, self._trunk.compile(steps, check))

    def adopt(self, change: Change) -> None:
        """Run the new graphs from the next part on."""
        change.retired.extend(self._trunk.adopt(change.steps, change.sessions))
        self._form, self.adopted = change.form, change

    def settle(self) -> bool:
        """Let go of what the adopted change replaced; False while a part still runs on it."""
        change = self.adopted
        if change is None:
            return True
        if not self._trunk.left():
            return False
        let_go(change.retired, self._trunk.gently)
        self._experts.fuse(change.form.fused)
        self.adopted = None
        if not self._trunk.gently():
            give_memory_back()  # takes malloc's locks; else who answers does it when it is done
        return True

    def _next(self) -> Form | None:
        """The form after the next change; at first everything at once: there is nothing yet that
        would be held twice."""
        table, layers = self._board.table, self._trunk.shape.layers
        experts, lots = self._trunk.shape.experts, self._experts.fusible
        fused = fusible_layers(experts, lots, table, self._me) - self._doors.open()
        borders = borders_of(table, self._me) | self._form.borders.intersection(self._in_use())
        wanted = Form(fused, borders)
        if not self._trunk.steps:
            return wanted
        for chunk in chunks(layers):
            old, new = self._form.only(chunk), wanted.only(chunk)
            if old != new:
                return self._form.changed(old, new)
        return None
