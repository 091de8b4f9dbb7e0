"""The decoder: tokens in, logits out, span by span and cut by cut: a token's journey."""

from collections.abc import Sequence

from coeld.datapath.dispatch import Dispatcher
from coeld.datapath.plan import Cut, Span
from coeld.datapath.ports import Cache, Gates, Rows, SpanRunner
from coeld.datapath.request import Request


class Decoder:
    """Runs the trunk's plan. One thread; the plan may be replaced between two passes."""

    def __init__(self, trunk: SpanRunner, dispatcher: Dispatcher) -> None:
        self.trunk = trunk
        self.dispatcher = dispatcher

    def forward(
        self, cache: Cache, tokens: Sequence[int], rows: Sequence[int], request: Request
    ) -> Rows:
        """Append `tokens` to the cache; logits (len(rows), V) of the given rows, valid until the
        next pass.

        Raises NotCovered when a cut layer's experts stay without an owner, Cancelled when the
        request was cancelled while waiting; the cache is then as it was before.
        """
        self.trunk.begin(cache, tokens, rows)
        out: Rows | None = None
        gates: Gates | None = None
        for step in self.trunk.steps:
            match step:
                case Span():
                    out, gates = self.trunk.run(step)
                case Cut(layer):
                    assert out is not None
                    self.trunk.add(self.dispatcher.run(layer, out, gates, request))
        assert out is not None
        cache.length += len(tokens)
        return out
