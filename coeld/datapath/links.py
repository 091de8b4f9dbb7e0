"""What the links to peers are like: round trip and bandwidth, from calls that travel anyway. Pure.

A call takes what the peer computes, which it tells, what packing it took here, and what the link
takes: the network and a wake-up on each side. The latter of small calls, less their payload, is the
round trip. Median and 99th percentile are taken over an interval between two looks, and of those
the medians over the last INTERVALS: an outlier moves the 99th percentile, a burst of a few seconds
neither. Nothing is said before SURE of them. Links without calls are probed now and then with a few
empty frames (`due`).

Bandwidth is the kernel's delivery rate during large transfers, where what we had to send was not
the limit (net.exchange.link_of); the median of the last RATES. Nothing is sent to learn it.
"""

import threading
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from statistics import median
from typing import Final

from coeld.ids import NodeId
from coeld.measured import LINKS_MAX, MeasuredLink

SAMPLES_MAX: Final = 256
"""Round trips kept of one interval, the latest."""
INTERVALS: Final = 5
SURE: Final = 3
RATES: Final = 9
PROBED_AGAIN_S: Final = 30.0
"""A link without calls."""
UNSURE: Final = 1.5
"""An interval that differs by this factor from what is known is looked at again soon."""
ASSUMED_BYTES_PER_S: Final = 110e6
"""As long as nothing is known, as the cost model assumes (coeld.deployment.cost.LAN)."""


@dataclass(slots=True)
class _Peer:
    fresh_us: deque[int] = field(default_factory=lambda: deque(maxlen=SAMPLES_MAX))
    """Since the last look."""
    seen: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=INTERVALS))
    """Median and 99th percentile of the last intervals, µs."""
    rates: deque[float] = field(default_factory=lambda: deque(maxlen=RATES))
    heard_s: float = float("-inf")

    @property
    def mb_per_s(self) -> int:
        """As it is told, and so taken off round trips: both together are what a call takes."""
        return max(1, round(median(self.rates) / 1e6)) if self.rates else 0


class LinkMeter:
    """All links of one engine. Any thread; time is handed in."""

    def __init__(self) -> None:
        self._peers: dict[NodeId, _Peer] = {}
        self._lock = threading.Lock()
        self.paused = False
        """Nothing is learned, because something else is in the way: lots are loaded."""

    def answered(self, node: NodeId, link_s: float, payload_bytes: int, now_s: float) -> None:
        """A small call took `link_s` beyond the peer's computing, with so many bytes both ways."""
        if self.paused:
            return
        with self._lock:
            peer = self._peer(node)
            if peer is not None:
                payload_s = payload_bytes / (1e6 * peer.mb_per_s or ASSUMED_BYTES_PER_S)
                peer.fresh_us.append(max(1, round((link_s - payload_s) * 1e6)))
                peer.heard_s = now_s

    def delivered(self, node: NodeId, bytes_per_s: float) -> None:
        """A large transfer went at this rate, limited by the link."""
        with self._lock:
            peer = self._peer(node)
            if peer is not None and bytes_per_s > 0:
                peer.rates.append(bytes_per_s)

    def look(self, nodes: Collection[NodeId]) -> tuple[MeasuredLink, ...]:
        """End an interval: what is known of the links to `nodes`, by id; the rest is forgotten."""
        with self._lock:
            self._peers = {node: p for node, p in self._peers.items() if node in nodes}
            found = []
            for node, peer in sorted(self._peers.items()):
                if peer.fresh_us:
                    ranked = sorted(peer.fresh_us)
                    peer.seen.append((ranked[len(ranked) // 2], ranked[len(ranked) * 99 // 100]))
                    peer.fresh_us.clear()
                if len(peer.seen) >= SURE:
                    rtt_us, p99_us = (
                        round(median(column)) for column in zip(*peer.seen, strict=True)
                    )
                    found.append(MeasuredLink(node, rtt_us, max(rtt_us, p99_us), peer.mb_per_s))
            return tuple(found)

    def due(self, nodes: Collection[NodeId], now_s: float) -> list[NodeId]:
        """Whose links should be probed: those of which little is known or that seem to change, and
        those that were silent for PROBED_AGAIN_S."""
        with self._lock:
            return [node for node in sorted(nodes)[:LINKS_MAX] if self._due(node, now_s)]

    def _due(self, node: NodeId, now_s: float) -> bool:
        peer = self._peers.get(node)
        if peer is None or now_s - peer.heard_s >= PROBED_AGAIN_S:
            return True
        if peer.fresh_us:
            return False
        last, usual = peer.seen[-1][0], median(rtt_us for rtt_us, _ in peer.seen)
        unsure = not usual / UNSURE <= last <= usual * UNSURE
        return unsure or len(peer.seen) < INTERVALS

    def _peer(self, node: NodeId) -> _Peer | None:
        """Of a peer that is new, if there is room."""
        if node not in self._peers and len(self._peers) < LINKS_MAX:
            self._peers[node] = _Peer()
        return self._peers.get(node)
