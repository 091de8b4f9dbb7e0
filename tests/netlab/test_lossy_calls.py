"""Calls of experts over links that lose packets: real sockets, real kernel."""

import time

import numpy as np
import pytest

from coeld.datapath.branches import Branch, Branches
from coeld.errors import PeerError
from coeld.ids import NodeId
from coeld.net.peers import Introduction, PeerPool, PeerServer
from tests.netlab import PROFILES, Lab, missing

REASON = missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")
HIDDEN, CALLS = 576, 100
CALLER, OWNERS = NodeId("a" * 16), {NodeId("b" * 16): "b", NodeId("c" * 16): "c"}
X = np.ones((1, HIDDEN), np.float32)
SECONDS_MAX = 10.0
"""All of them took 2 s; by the kernel's timers alone some call has no answer within its second."""


def introduction(node: NodeId) -> Introduction:
    return Introduction("s", "m", node)


def test_calls_go_on_though_three_packets_in_ten_are_lost() -> None:
    failed: list[PeerError] = []
    with Lab(["a", "b", "c"], PROFILES["lan"]) as lab:
        servers, addresses = [], {}
        for node, name in OWNERS.items():
            with lab.inside(name):
                server = PeerServer(lab.addresses[name], 0)
            server.serve(introduction(node), HIDDEN, lambda layer, _experts, x, _gates: x * layer)
            addresses[node] = (server.host, server.port)
            servers.append(server)
        pool = PeerPool(introduction(CALLER), 1.0)
        branches = Branches(pool, lambda _node, error: failed.append(error))

        def call(layer: int) -> None:
            branch = Branch([0], tuple(OWNERS), X, None, None)
            branches.begin(layer, branch, addresses)
            assert branches.collect(layer, [branch], addresses)
            assert branch.part is not None
            assert branch.part[0, 0] == layer

        with lab.inside("a"):
            for layer in range(CALLS):
                call(layer)
        for a, b in [(a, b) for a in "abc" for b in "abc" if a != b]:
            lab.link(a, b, loss=0.3)
        began_s = time.monotonic()
        with lab.inside("a"):
            for layer in range(CALLS):
                call(layer)
        took_s = time.monotonic() - began_s
        pool.close()
        for server in servers:
            server.close()
    assert pool.paces.losses.packets > 0
    assert took_s < SECONDS_MAX
    assert failed == []
