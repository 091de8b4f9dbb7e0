"""The life of a simulated swarm as one SVG: who agrees, what is said, what moves, over time. Pure.

Three panels share one time axis; vertical lines are the phases of the scenario, dots are crashes.
Traffic has a logarithmic axis, because forming costs a thousand times what rest does. Colours
keep their contrast in light and dark surroundings; every line is also told by its title.
"""

import math
from collections.abc import Callable, Sequence
from html import escape

from coeld.sim.observe import Sample

WIDTH, LEFT, RIGHT, TOP = 960, 76, 16, 84
PANEL, GAP, BOTTOM = 120, 44, 36
INK, FAINT, PAPER = "#1f2933", "#d5dbe1", "#ffffff"
COLOURS = ("#0b7285", "#a5480a", "#5f3dc4")
CRASH = "#c92a2a"
TICKS = 8


def draw(
    title: str,
    samples: Sequence[Sample],
    marks: Sequence[tuple[float, str]],
    crashes: Sequence[float],
) -> str:
    """An SVG document. Times in seconds since the start."""
    end_s = max([1.0, *(sample.at_s for sample in samples)])
    height = TOP + 3 * PANEL + 2 * GAP + BOTTOM

    def x(at_s: float) -> float:
        return LEFT + at_s / end_s * (WIDTH - LEFT - RIGHT)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}"'
        f' height="{height}" font-family="system-ui, sans-serif" font-size="12" fill="{INK}">',
        f'<rect width="{WIDTH}" height="{height}" fill="{PAPER}"/>',
        f'<text x="{LEFT}" y="20" font-size="15" font-weight="600">{escape(title)}</text>',
    ]
    parts += _phases(marks, x, height)
    most = max([1000.0, *(sample.bytes_per_device_s for sample in samples)])
    decades = math.ceil(math.log10(most / 100))

    def traffic(sample: Sample) -> float:
        return math.log10(max(100.0, sample.bytes_per_device_s) / 100) / decades

    moved = max([1, *(sample.moves for sample in samples)])
    panels: list[tuple[str, list[str], Callable[[Sample], float]]] = [
        ("devices that hold the same view", ["0 %", "50 %", "100 %"], lambda s: s.agreeing),
        (
            "bytes sent per device and second",
            [_bytes(100 * 10**decade) for decade in range(decades + 1)],
            traffic,
        ),
        ("lots loaded so far", ["0", f"{moved:,}"], lambda s: s.moves / moved),
    ]
    for number, (name, labels, value) in enumerate(panels):
        top = TOP + number * (PANEL + GAP)
        parts += _axis(name, labels, top)
        points = " ".join(
            f"{x(sample.at_s):.1f},{top + PANEL * (1 - min(1.0, value(sample))):.1f}"
            for sample in samples
        )
        parts.append(
            f'<polyline fill="none" stroke="{COLOURS[number]}" stroke-width="1.8"'
            f' points="{points}"><title>{escape(name)}</title></polyline>'
        )
    parts += [
        f'<circle cx="{x(at):.1f}" cy="{TOP + PANEL + 10}" r="3" fill="{CRASH}">'
        f"<title>a device crashes at {at:.1f} s</title></circle>"
        for at in crashes
    ]
    parts += _clock(end_s, x, height)
    return "\n".join([*parts, "</svg>", ""])


def _phases(
    marks: Sequence[tuple[float, str]], x: Callable[[float], float], height: int
) -> list[str]:
    """Lines where phases begin; names on two heights, so that short phases stay readable."""
    parts = []
    for number, (at_s, name) in enumerate(marks):
        place, y = x(at_s), 36 if number % 2 else 48
        parts.append(
            f'<line x1="{place:.1f}" y1="{y + 4}" x2="{place:.1f}" y2="{height - BOTTOM}"'
            f' stroke="{FAINT}" stroke-width="1"/>'
            f'<text x="{place + 3:.1f}" y="{y}" font-size="11">{escape(name)}</text>'
        )
    return parts


def _axis(name: str, labels: list[str], top: int) -> list[str]:
    parts = [
        f'<text x="{LEFT}" y="{top - 9}" font-size="11" font-weight="600">{escape(name)}</text>'
    ]
    for index, label in enumerate(labels):
        y = top + PANEL * (1 - index / (len(labels) - 1))
        parts.append(
            f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="{FAINT}"/>'
            f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end" font-size="11">{label}</text>'
        )
    return parts


def _clock(end_s: float, x: Callable[[float], float], height: int) -> list[str]:
    rough = end_s / TICKS
    size = 10 ** math.floor(math.log10(rough))
    step = next(factor * size for factor in (1, 2, 5, 10) if factor * size >= rough)
    return [
        f'<text x="{x(tick * step):.1f}" y="{height - 12}" text-anchor="middle" font-size="11">'
        f"{tick * step:g} s</text>"
        for tick in range(int(end_s / step) + 1)
    ]


def _bytes(count: int) -> str:
    for unit, size in (("MB", 10**6), ("KB", 10**3)):
        if count >= size:
            return f"{count // size} {unit}"
    return f"{count} B"
