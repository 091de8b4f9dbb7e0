"""What the data path needs from the world: a trunk, experts here, experts elsewhere.

The engine implements the first two with ONNX Runtime, coeld.net.peers the third with sockets; the
tests implement all of them with a few lines of numpy.
"""

from collections.abc import Collection, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from coeld.datapath.plan import Span
from coeld.ids import NodeId

Rows = NDArray[np.float32]
"""(n, H)"""


class Cache(Protocol):
    """The KV cache of one request."""

    length: int

    def free(self) -> None:
        """Give its memory back; it is not used again."""
        ...


class SpanRunner(Protocol):
    """See coeld.engine.trunk.Trunk."""

    def begin(self, cache: Cache, tokens: Sequence[int], rows: Sequence[int]) -> None: ...
    def run(self, span: Span) -> Rows: ...
    def add(self, y: Rows) -> None: ...


class ExpertRunner(Protocol):
    """See coeld.engine.experts.ExpertSet."""

    def here(self, layer: int) -> frozenset[int]: ...
    def run(self, layer: int, experts: Collection[int], x: Rows) -> Rows: ...


class Call(Protocol):
    """A request that is under way at a peer."""

    def result(self) -> Rows:
        """Wait for the partial sums (n, H). Raises PeerError; ends at the call's deadline."""
        ...


class PeerLink(Protocol):
    """See coeld.net.peers.PeerPool."""

    def call(
        self, node: NodeId, address: tuple[str, int], layer: int, experts: Collection[int], x: Rows
    ) -> Call:
        """Send rows to a peer without waiting for the answer. Raises PeerError."""
        ...
