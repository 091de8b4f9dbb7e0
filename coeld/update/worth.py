"""Is a better placement worth the move? Hysteresis, so that noise moves nothing. Pure.

Moving reads weights from disks or neighbours, which slows answers meanwhile, so what is saved
within a horizon of steady answering has to pay for the time that the bytes take (Prism, arXiv
2508.12851, moves if C(new) + T(move) < C(old)). A gain below a floor never moves anything, because
predictions are no better than that. Lots that nobody serves are not moves: they are loaded anyway.
"""

from typing import Final

HORIZON_S: Final = 600
"""How long a placement is expected to last."""
MOVE_MB_PER_S: Final = 20
"""A slow disk or a busy link: what moving is assumed to reach."""
GAIN_MIN_PERCENT: Final = 5


def worth_moving(kept_ns: int, fresh_ns: int, moved_bytes: int) -> bool:
    """Compares times per token: what is kept, what is better, and bytes that have to move."""
    gain = kept_ns - fresh_ns
    if gain * 100 < kept_ns * GAIN_MIN_PERCENT:
        return False
    return gain * HORIZON_S * MOVE_MB_PER_S * 1_000_000 >= moved_bytes * kept_ns
