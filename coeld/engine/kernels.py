"""How fast this device's kernels ran when they were measured: values, without numpy. Pure.

Three kinds: `dense` is MatMulNBits, `experts` QMoE with 8 of 16 experts chosen, `attention`
projections and 512 tokens of KV cache. Each has run with a few numbers of rows: one as in decode,
many as in a prompt. Few rows are limited by reading weights, many by arithmetic.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

from coeld.errors import FrameError

Kind = Literal["dense", "experts", "attention"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
ROWS: Final = (1, 8, 64)
"""Numbers of rows that are measured."""
NUMBER_MAX: Final = 2**53 - 1


@dataclass(frozen=True, slots=True)
class Timing:
    """One run: `rows` rows in `us` microseconds, which read `read_bytes` of weights and cache."""

    rows: int
    us: int
    read_bytes: int
    row_bytes: int
    """Weight bytes × the rows that were multiplied with them."""

    @property
    def mb_per_s(self) -> int:
        """Megabytes (10^6 bytes) read per second: bytes per microsecond."""
        return max(1, self.read_bytes // self.us)

    @property
    def row_mb_per_s(self) -> int:
        return max(1, self.row_bytes // self.us)


@dataclass(frozen=True, slots=True)
class Kernels:
    """Everything that was measured. Calibration may have run out of time before the last ones."""

    timings: Mapping[Kind, tuple[Timing, ...]]
    clock_mhz: int = 0
    """The clock that the processor was allowed meanwhile; 0: unknown."""
    cut_us: int = 0
    """Work of this device's processor for one cut, at both ends (coeld.engine.cut_work)."""
    remembered: bool = False
    """Measured by an earlier engine on this machine."""

    def speeds(self, routed: bool) -> tuple[int, int]:
        """MB/s in decode, and weight bytes × rows per microsecond with many rows, of a model
        that is `routed` or dense."""
        timings = self.timings["experts" if routed else "dense"]
        return timings[0].mb_per_s, max(timing.row_mb_per_s for timing in timings)

    def to_json(self) -> dict[str, Any]:
        runs = {
            kind: [[t.rows, t.us, t.read_bytes, t.row_bytes] for t in timings]
            for kind, timings in self.timings.items()
        }
        told = {"clock_mhz": self.clock_mhz, "cut_us": self.cut_us, "remembered": self.remembered}
        return {"runs": runs, **told}

    @staticmethod
    def from_json(value: Any) -> "Kernels":
        """The inverse of `to_json`. Raises FrameError."""
        try:
            runs = {kind: tuple(map(_timing, value["runs"][kind])) for kind in KINDS}
            clock_mhz, cut_us = value["clock_mhz"], value["cut_us"]
            remembered = value["remembered"]
        except (KeyError, TypeError) as exc:
            raise FrameError(f"measurements of kernels lack {exc}: they are ignored") from exc
        if any(not runs[kind] or runs[kind][0].rows != 1 for kind in ("dense", "experts")):
            raise FrameError("measurements of kernels lack one with a single row: ignored")
        whole = type(clock_mhz) is type(cut_us) is int and 0 <= cut_us <= NUMBER_MAX
        if not whole or type(remembered) is not bool:
            raise FrameError("measurements of kernels are malformed: they are ignored")
        return Kernels(runs, clock_mhz, cut_us, remembered)

    def table(self) -> dict[str, dict[str, dict[str, float]]]:
        """For people: kind → rows → GB/s of weights and microseconds per row."""
        return {
            kind: {
                str(t.rows): {
                    "gb_per_s": round(t.mb_per_s / 1000, 2),
                    "us_per_row": round(t.us / t.rows, 1),
                }
                for t in timings
            }
            for kind, timings in self.timings.items()
        }


def _timing(row: Any) -> Timing:
    if len(row) != 4 or any(type(n) is not int or not 0 < n <= NUMBER_MAX for n in row):
        raise FrameError("a measurement of a kernel is malformed: all are ignored")
    return Timing(*row)
