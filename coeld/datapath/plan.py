"""The plan compiler: which layers run in one graph, and where the graph is cut. Pure.

A layer is attention followed by its experts. Where a layer's experts are compiled into this
device's own graph the layer is *fused*; where some are elsewhere, or must be callable by peers,
the graph is cut between attention and experts. Every graph call costs about 70 µs and every cut a
round trip, so the plan has as few of both as the routes allow.

Why a lot that peers call is not fused: ONNX Runtime repacks weights per session, so the same
expert in a graph of its own and inside a fused graph would be held twice.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from coeld.ids import Lot, NodeId
from coeld.routes import RouteTable


@dataclass(frozen=True, slots=True)
class Span:
    """One graph: attention of layers first..stop-1 with the experts of all but the last of them.

    With `head`, the experts of the last layer, final norm and output projection belong to it too;
    `first == stop` is then possible: the head alone.
    """

    first: int
    stop: int
    head: bool

    def fused(self) -> range:
        """Layers whose experts are inside this graph."""
        return range(self.first, self.stop if self.head else self.stop - 1)


@dataclass(frozen=True, slots=True)
class Cut:
    """The experts of `layer`, wherever they are."""

    layer: int


Step = Span | Cut


def compile_plan(layers: int, fused: Collection[int]) -> tuple[Step, ...]:
    """Steps that run layers 0..layers-1 and the head in order, fusing exactly `fused`."""
    assert layers > 0
    assert all(0 <= layer < layers for layer in fused)
    steps: list[Step] = []
    first = 0
    for layer in range(layers):
        if layer not in fused:
            steps += [Span(first, layer + 1, head=False), Cut(layer)]
            first = layer + 1
    return (*steps, Span(first, layers, head=True))


def fusible_layers(
    layers: int, experts: int, held: Collection[Lot], table: RouteTable | None, me: NodeId
) -> frozenset[int]:
    """All layers when this device holds everything and nobody else may call; otherwise none.

    All or nothing, because one lot that comes or goes must not recompile its neighbours.
    """
    alone = table is None or all(node == me for node in table.addresses)
    if alone and len(held) == layers * experts:
        return frozenset(range(layers))
    return frozenset()


def describe(steps: Sequence[Step]) -> str:
    """One line for people: how many graphs, which layers are cut."""
    spans = sum(isinstance(step, Span) for step in steps)
    cuts = len(steps) - spans
    return f"{spans} graph{'s' if spans > 1 else ''}, {cuts} cut{'s' if cuts != 1 else ''}"
