"""What the engine learns of its links while it works, probed where nothing travels, told the agent.

One thread. Every LOOK_S it probes the links of which too little is known (coeld.datapath.links),
and says what is known if that has changed since it was last said. While lots are loaded, here or at
the other end, a round trip takes as long as a core is busy, which says nothing of the link: then
nobody probes and nobody answers.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Final, NamedTuple

from coeld.datapath.dispatch import RouteBoard
from coeld.errors import PeerError
from coeld.ids import NodeId
from coeld.measured import MeasuredLink
from coeld.net.peers import PeerPool

LOOK_S: Final = 2.0


class Watched(NamedTuple):
    """Of the open model: whom it calls, and where they are."""

    me: NodeId
    board: RouteBoard
    pool: PeerPool


class Watch:
    """`run` it in a thread; it ends soon after `stop`."""

    def __init__(self, watched: Callable[[], Watched | None], say: Callable[..., None]) -> None:
        """`watched` is asked at every look; `say` is the engine's link to its agent."""
        self._watched = watched
        self._say = say
        self._ended = threading.Event()
        self._said: tuple[MeasuredLink, ...] = ()

    def run(self) -> None:
        while not self._ended.wait(LOOK_S):
            watched = self._watched()
            if watched is not None:
                self.look(watched)

    def stop(self) -> None:
        self._ended.set()

    def look(self, watched: Watched) -> None:
        """Probe what is due, and say what has changed."""
        me, board, pool = watched
        table = board.table
        addresses = table.addresses if table is not None else {}
        peers = addresses.keys() - {me}
        for node in pool.meter.due(peers, time.monotonic()):
            if self._ended.is_set():
                return
            with contextlib.suppress(PeerError):  # who cannot be reached is others' business
                pool.probe(node, addresses[node])
        found = pool.meter.look(peers)
        if found != self._said:
            self._said = found
            self._say("measured", links=[list(link) for link in found])
