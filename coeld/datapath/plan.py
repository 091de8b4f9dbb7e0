"""The plan compiler: which layers run in one graph, and where the graph is cut. Pure.

A layer is attention followed by its experts. Where a layer's experts are compiled into this
device's own graph the layer is *fused*; where some are elsewhere, or must be callable by peers,
the graph is cut between attention and experts. Every graph call costs some tens of microseconds
and every cut a round trip, so spans are as long as the routes allow, up to the border of a chunk
of SPAN_LAYERS_MAX layers: a graph is what is in memory twice while a plan changes under way.

Why a lot that peers call is not fused: ONNX Runtime repacks weights per session, so the same
expert in a graph of its own and inside a fused graph would be held twice.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Final, Literal, NamedTuple

from coeld.ids import Lot, NodeId
from coeld.routes import RouteTable

SPAN_LAYERS_MAX: Final = 4
"""Layers in one graph. Longer spans save calls, which cannot be told from noise; shorter ones bound
the memory that changing the plan takes, and compile better side by side."""


class Span(NamedTuple):
    """One graph: layers first..stop-1.

    `end` says what it ends with: "cut" after the attention of the last layer, whose experts follow
    as a Cut; "experts" after the last layer's experts; "head" after final norm and output
    projection. `first == stop` is the head alone.
    """

    first: int
    stop: int
    end: Literal["cut", "experts", "head"]

    def fused(self) -> range:
        """Layers whose experts are inside this graph."""
        return range(self.first, self.stop - 1 if self.end == "cut" else self.stop)


class Cut(NamedTuple):
    """The experts of `layer`, wherever they are."""

    layer: int


Step = Span | Cut


def compile_plan(
    layers: int, fused: Collection[int], borders: Collection[int] = ()
) -> tuple[Step, ...]:
    """Steps that run layers 0..layers-1 and the head in order, fusing exactly `fused`.

    No graph crosses one of `borders`: there a leg of some request begins or ends.
    """
    assert layers > 0
    assert all(0 <= layer < layers for layer in fused)
    steps: list[Step] = []
    first = 0
    for layer in range(layers):
        stop = layer + 1
        if layer not in fused:
            steps += [Span(first, stop, "cut"), Cut(layer)]
            first = stop
        elif stop in borders or (stop % SPAN_LAYERS_MAX == 0 and stop < layers):
            steps.append(Span(first, stop, "experts"))
            first = stop
    return (*steps, Span(first, layers, "head"))


def chunks(layers: int) -> Iterator[range]:
    """The layers between two borders: what changes its form at once."""
    for first in range(0, layers, SPAN_LAYERS_MAX):
        yield range(first, min(first + SPAN_LAYERS_MAX, layers))


def fusible_layers(
    experts: int, held: Collection[Lot], table: RouteTable | None, me: NodeId
) -> frozenset[int]:
    """Layers that this device may compile into its own graphs: it holds them whole, and nobody
    else is there to call them, or they lie in spans that it serves whole."""
    counts: dict[int, int] = {}
    for lot in held:
        counts[lot.layer] = counts.get(lot.layer, 0) + 1
    whole = frozenset(layer for layer, count in counts.items() if count == experts)
    if table is None or all(node == me for node in table.addresses):
        return whole
    spans = (range(leg.first, leg.stop) for leg in table.spans if leg.node == me)
    return whole.intersection(*[frozenset().union(*spans)])


def span_around(table: RouteTable | None, me: NodeId, layer: int) -> range:
    """The layers of the span that this device serves and that contains the layer."""
    for leg in table.spans if table is not None else ():
        if leg.node == me and leg.first <= layer < leg.stop:
            return range(leg.first, leg.stop)
    return range(layer, layer + 1)


def borders_of(table: RouteTable | None, me: NodeId) -> frozenset[int]:
    """Where legs that run on this device begin and end: those of its own requests, and the spans
    that it serves."""
    if table is None or all(node == me for node in table.addresses):
        return frozenset()
    mine = [leg for leg in table.spans if leg.node == me]
    legs = [*mine, *table.legs] if len(table.legs) > 1 else mine
    return frozenset(border for leg in legs for border in (leg.first, leg.stop)) - {0}


def part_of(steps: Sequence[Step], first: int, stop: int, head: bool) -> Sequence[Step]:
    """The steps that run layers first..stop-1, and the head if wanted; none (empty) if no graph
    begins and ends there."""
    begin = end = -1
    for index, step in enumerate(steps):
        match step:
            case Cut(layer):
                end = index + 1 if layer == stop - 1 and not head else end
            case Span():
                begin = index if step.first == first and begin < 0 else begin
                ends = step.end == "head" if head else step.end == "experts" and step.stop == stop
                end = index + 1 if ends else end
    return steps[begin:end] if 0 <= begin < end else ()


def describe(steps: Sequence[Step]) -> str:
    """One line for people: how many graphs, which layers are cut."""
    spans = sum(isinstance(step, Span) for step in steps)
    cuts = len(steps) - spans
    return f"{spans} graph{'s' if spans > 1 else ''}, {cuts} cut{'s' if cuts != 1 else ''}"
