"""What this device is asked for, counted until the agent is told. The decoder's thread."""

import time
from typing import Final

TELL_S: Final = 2.0
"""From the first thing that was not told yet."""


class Usage:
    """Counts since the last time."""

    def __init__(self) -> None:
        self.requests = 0
        self.prompt_tokens = 0
        self.tokens = 0
        """Generated."""
        self._since_s: float | None = None

    def wait_s(self) -> float | None:
        """How long there is to wait before this should be told; None: there is nothing."""
        if not (self.requests or self.tokens):
            return None
        now = time.monotonic()
        if self._since_s is None:
            self._since_s = now
        return max(0.0, self._since_s + TELL_S - now)

    def take(self) -> dict[str, int]:
        """The counts, which begin anew."""
        counts = self.requests, self.prompt_tokens, self.tokens
        self.requests = self.prompt_tokens = self.tokens = 0
        self._since_s = None
        return dict(zip(("requests", "prompt_tokens", "tokens"), counts, strict=True))
