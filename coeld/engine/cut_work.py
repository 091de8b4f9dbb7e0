"""What a cut costs this device's processor: a row sent to an owner of experts, and answered.

The real data path at both ends of a connection over loopback. Before each end works something reads
more memory than caches hold, as kernels do while tokens flow: without that, everything takes a
third. What threads work counts, not how long they wait.
"""

import time
from dataclasses import dataclass, field
from statistics import median
from typing import Final

import numpy as np

from coeld.datapath.dispatch import Dispatcher, RouteBoard
from coeld.datapath.ports import Gates, Held, Rows
from coeld.datapath.quality import Quality
from coeld.datapath.walker import Apart
from coeld.errors import NotCovered
from coeld.host.cgroups import cpu_cores
from coeld.ids import Lot, ModelHash, NodeId
from coeld.net.peers import Introduction, PeerPool, PeerServer
from coeld.routes import RouteTable

ASKER, OWNER, MODEL = NodeId("a" * 16), NodeId("b" * 16), ModelHash("c" * 64)
CUTS: Final = 15
HIDDEN: Final = 1024
FLUSH_BYTES: Final = 16 << 20
WITHIN_S: Final = 5.0


@dataclass(slots=True)
class _Experts:
    """One end's experts: they empty the caches. Remembers what its thread worked besides."""

    memory: Rows
    """More than caches hold."""
    spent_s: float = 0.0
    """In here, by the thread."""
    between_s: list[float] = field(default_factory=list)
    """From one run to the next."""
    _left_s: float | None = None

    def here(self, _layer: int) -> Held:
        return Held((0,))

    def run(self, _layer: int, _experts: object, x: Rows, _gates: Gates | None) -> Rows:
        entered_s = time.thread_time()
        if self._left_s is not None:
            self.between_s.append(entered_s - self._left_s)
        np.add.reduce(self.memory, axis=1)
        self._left_s = time.thread_time()
        self.spent_s += self._left_s - entered_s
        return x.copy()


def cut_us() -> int:
    """Microseconds of work at both ends together, of one row; 0: it could not be measured."""
    try:
        work_s = _measured_s()
    except (OSError, NotCovered):  # no loopback, or nothing comes through it in time
        return 0
    return max(1, round(work_s * 1e6 / min(1.0, cpu_cores() or 1.0)))


def _measured_s() -> float:
    memory = np.ones((1, FLUSH_BYTES // 4), np.float32)
    asked, owned, asking_s = _Experts(memory), _Experts(memory), []
    server = PeerServer("127.0.0.1", 0)
    pool = PeerPool(Introduction("calibration", MODEL, ASKER), WITHIN_S)
    try:
        server.serve(Introduction("calibration", MODEL, OWNER), HIDDEN, owned.run)
        board = RouteBoard()
        owners = {Lot(0, 0): (ASKER,), Lot(0, 1): (OWNER,)}
        board.pin(RouteTable(MODEL, 1, owners, {OWNER: (server.host, server.port)}))
        dispatcher = Dispatcher(ASKER, 2, asked, pool, board, WITHIN_S, lambda _node, _error: None)
        waiter = Apart(lambda: None, Quality())
        x, gates = np.ones((1, HIDDEN), np.float32), np.ones((1, 2), np.float32)
        for _ in range(CUTS):
            before_s, asked.spent_s = time.thread_time(), 0.0
            dispatcher.run(0, x, gates, waiter)
            asking_s.append(time.thread_time() - before_s - asked.spent_s)
    finally:
        pool.close()
        server.close()
    return median(asking_s) + median(owned.between_s)
