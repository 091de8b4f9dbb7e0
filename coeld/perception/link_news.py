"""Which measured links are worth telling: those that differ from what others believe. Pure.

A link is believed to be as it was told, and one that never was to be as `assumed`; it is told when
its round trip or its bandwidth has left the band around that, in steps of SPEED_STEP (coeld.
perception.resources). So a link like the assumed one is never told, and noise moves nothing; that
all have been measured is told once. Round trips below RTT_US_MIN count as that long: what comes on
top of them in every call is more. The 99th percentile travels along; nothing is decided by it, so
that it changed is no news.
"""

from collections.abc import Collection, Iterable
from typing import Final

from coeld.ids import NodeId
from coeld.measured import LINKS_MAX, MB_PER_S_MAX, RTT_US_MAX, MeasuredLink
from coeld.perception.resources import stepped, stepped_speed

RTT_US_MIN: Final = 200


class LinkNews:
    """What this device last told the swarm of its links."""

    def __init__(self, rtt_us: int, mb_per_s: int) -> None:
        """What a link that nobody told of is assumed to be."""
        self.told: tuple[MeasuredLink, ...] = ()
        """By id of the other device."""
        self.probed = False
        """At some time the links to all devices that were there had been measured. Who comes later
        measures its own."""
        self._assumed = rtt_us, mb_per_s

    def measured(self, links: Iterable[MeasuredLink], present: Collection[NodeId]) -> bool:
        """Note what the links are like now; True if it matters, and then there is news to tell.
        `present` are all devices that are there, this one too.

        Of links that are not measured at present, those to devices that are there stay as told.
        """
        told = {link.node: link for link in self.told if link.node in present}
        known = [link for link in links if link.node in present]
        probed = self.probed or 0 < min(len(present) - 1, LINKS_MAX) <= len(known)
        for link in known:
            before = told.get(link.node)
            rtt_us, mb_per_s = (before.rtt_us, before.mb_per_s) if before else self._assumed
            fresh_us = stepped(rtt_us, min(max(RTT_US_MIN, link.rtt_us), RTT_US_MAX // 2))
            fresh_mb = (
                stepped(mb_per_s, min(link.mb_per_s, MB_PER_S_MAX // 2))
                if link.mb_per_s
                else mb_per_s
            )
            if (fresh_us, fresh_mb) != (rtt_us, mb_per_s) and (before or len(told) < LINKS_MAX):
                p99_us = max(fresh_us, min(stepped_speed(link.rtt_p99_us), RTT_US_MAX))
                told[link.node] = MeasuredLink(link.node, fresh_us, p99_us, fresh_mb)
        before_this = self.told, self.probed
        self.told, self.probed = tuple(told[node] for node in sorted(told)), probed
        return (self.told, self.probed) != before_this
