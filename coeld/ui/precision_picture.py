"""The curve of expected error over size as an SVG, written by hand. Pure.

Both axes are what a person weighs: megabytes to the right, divergence upwards on a logarithmic
scale, since uniform widths lie decades apart.
"""

from collections.abc import Mapping, Sequence
from math import ceil, floor, log10
from typing import TYPE_CHECKING, Final
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from coeld.model.allocation import Plan

WIDTH: Final = 720
HEIGHT: Final = 440
LEFT, RIGHT, TOP, BOTTOM = 70, 30, 50, 60

STYLE: Final = (
    "text{font:13px sans-serif;fill:#222}.small{font-size:11px;fill:#666}"
    ".grid{stroke:#ddd}.mixed{fill:none;stroke:#1667b7;stroke-width:2.5}"
    ".uniform{fill:#c43d2b}.chosen{fill:#1667b7;stroke:#fff;stroke-width:2}"
)


def draw(name: str, curve: Sequence["Plan"], uniform: Mapping[str, "Plan"], chosen: "Plan") -> str:
    """An SVG document: the curve of mixed precision, points for uniform widths and the choice."""
    plans = [*curve, *uniform.values(), chosen]
    errors = [max(plan.error, 1e-12) for plan in plans]
    low, high = floor(log10(min(errors))), ceil(log10(max(errors)))
    high = max(high, low + 1)
    least = min(plan.bytes for plan in plans) / 1e6
    most = max(plan.bytes for plan in plans) / 1e6
    most = max(most, least + 1e-6)

    def x(megabytes: float) -> float:
        return LEFT + (megabytes - least) / (most - least) * (WIDTH - LEFT - RIGHT)

    def y(error: float) -> float:
        share = (log10(max(error, 1e-12)) - low) / (high - low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}">',
        f'<style>{STYLE}</style><rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="{LEFT}" y="28">{escape(name)}: expected divergence (KL, nats per token) '
        "over size of weights</text>",
    ]
    for exponent in range(low, high + 1):
        at = y(10.0**exponent)
        parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(
            f'<text class="small" text-anchor="end" x="{LEFT - 8}" y="{at + 4:.1f}">'
            f"{10.0**exponent:g}</text>"
        )
    for index in range(6):
        megabytes = least + (most - least) * index / 5
        parts.append(
            f'<text class="small" text-anchor="middle" x="{x(megabytes):.1f}" '
            f'y="{HEIGHT - BOTTOM + 20}">{megabytes:.3g} MB</text>'
        )
    line = " ".join(f"{x(plan.bytes / 1e6):.1f},{y(plan.error):.1f}" for plan in curve)
    parts.append(f'<polyline class="mixed" points="{line}"/>')
    for label, plan in uniform.items():
        parts.append(_point("uniform", x(plan.bytes / 1e6), y(plan.error), label))
    label = f"mixed, {chosen.bytes / 1e6:.1f} MB"
    parts.append(_point("chosen", x(chosen.bytes / 1e6), y(chosen.error), label))
    return "\n".join([*parts, "</svg>\n"])


def _point(kind: str, x: float, y: float, label: str) -> str:
    anchor, shift = ("end", -9) if x > WIDTH * 0.7 else ("start", 9)
    return (
        f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="5"/>'
        f'<text class="small" text-anchor="{anchor}" x="{x + shift:.1f}" y="{y - 7:.1f}">'
        f"{escape(label)}</text>"
    )
