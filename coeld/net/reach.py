"""How peers are reached: straight, or through another device while the straight way is down.

While a peer is reached through another one, the straight way is tried beside it, without waiting:
the attempt is begun here and looked at with each call, and becomes an ordinary connection when the
peer has answered. Any thread.
"""

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from coeld.datapath.detours import Detours
from coeld.errors import PeerError
from coeld.ids import NodeId
from coeld.net.exchange import Exchange

STRAIGHT_S: Final = 1.0
"""From one attempt to reach a peer straight to the next."""

Address = tuple[str, int]


class Reach:
    """See the module."""

    def __init__(
        self, hello: dict[str, Any], addresses: Callable[[], Mapping[NodeId, Address]]
    ) -> None:
        """`addresses` are those of all devices that may be asked to pass on a connection."""
        self._hello = hello
        self._addresses = addresses
        self._detours = Detours()
        self._attempts: dict[NodeId, tuple[float, Exchange | None]] = {}
        """When peers were last tried straight; the connection while that is not decided."""
        self._lock = threading.Lock()

    def through(self, node: NodeId) -> tuple[NodeId, Address] | None:
        """Through whom, at which address, the next connection goes; None: straight."""
        with self._lock:
            if self._detours.straight(node):
                return None
            helpers = self._helpers()
            via = self._detours.way(node, helpers, time.monotonic())
            return None if via is None else (via, helpers[via])

    def failed(self, node: NodeId, via: NodeId | None) -> None:
        """A connection to `node` could not be made, broke, or brought no answer."""
        with self._lock:
            self._detours.failed(node, via, time.monotonic())

    def another(self, node: NodeId) -> bool:
        """Is there a way that has not just failed?"""
        with self._lock:
            return self._detours.another(node, self._helpers(), time.monotonic())

    def works(self, node: NodeId) -> None:
        """It has answered straight."""
        with self._lock:
            self._detours.works(node)

    def straight(self, node: NodeId) -> bool:
        """Nothing is known to be wrong with the straight way."""
        with self._lock:
            return self._detours.straight(node)

    def look(self, node: NodeId, address: Address) -> Exchange | None:
        """Try the straight way, if it is time. A connection that the peer has answered, once."""
        with self._lock:
            now_s = time.monotonic()
            began_s, attempt = self._attempts.get(node, (float("-inf"), None))
            try:
                if now_s - began_s >= STRAIGHT_S:
                    if attempt is not None:
                        attempt.close()
                        self._detours.failed(node, None, now_s)
                    began_s, attempt = now_s, None
                    attempt = Exchange.open(node, address, self._hello)
                if attempt is not None:
                    attempt.pump()
            except PeerError:
                if attempt is not None:
                    attempt.close()
                    attempt = None
                self._detours.failed(node, None, now_s)
            self._attempts[node] = began_s, attempt
            if attempt is None or not attempt.greeted:
                return None
            del self._attempts[node]
            self._detours.works(node)
            return attempt

    def close(self) -> None:
        with self._lock:
            for _began_s, attempt in self._attempts.values():
                if attempt is not None:
                    attempt.close()
            self._attempts.clear()

    def _helpers(self) -> dict[NodeId, Address]:
        me = self._hello["node"]
        return {node: address for node, address in self._addresses().items() if node != me}
