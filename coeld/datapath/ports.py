"""What the data path needs from the world: a trunk, experts here, experts elsewhere.

The engine implements the first two with ONNX Runtime, coeld.net.peers the third with sockets; the
tests implement all of them with a few lines of numpy.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from coeld.datapath.plan import Span, Step
from coeld.ids import NodeId

Rows = NDArray[np.float32]
"""(n, H)"""

Gates = NDArray[np.float32]
"""(n, experts): the weight of each expert's output in each row's sum, 0 where it is not chosen."""


class Cache(Protocol):
    """The KV cache of one request."""

    length: int

    def free(self) -> None:
        """Give its memory back; it is not used again."""
        ...


class SpanRunner(Protocol):
    """See coeld.engine.trunk.Trunk."""

    steps: Sequence[Step]

    def begin(self, cache: Cache, tokens: Sequence[int], rows: Sequence[int]) -> None: ...
    def run(self, span: Span) -> tuple[Rows, Gates | None]: ...
    def add(self, y: Rows) -> None: ...


class ExpertRunner(Protocol):
    """See coeld.engine.experts.ExpertSet."""

    def here(self, layer: int) -> frozenset[int]: ...
    def run(self, layer: int, experts: Sequence[int], x: Rows, gates: Gates | None) -> Rows: ...


class Call(Protocol):
    """A request that is under way at a peer."""

    def result(self) -> Rows:
        """Wait for the partial sums (n, H). Raises PeerError; ends at the call's deadline."""
        ...


class PeerLink(Protocol):
    """See coeld.net.peers.PeerPool."""

    def call(
        self,
        node: NodeId,
        address: tuple[str, int],
        layer: int,
        experts: Sequence[int],
        x: Rows,
        gates: Gates | None,
    ) -> Call:
        """Send rows to a peer without waiting for the answer; `gates` (n, len(experts)), None: all
        1. Raises PeerError."""
        ...
