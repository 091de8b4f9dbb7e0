"""bfloat16: the upper half of a float32. Pure; numpy has no such type, so halves are uint16."""

import numpy as np
from numpy.typing import NDArray

Halves = NDArray[np.uint16]


def to_bfloat16(x: NDArray[np.float32]) -> Halves:
    """Round to nearest, ties to even; what would round up to Inf stays the largest number."""
    bits = np.ascontiguousarray(x, "<f4").view("<u4")
    rounded = bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))
    upper = (rounded >> 16).astype("<u2")
    finite: Halves = np.where((upper & 0x7FFF) == 0x7F80, upper - 1, upper)
    return finite.astype("<u2", copy=False)


def to_float32(halves: Halves) -> NDArray[np.float32]:
    """Exactly what the halves stand for."""
    return (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)
