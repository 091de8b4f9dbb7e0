"""Messages that arrive again: over a second broker, or around bridges between brokers. Pure.

Merging gossip is idempotent, so repeats do no harm, but reading them costs time, and bridges that
form a loop repeat everything without end. So a message that is byte for byte one of a moment ago is
dropped unread, and one that comes back again and again tells of a loop, which only the owner of the
brokers can open. The window is shorter than any pause after which a device says the same again.
"""

import hashlib
from collections import OrderedDict
from typing import Final

WINDOW_S: Final = 0.25
REMEMBERED_MAX: Final = 4096
LOOP_COPIES: Final = 32
"""Copies of one message within the window; brokers that are all bridged make their number squared
at most, which is 16 for four."""


class Repeats:
    """What arrived within the last moment."""

    def __init__(self) -> None:
        self.dropped = 0
        self._seen: OrderedDict[bytes, tuple[float, int]] = OrderedDict()

    def seen(self, topic: str, payload: bytes, now: float) -> int:
        """How many copies arrived before, within the window."""
        key = hashlib.blake2b(payload, key=topic.encode()[:64], digest_size=16).digest()
        while self._seen:
            first = next(iter(self._seen))
            if now - self._seen[first][0] <= WINDOW_S and len(self._seen) < REMEMBERED_MAX:
                break
            del self._seen[first]
        at, copies = self._seen.get(key, (now, 0))
        self._seen[key] = (at, copies + 1)
        self.dropped += copies > 0
        return copies
