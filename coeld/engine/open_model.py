"""One model, opened on this device: trunk, experts, text and the data path through them.

Put together here for the daemon's engine and for `coeld bench` and `coeld eval` alike, so that
what is measured is what runs.
"""

from collections.abc import Callable
from typing import Final

from coeld.datapath.decoder import Decoder
from coeld.datapath.dispatch import Dispatcher, RouteBoard
from coeld.datapath.plan import compile_plan, describe, fusible_layers
from coeld.datapath.ports import PeerLink
from coeld.datapath.request import Request
from coeld.datapath.scheduler import Scheduler
from coeld.engine.experts import ExpertSet
from coeld.engine.sessions import give_memory_back
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
        give_memory_back()
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
        self.decoder = Decoder(self.trunk, self.dispatcher, ())
        self.scheduler = Scheduler(self.decoder, self.trunk.new_cache)

    def refit(self) -> None:
        """Compile the plan that fits the routes and the held experts, if it is not the current.

        Old graphs go before new ones come: requests under way keep their KV caches and wait.
        """
        shape = self.manifest.shape
        fused = fusible_layers(
            shape.layers, shape.experts, self.experts.lots, self.board.table, self.me
        )
        steps = compile_plan(shape.layers, fused)
        if steps == self.decoder.steps:
            return
        self.trunk.prepare(())
        if fused:
            self.experts.fuse()
        else:
            self.experts.unfuse()
        self.trunk.prepare(steps)
        self.decoder.steps = steps

    def hold_everything(self) -> None:
        """Load all experts and fuse them: one device, one graph."""
        self.experts.fuse()
        self.experts.load(self.manifest.demand().lots())
        self.refit()

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
        return describe(self.decoder.steps)
