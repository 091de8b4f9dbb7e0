"""One model, opened on this device: trunk, experts, text and the data path through them.

Put together here for the daemon's engine and for `coeld bench` and `coeld eval` alike, so that
what is measured is what runs.
"""

from collections.abc import Callable
from typing import Final

from coeld.datapath.decoder import Decoder
from coeld.datapath.dispatch import Dispatcher, RouteBoard
from coeld.datapath.plan import Span, describe
from coeld.datapath.ports import PeerLink
from coeld.datapath.request import Request
from coeld.datapath.scheduler import Scheduler
from coeld.engine.experts import ExpertSet
from coeld.engine.fitting import Fitter
from coeld.engine.text import Text
from coeld.engine.trunk import Trunk
from coeld.errors import ContextTooLong, PeerError
from coeld.ids import NodeId
from coeld.model.manifest import Manifest
from coeld.model.store import Store

CONTEXT_TOKENS: Final = 2048


class OpenModel:
    """Owned by the decoder's thread, except `experts` (the loader's) and `board` (anybody's)."""

    def __init__(
        self,
        manifest: Manifest,
        store: Store,
        *,
        me: NodeId,
        peers: PeerLink,
        context_tokens: int = CONTEXT_TOKENS,
        patience_s: float = 10.0,
        on_failure: Callable[[NodeId, PeerError], None] = lambda _node, _error: None,
    ) -> None:
        self.manifest = manifest
        self.me = me
        self.context_tokens = min(context_tokens, manifest.shape.context_max)
        self.text = Text(manifest, store)
        store.verify(manifest.trunk_blobs())
        self.board = RouteBoard()
        self.experts = ExpertSet(manifest, store)
        self.trunk = Trunk(manifest, store, self.context_tokens)
        self.dispatcher = Dispatcher(
            me=me,
            experts=manifest.shape.experts,
            runner=self.experts,
            peers=peers,
            board=self.board,
            patience_s=patience_s,
            on_failure=on_failure,
        )
        self.decoder = Decoder(self.trunk, self.dispatcher)
        self.scheduler = Scheduler(self.decoder, self.trunk.new_cache)
        self.fitter = Fitter(self.trunk, self.experts, self.board, me)

    def refit(self) -> None:
        """Bring the graphs in line with what is held, here and now: nothing else may run."""
        self._refit(None)

    def _refit(self, check: Callable[[Span], None] | None) -> None:
        while change := self.fitter.prepare(check):
            self.fitter.adopt(change)
            self.fitter.settle(change)

    def hold_everything(self) -> None:
        """Load all experts and fuse them: one device, no cut. Raises ModelError."""
        self.experts.hold_fused(self.manifest.demand().lots())
        self._refit(self._verify)

    def _verify(self, span: Span) -> None:
        self.experts.verify_layers(span.fused())

    def admit(self, request: Request, tokens_max: int | None, param: str = "messages") -> None:
        """Check that the request fits the context and set its length.

        Raises ContextTooLong, naming `param`, the field that the prompt came in.
        """
        room = self.context_tokens - len(request.prompt)
        if room < 1:
            raise ContextTooLong(
                f"The prompt has {len(request.prompt)} tokens and the context {self.context_tokens}"
                " (engine.context_tokens): shorten the prompt, or raise the setting.",
                param,
            )
        request.tokens_max = min(tokens_max or room, room)

    @property
    def plan(self) -> str:
        return describe(self.trunk.steps)
