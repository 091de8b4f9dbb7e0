"""Engines' data paths without their processes, on a tiny model and real sockets, in one thread."""

import threading
import time

from coeld.datapath.request import Request
from coeld.engine.measure import Silent
from coeld.engine.open_model import OpenModel
from coeld.ids import Lot, NodeId
from coeld.net.peers import Introduction, PeerPool, PeerServer
from coeld.routes import RouteTable

A, B, C = (NodeId(letter * 16) for letter in "abc")
LAYERS, EXPERTS = 3, 8
LOTS = [Lot(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
PROMPT, TOKENS = list(range(5, 14)), 20
DEADLINE_S = 60


class Device:
    """An engine's data path without its process."""

    def __init__(
        self, manifest, store, node: NodeId, lots=LOTS, guests_max: int = 4, context: int = 256
    ) -> None:
        introduction = Introduction("s", manifest.hash, node)
        self.node, self.pool = node, PeerPool(introduction, 1.0)
        self.failed: list[NodeId] = []
        self.model = OpenModel(
            manifest, store, me=node, peers=self.pool, context_tokens=context, patience_s=2.0,
            guests_max=guests_max, on_failure=lambda node, _error: self.failed.append(node),
        )  # fmt: skip
        self.model.experts.load(lots)
        self.server = PeerServer("127.0.0.1", 0)
        self.server.serve(
            introduction, manifest.shape.hidden, self.model.run_for_peer, self.model.welcome
        )

    def follow(self, table: RouteTable) -> None:
        self.model.board.pin(table)
        self.model.refit()

    def submit(self, tokens: int = TOKENS, prompt=PROMPT) -> Silent:
        listener = Silent()
        self.model.scheduler.submit(Request("r", prompt, tokens, listener))
        return listener

    def answer(self, tokens: int = TOKENS, prompt=PROMPT) -> list[int]:
        listener = self.submit(tokens, prompt)
        self.finish()
        return listener.tokens

    def finish(self) -> None:
        while self.model.scheduler.active:
            self.model.scheduler.turn()

    def close(self) -> None:
        self.server.close()
        self.pool.close()


def table(devices, legs=(), spans=(), epoch=1) -> RouteTable:
    owners = {lot: tuple(d.node for d in devices if lot in d.model.experts.lots) for lot in LOTS}
    addresses = {d.node: (d.server.host, d.server.port) for d in devices}
    model = devices[0].model.manifest.hash
    return RouteTable(model, epoch, owners, addresses, legs=tuple(legs), spans=tuple(spans))


def forget(device: Device, request: Request, node: NodeId) -> None:
    """Have a peer lose a request's caches."""
    for stage in request.journey.stages:
        if stage.leg.node == node:
            device.pool.free(node, stage.number, stage.line)


def guest_bytes_become(device: Device, wanted: int) -> bool:
    deadline = time.monotonic() + DEADLINE_S
    while device.model.guests.bytes != wanted and time.monotonic() < deadline:
        threading.Event().wait(0.005)
    return device.model.guests.bytes == wanted
