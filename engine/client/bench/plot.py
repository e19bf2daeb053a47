"""A plot without a plotting library: one SVG with the cumulative distribution of each latency, side by side.

A curve says which share of the values (y) is at most so many milliseconds (x). Left out: every other kind of plot.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape

from engine.client.bench.spread import percentile

WIDTH, HEIGHT = 380, 310  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 46, 18, 92, 42  # margins in it
POINTS = 200  # of a curve
INK, FAINT, CURVE = "#1f2933", "#d9dee4", "#2463b0"


def draw(title: str, subtitle: str, panels: Mapping[str, Sequence[float]]) -> str:
    """The SVG of `panels`, label to values in milliseconds."""
    width = WIDTH * len(panels)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" width="{width}" height="{HEIGHT}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="{INK}">',
        f'<rect width="{width}" height="{HEIGHT}" fill="white"/>',
        _text(14, 20, title, "start", 'font-weight="bold"'),
        _text(14, 37, subtitle, "start"),
    ]
    for index, (label, values) in enumerate(panels.items()):
        parts += [f'<g transform="translate({index * WIDTH} 0)">', *_panel(label, sorted(values)), "</g>"]
    return "\n".join([*parts, "</svg>", ""])


def ticks(largest: float) -> list[float]:
    """Round numbers from 0 to the first one that is not below `largest`, 4 to 6 of them."""
    largest = max(largest, 1e-6)
    rough = largest / 4
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= rough)
    return [step * count for count in range(math.ceil(largest / step - 1e-9) + 1)]


def _panel(label: str, ordered: Sequence[float]) -> list[str]:
    marks = ticks(ordered[-1])

    def x(value: float) -> float:
        return LEFT + value / marks[-1] * (WIDTH - LEFT - RIGHT)

    def y(share: float) -> float:
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    middle = (LEFT + WIDTH - RIGHT) / 2
    points = " · ".join(f"p{share * 100:.0f} {percentile(ordered, share):,.1f}" for share in (0.5, 0.9, 0.99))
    parts = [_text(middle, TOP - 28, label), _text(middle, TOP - 11, points, more=f'fill="{CURVE}"')]
    for share in (0, 0.25, 0.5, 0.75, 1):
        parts.append(_line(x(0), y(share), x(marks[-1]), y(share)))
        parts.append(_text(LEFT - 6, y(share) + 4, f"{share:.0%}", "end"))
    for mark in marks:
        parts.append(_line(x(mark), y(0), x(mark), y(0) + 4))
        parts.append(_text(x(mark), y(0) + 18, f"{mark:g}"))
    parts.append(_text(middle, HEIGHT - 8, "milliseconds"))
    shares = [point / POINTS for point in range(POINTS + 1)]
    curve = " ".join(f"{x(percentile(ordered, share)):.1f},{y(share):.1f}" for share in shares)
    parts.append(f'<polyline points="{curve}" fill="none" stroke="{CURVE}" stroke-width="2"/>')
    for share in (0.5, 0.9, 0.99):
        value = percentile(ordered, share)
        parts.append(f'<circle cx="{x(value):.1f}" cy="{y(share):.1f}" r="3" fill="{CURVE}"/>')
    return parts


def _text(x: float, y: float, words: str, anchor: str = "middle", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{escape(words)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{FAINT}"/>'
