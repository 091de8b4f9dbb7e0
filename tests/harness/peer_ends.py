"""The two ends of the data path in tests: a server that multiplies, and who calls it."""

import numpy as np

from coeld.errors import PeerRefused
from coeld.ids import NodeId
from coeld.net.peers import Introduction, PeerPool, PeerServer

HIDDEN = 8
SERVER, CALLER = NodeId("5" * 16), NodeId("c" * 16)
X = np.arange(2 * HIDDEN, dtype=np.float32).reshape(2, HIDDEN)


def run(layer: int, experts, x, gates):
    if layer == 9:
        raise PeerRefused("layer 9 is not here")
    return x * (layer + 1) * len(experts)


def introduction(node: NodeId, model: str = "m", swarm: str = "s") -> Introduction:
    return Introduction(swarm, model, node)


def ask(pool: PeerPool, server: PeerServer, layer: int = 1, node: NodeId = SERVER):
    return pool.result(pool.call(node, (server.host, server.port), layer, [1, 2], X, None))
