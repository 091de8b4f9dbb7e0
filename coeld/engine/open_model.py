"""One model, opened on this device: trunk, experts, text and the data path through them.

Put together here for the daemon's engine and for `coeld bench` and `coeld eval` alike, so that
what is measured is what runs.
"""

import threading
import time
import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Final

from coeld.datapath.decoder import Decoder
from coeld.datapath.dispatch import Dispatcher, RouteBoard
from coeld.datapath.doors import Doors
from coeld.datapath.legs import Guest, Ledger
from coeld.datapath.plan import Span, describe, span_around
from coeld.datapath.ports import PeerLink, Rows
from coeld.datapath.request import Request
from coeld.datapath.scheduler import Scheduler
from coeld.engine.experts import ExpertSet
from coeld.engine.fitting import Fitter
from coeld.engine.text import Text
from coeld.engine.trunk import Trunk
from coeld.errors import ContextTooLong, PeerError, PeerRefused
from coeld.ids import NodeId
from coeld.model.manifest import Manifest
from coeld.model.store import Store

CONTEXT_TOKENS: Final = 2048
FLOWING_S: Final = 0.5
"""Longer without a turn's end: who answers is waiting."""


class OpenModel:
    """Owned by the decoder's thread, except `experts` and `fitter` (the loader's) and `board`
    (anybody's). `guests_max`: whole caches that layers run for others may take in all."""

    def __init__(
        self,
        manifest: Manifest,
        store: Store,
        *,
        me: NodeId,
        peers: PeerLink,
        context_tokens: int = CONTEXT_TOKENS,
        patience_s: float = 10.0,
        guests_max: int = 4,
        on_failure: Callable[[NodeId, PeerError], None] = lambda _node, _error: None,
    ) -> None:
        self.manifest = manifest
        self.me = me
        self.context_tokens = min(context_tokens, manifest.shape.context_max)
        store.verify(manifest.trunk_blobs() + manifest.text_blobs())
        self.text = Text(manifest, store)
        self.board = RouteBoard()
        self.experts = ExpertSet(manifest, store, self.is_answering)
        self.trunk = Trunk(manifest, store, self.context_tokens, self.is_answering)
        self.dispatcher = Dispatcher(
            me=me,
            experts=manifest.shape.experts,
            runner=self.experts,
            peers=peers,
            board=self.board,
            patience_s=patience_s,
            on_failure=on_failure,
        )
        layers, new_cache = manifest.shape.layers, self.trunk.new_cache
        self.decoder = Decoder(self.trunk.lane, self.dispatcher, layers, new_cache)
        self.scheduler = Scheduler(self.decoder)
        self.guests = Ledger(guests_max * new_cache().bytes_for(self.context_tokens))
        self.doors = Doors()
        self._hosts: weakref.WeakSet[Guest] = weakref.WeakSet()
        self._hosts_lock = threading.Lock()
        self._turned_s = float("-inf")
        """When the last turn ended; the decoder's."""
        self.fitter = Fitter(
            self.trunk, self.experts, self.board, me, self.doors, self._borders_in_use
        )

    def is_answering(self) -> bool:
        """Whether tokens flow: a request that waits for lots, or that was thrown back, wants them
        loaded at full speed."""
        flowing = time.monotonic() - self._turned_s < FLOWING_S
        return flowing and any(r.lost_since_s is None for r in list(self.scheduler.active))

    def turn(self) -> None:
        """One step of every request."""
        self.scheduler.turn()
        self._turned_s = time.monotonic()

    def refit(self) -> None:
        """Bring the graphs in line with what is held, here and now: nothing else may run."""
        self._refit(None)

    def _refit(self, check: Callable[[Span], None] | None) -> None:
        while change := self.fitter.prepare(check):
            self.fitter.adopt(change)
            settled = self.fitter.settle()
            assert settled, "a part is running"

    def hold_everything(self, narrow: Collection[int] = ()) -> None:
        """Load all experts and fuse them: one device, no cut but at `narrow` layers, which are
        held in fewer bits. Raises ModelError."""
        lots = self.manifest.demand().lots()
        self.experts.hold_fused(lot for lot in lots if lot.layer not in narrow)
        self.experts.load((lot for lot in lots if lot.layer in narrow), narrow=True)
        self._refit(self._verify)

    def _verify(self, span: Span) -> None:
        self.experts.verify_layers(span.fused())

    def welcome(self) -> Guest:
        """For one caller whose layers run here, in one thread of its own."""
        made = Guest(
            self.trunk.lane(),
            self.dispatcher,
            self.manifest.shape.layers,
            self.context_tokens,
            self.trunk.new_cache,
            self.guests,
        )
        with self._hosts_lock:
            self._hosts.add(made)
        return made

    def run_for_peer(self, layer: int, experts: Sequence[int], x: Rows, gates: Rows | None) -> Rows:
        """A call expert by expert. Raises PeerRefused; if only because the layer is part of a graph
        it will be taken out of it, with the next refit."""
        try:
            rows = self.experts.run(layer, experts, x, gates)
        except PeerRefused:
            self.doors.called(span_around(self.board.table, self.me, layer))
            raise
        self.doors.called((layer,))
        return rows

    def _borders_in_use(self) -> frozenset[int]:
        """Of legs of this device's requests and of its guests'. Any thread."""
        with self._hosts_lock:
            hosts = list(self._hosts)
        borders = {border for host in hosts for border in host.borders()}
        for request in list(self.scheduler.active):
            catching = request.catching
            for journey in (request.journey, catching.journey if catching else None):
                if journey is not None and len(journey.stages) > 1:
                    legs = [stage.leg for stage in journey.stages]
                    borders |= {border for leg in legs for border in (leg.first, leg.stop)}
        return frozenset(borders)

    def admit(self, request: Request, tokens_max: int | None, param: str = "messages") -> None:
        """Check that the request fits the context and set its length.

        Raises ContextTooLong, naming `param`, the field that the prompt came in.
        """
        room = self.context_tokens - len(request.prompt)
        if room < 1:
            far = len(request.prompt) > 2 * self.context_tokens  # then these may be the first
            many = f"more than {2 * self.context_tokens}" if far else f"{len(request.prompt)}"
            raise ContextTooLong(
                f"The prompt has {many} tokens and the context {self.context_tokens} "
                "(engine.context_tokens): shorten the prompt, or raise the setting.",
                param,
            )
        request.tokens_max = min(tokens_max or room, room)

    @property
    def plan(self) -> str:
        return describe(self.trunk.steps)
