"""What is known of packets that get lost on the way to peers. Pure; time is handed in.

A call whose rows or answer was lost waits for the kernel to send it again, and every further loss
makes the kernel wait longer: with 30 % of packets lost a call over a link of 0.3 ms took 0.2 s on
average and 3 s at worst. Asked again over another connection it is as likely to get through at once
as the first time. That is no burden to the peer, which has not seen the call, or has done its work
long ago; so each packet that the kernel had to send again earns second calls (`choice.py`).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from coeld.ids import NodeId

LOSSY_S: Final = 2.0
"""So long after a loss more are expected."""


@dataclass(slots=True)
class Losses:
    """Of all peers of one decoder."""

    packets: int = 0
    """That had to be sent again, so far."""
    _at_s: dict[NodeId, float] = field(default_factory=dict)

    def note(self, node: NodeId, packets: int, now_s: float) -> None:
        self.packets += packets
        self._at_s[node] = now_s

    def lossy(self, nodes: Iterable[NodeId], now_s: float) -> bool:
        """Have packets to one of them been lost lately?"""
        if not self._at_s:
            return False
        return any(now_s - self._at_s.get(node, float("-inf")) < LOSSY_S for node in nodes)
