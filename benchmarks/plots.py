"""Plots as SVG, written by hand: horizontal bars, and lines and points in a plane. They suit light and dark pages."""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, MARGIN, LINE = 860, 28, 24
#: series in the order they appear: a light and a dark page's colours
COLOURS = (("#0b5cad", "#6cb1ff"), ("#b34700", "#ffa366"), ("#6b3fa0", "#c3a1f0"), ("#4b5563", "#b6c0cc"),
           ("#a16207", "#e5c15c"), ("#0f766e", "#5fd4c7"), ("#9d174d", "#f49ac1"))
#: what else has a colour, likewise
_INK = {"card": ("#ffffff", "#0d1117"), "line": ("#c9d1db", "#3a434d"), "text": ("#1c2430", "#e6edf3"),
        "quiet": ("#55606f", "#9aa5b1"), **{f"c{n}": pair for n, pair in enumerate(COLOURS)}}
_LOOKS = [" ".join(f".{name} {{ fill: {pair[shade]}; }}" for name, pair in _INK.items())
          + "".join(f" .{name}.stroke {{ stroke: {pair[shade]}; }}" for name, pair in _INK.items()) for shade in (0, 1)]
_STYLE = f"""
  text {{ font-family: Inter, "Segoe UI", "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; }}
  .middle {{ text-anchor: middle; }} .end {{ text-anchor: end; }}
  {_LOOKS[0]}
  @media (prefers-color-scheme: dark) {{ {_LOOKS[1]} }}
  .stroke.open {{ fill: none; }}
"""


@dataclass(frozen=True)
class Bar:
    """One bar: its value in words beside it, and a limit that is marked."""

    label: str
    series: str
    value: float
    words: str
    limit: float | None = None


@dataclass(frozen=True)
class Curve:
    """Points of one series, joined by a line or each by itself."""

    series: str
    points: Sequence[tuple[float, float]]
    joined: bool = True


class _Drawing:
    """A card of a fixed width that grows downwards."""

    def __init__(self, title: str, note: str, series: Sequence[str]):
        self.series = list(dict.fromkeys(series))
        self.elements: list[str] = []
        self.title, self.note = title, note
        self.text(MARGIN, 42, title, 20, weight=600)
        self.text(MARGIN, 66, note, 14, "quiet")
        self.y = 88.0

    def colour(self, series: str) -> str:
        return f"c{self.series.index(series) % len(COLOURS)}"

    def text(self, x: float, y: float, words: str, size: int, look: str = "text", weight: int = 400) -> None:
        self.elements.append(f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" '
                             f'class="{look}">{escape(words)}</text>')

    def rule(self, x: float, y: float, to_x: float, to_y: float, colour: str = "line", width: float = 1) -> None:
        self.elements.append(f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}" class="{colour} stroke" '
                             f'stroke-width="{width:g}"/>')

    def key(self) -> None:
        """Which colour is which series, if there are several."""
        if len(self.series) < 2:
            return
        x = float(MARGIN)
        for name in self.series:
            self.elements.append(f'<rect x="{x:.1f}" y="{self.y - 6:.1f}" width="12" height="12" rx="2" '
                                 f'class="{self.colour(name)}"/>')
            self.text(x + 18, self.y + 5, name, 14)
            x += 18 + 8 * len(name) + 26
        self.y += 26

    def document(self) -> str:
        height = self.y + MARGIN
        return "\n".join([
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" '
            f'height="{height:.0f}" role="img" aria-labelledby="title told">',
            f'<title id="title">{escape(self.title)}</title>', f'<desc id="told">{escape(self.note)}</desc>',
            f"<style>{_STYLE}</style>",
            f'<rect x="1" y="1" width="{WIDTH - 2}" height="{height - 2:.0f}" rx="14" class="card"/>',
            *self.elements, "</svg>", ""])


def bars(title: str, note: str, rows: Sequence[Bar], end: float, unit: str) -> str:
    """Bars from zero to `end`, under one another in the given order."""
    drawing = _Drawing(title, note, [row.series for row in rows])
    drawing.key()
    left = MARGIN + 14 + max(7.4 * len(row.label) for row in rows)
    across = (WIDTH - MARGIN - 110 - left) / end
    top, bottom = drawing.y, drawing.y + LINE * len(rows)
    for tick in ticks(end):
        drawing.rule(left + tick * across, top, left + tick * across, bottom)
        drawing.text(left + tick * across, bottom + 18, f"{tick:g}{unit}", 13, "middle quiet")
    for number, row in enumerate(rows):
        y = top + LINE * number
        length = min(row.value, end) * across
        drawing.text(left - 10, y + 16, row.label, 14, "end text")
        drawing.elements.append(f'<rect x="{left:.1f}" y="{y + 4:.1f}" width="{max(length, 1.5):.1f}" '
                                f'height="{LINE - 8}" rx="2" class="{drawing.colour(row.series)}"/>')
        if row.limit is not None:
            at = left + row.limit * across
            drawing.rule(at, y + 2, at, y + LINE - 2, "text", 2)
        drawing.text(left + max(length, (row.limit or 0) * across) + 8, y + 16, row.words, 13, "quiet")
    drawing.y = bottom + 22
    return drawing.document()


def plane(title: str, note: str, curves: Sequence[Curve], x_name: str, y_name: str, height: int = 330) -> str:
    """Lines and points, both axes logarithmic."""
    drawing = _Drawing(title, note, [curve.series for curve in curves])
    drawing.key()
    every = [point for curve in curves for point in curve.points]
    x_from, x_to = _decades([x for x, _ in every])
    y_from, y_to = _decades([y for _, y in every])
    left, right, top = MARGIN + 62.0, WIDTH - MARGIN - 14.0, drawing.y + 18
    bottom = top + height

    def place(x: float, y: float) -> tuple[float, float]:
        return (left + (math.log10(x) - x_from) / (x_to - x_from) * (right - left),
                bottom - (math.log10(y) - y_from) / (y_to - y_from) * (bottom - top))

    for decade in range(x_from, x_to + 1):
        x, _ = place(10.0 ** decade, 10.0 ** y_from)
        drawing.rule(x, top, x, bottom)
        drawing.text(x, bottom + 18, number(10.0 ** decade), 13, "middle quiet")
    for decade in range(y_from, y_to + 1):
        _, y = place(10.0 ** x_from, 10.0 ** decade)
        drawing.rule(left, y, right, y)
        drawing.text(left - 8, y + 4, number(10.0 ** decade), 13, "end quiet")
    drawing.text(MARGIN, top - 10, y_name, 13, "quiet")
    drawing.text((left + right) / 2, bottom + 38, x_name, 13, "middle quiet")
    for curve in curves:
        colour, placed = drawing.colour(curve.series), [place(*point) for point in curve.points]
        if curve.joined:
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
            drawing.elements.append(f'<polyline points="{line}" class="{colour} stroke open" stroke-width="2"/>')
        drawing.elements += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" class="{colour}"/>' for x, y in placed]
    drawing.y = bottom + 44
    return drawing.document()


def ticks(end: float) -> list[float]:
    """Round numbers from 0 to end, about five."""
    step = 10.0 ** math.floor(math.log10(end))
    step = next(step * part for part in (0.1, 0.2, 0.5, 1) if end / (step * part) <= 6)
    return [step * n for n in range(int(end / step + 1e-9) + 1)]


def number(value: float) -> str:
    """1000000 as 1M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _decades(values: Sequence[float]) -> tuple[int, int]:
    """The exponents of ten around them, at least one apart."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return low, max(high, low + 1)
