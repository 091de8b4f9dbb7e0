"""The router's part of a graph: from a layer's normed rows to the gate weights of all experts.

Gate weights are dense, (n, experts) float32 with 0 for every expert that was not chosen: the form
in which a kernel skips what is 0, in which columns can be picked for the experts of one width or
one device, and in which nothing remains to be known about the family's routing convention.
"""

from coeld.engine.graph import Graph
from coeld.model.manifest import BlobRef, Shape


def gate_weights(graph: Graph, shape: Shape, p: str, ref: BlobRef, normed: str, out: str) -> str:
    """Adds the nodes that turn `normed` (1, n, H) into `out` (n, E). See manifest.Routing."""
    routing = shape.routing
    assert routing is not None, "a dense model has no router"
    graph.stored(p + "router.w", ref, "router.w")
    logits = graph.add("FusedMatMul", [normed, p + "router.w"], [p + "rl3"], transB=1)
    if "router.b" in ref.tensors:
        graph.stored(p + "router.b", ref, "router.b")
        logits = graph.add("Add", [logits, p + "router.b"], [p + "rlb"])
    logits = graph.add("Reshape", [logits, graph.integers(-1, shape.experts)], [p + "rl"])
    k = graph.integers(shape.top_k)
    if (
        routing.score == "softmax"
        and routing.renormalise
        and "router.correction" not in ref.tensors
    ):
        # A softmax over the chosen logits: nothing else has to be exponentiated.
        graph.add("TopK", [logits, k], [p + "top", p + "chosen"], axis=1)
        weights = graph.add("Softmax", [p + "top"], [p + "tw"], axis=1)
    else:
        weights = _scored(graph, shape, p, ref, logits, k)
    if routing.scale != 1:
        factor = graph.number(routing.scale)
        weights = graph.add("Mul", [weights, factor], [p + "ts"])
    nothing = graph.add("Sub", [logits, logits], [p + "zeros"])
    return graph.add("ScatterElements", [nothing, p + "chosen", weights], [out], axis=1)


def _scored(graph: Graph, shape: Shape, p: str, ref: BlobRef, logits: str, k: str) -> str:
    """The chosen experts' scores (n, top_k), their ids in `chosen`."""
    routing = shape.routing
    assert routing is not None
    if routing.score == "softmax":
        scores = graph.add("Softmax", [logits], [p + "scores"], axis=1)
    else:
        scores = graph.add("Sigmoid", [logits], [p + "scores"])
    if "router.correction" in ref.tensors:
        graph.stored(p + "router.c", ref, "router.correction")
        corrected = graph.add("Add", [scores, p + "router.c"], [p + "sc"])
        graph.add("TopK", [corrected, k], [p + "top", p + "chosen"], axis=1)
        weights = graph.add("GatherElements", [scores, p + "chosen"], [p + "tw"], axis=1)
    else:
        graph.add("TopK", [scores, k], [p + "top", p + "chosen"], axis=1)
        weights = p + "top"
    if routing.renormalise:
        total = graph.add("ReduceSum", [weights, graph.integers(1)], [p + "tsum"], keepdims=1)
        weights = graph.add("Div", [weights, total], [p + "tn"])
    return weights
