"""What the data path needs from the world: a trunk, experts here, experts elsewhere.

The engine implements the first two with ONNX Runtime, coeld.net.peers the third with sockets; the
tests implement all of them with a few lines of numpy.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from coeld.datapath.frames import SpanCall
from coeld.datapath.pace import Paces
from coeld.datapath.plan import Span, Step
from coeld.datapath.quality import Errors, Quality, Traffic
from coeld.datapath.split import Split
from coeld.errors import PeerError
from coeld.ids import NodeId

Rows = NDArray[np.float32]
"""(n, H)"""

Gates = NDArray[np.float32]
"""(n, experts): the weight of each expert's output in each row's sum, 0 where it is not chosen."""


class Cache(Protocol):
    """The KV cache of one request, for some layers."""

    length: int
    """Tokens cached."""

    @property
    def bytes(self) -> int: ...

    def bytes_for(self, tokens: int) -> int:
        """What it takes with room for `tokens` in all."""
        ...

    def reserve(self, tokens: int) -> None: ...

    def free(self) -> None:
        """Give its memory back; it is not used again."""
        ...


class Part(Protocol):
    """One pass of rows through consecutive layers. See coeld.engine.trunk.Part."""

    steps: Sequence[Step]

    def run(self, span: Span) -> tuple[Rows, Gates | None]: ...
    def add(self, y: Rows) -> None: ...
    def out(self) -> Rows: ...


class Lane(Protocol):
    """The buffers in which one thread runs parts of the trunk. See coeld.engine.trunk.Lane."""

    def embed(self, tokens: Sequence[int]) -> Rows: ...
    def can_run(self, first: int, stop: int, head: bool) -> bool: ...
    def part(
        self, cache: Cache, x: Rows, first: int, stop: int, rows: Sequence[int]
    ) -> AbstractContextManager[Part]: ...
    def trim(self) -> None: ...


class Waiter(Protocol):
    """Whoever waits for experts, and keeps count of it."""

    stalls_s: list[float]
    """How long it waited, each time an expert had no reachable owner."""
    split: Split
    quality: Quality

    def check(self) -> None:
        """Raise what makes waiting any longer pointless."""
        ...


class Held:
    """Experts of one layer that are here, in the order in which they run without moving their gate
    weights first."""

    __slots__ = ("columns", "experts", "order")

    def __init__(self, order: Sequence[int] = ()) -> None:
        self.order = tuple(order)
        self.experts = frozenset(order)
        self.columns: NDArray[np.intp] = np.array(self.order, np.intp)
        """The same order, to pick gate weights with."""


class ExpertRunner(Protocol):
    """See coeld.engine.experts.ExpertSet."""

    def here(self, layer: int) -> Held: ...
    def run(self, layer: int, experts: Sequence[int], x: Rows, gates: Gates | None) -> Rows: ...


class Call(Protocol):
    """Experts that a peer runs."""

    traffic: Traffic
    beyond_s: float | None
    """Of the time that it took, what the peer did not compute; None: not yet, or nobody saw the
    answer come."""

    @property
    def node(self) -> NodeId:
        """The peer."""
        ...

    @property
    def outcome(self) -> "Rows | PeerError | None":
        """The partial sums (n, H), or why there are none; None: not yet."""
        ...

    @property
    def computed_us(self) -> int:
        """Of the time that it took, what the peer computed."""
        ...


class Reply(Protocol):
    """A span that a peer runs."""

    computed_us: int
    """Of the time it took, what the peer computed."""
    traffic: Traffic

    def ready(self, within_s: float) -> bool:
        """Whether `result` has to wait no longer, by then."""
        ...

    def result(self) -> Rows:
        """Wait for the rows (n, H). Raises PeerError; ends at the call's deadline."""
        ...

    def give_up(self) -> None:
        """Instead of `result`: nobody wants it any more. What the line's caches hold is lost."""
        ...


class PeerLink(Protocol):
    """See coeld.net.peers.PeerPool."""

    paces: Paces
    """What calls to each peer usually take, given-up ones included."""

    def call(
        self,
        node: NodeId,
        address: tuple[str, int],
        layer: int,
        experts: Sequence[int],
        x: Rows,
        gates: Gates | None,
        errors: Errors,
        /,
    ) -> Call:
        """Begin to send rows to a peer; `gates` (n, len(experts)), None: all 1. Never waits. They
        and the results may err by `errors`.

        The rows must not change before the call has ended or is given up. Raises PeerError.
        """
        ...

    def send(self, calls: Sequence[Any], until_s: float, /) -> None:
        """Wait until these calls' rows are on their way, at most until `until_s`."""
        ...

    def ready(self, calls: Sequence[Any], until_s: float, /) -> Sequence[Call]:
        """Those that have ended, as soon as there is one; none at `until_s` (time.monotonic)."""
        ...

    def give_up(self, call: Any, /) -> None:
        """Another peer was quicker. Does nothing if it has ended."""
        ...

    def span(
        self,
        node: NodeId,
        address: tuple[str, int],
        asked: SpanCall,
        x: Rows,
        errors: Errors,
        line: int,
        /,
    ) -> Reply:
        """Have a peer run whole layers; its answer is the residual stream of the last
        `asked.keep` rows. Rows and answer may err by `errors`. Calls on one `line` come one after
        the other, and the caches that they leave behind belong to it. Raises PeerError."""
        ...

    def another_way(self, node: NodeId, /) -> bool:
        """Is there a way to a peer, straight or through another device, that has not just
        failed?"""
        ...

    def free(self, node: NodeId, number: int, line: int) -> None:
        """Let the peer drop the caches of a request. Raises nothing: a peer that cannot be
        reached has dropped them."""
        ...
