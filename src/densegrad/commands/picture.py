"""The worked example as a picture (SVG): the layer, the two orientations of the upstream gradient, and dL/dW."""
from __future__ import annotations

from html import escape

import numpy as np

from .explain import Example, count

_INK = {"samples": "#b34700", "features": "#6b3fa0", "outputs": "#0b5cad"}
_TINT = {"samples": ("#ffdfc2", "#fff1e2"), "features": ("#f1eafa",), "outputs": ("#d9eafc",)}
_TEXT, _QUIET, _LINE, _CARD, _PANEL = "#1c2430", "#55606f", "#c9d1db", "#ffffff", "#f6f8fa"
_LARGE, _SMALL = (48, 38), (44, 32)
_MINUS = "\N{MINUS SIGN}"
_MARGIN, _GAP, _EQUAL_GAP, _LABEL = 44, 22, 84, 82
_HEAD, _CODE, _TOP, _FOOT = 76, 78, 118, 84

_STYLE = f"""
  text {{ font-family: Inter, "Segoe UI", "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; fill: {_TEXT}; }}
  .code {{ font-family: "SFMono-Regular", "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }}
  .quiet {{ fill: {_QUIET}; }}
  .samples {{ fill: {_INK["samples"]}; }}
  .features {{ fill: {_INK["features"]}; }}
  .outputs {{ fill: {_INK["outputs"]}; }}
  .middle {{ text-anchor: middle; }} .end {{ text-anchor: end; }}
"""


def draw(example: Example) -> str:
    """The picture as an SVG document with a light background of its own."""
    return _Picture(example).document()


class _Picture:
    """The picture, in the making. Positions are the upper left corners of things."""

    def __init__(self, example: Example):
        self.example = example
        self.elements: list[str] = []
        s, d, m = example.samples, example.features, example.outputs
        self.layer_height = 30 + max(s, d) * _LARGE[1] + 52
        self.layer_width = (d + 3 * m) * _LARGE[0] + 2 * _LABEL + 3 * 44 + 196
        body = max(44 + s * _LARGE[1] + 40 + _LARGE[1], 44 + m * _LARGE[1])
        self.panel_height = _HEAD + body + 32 + _CODE
        self.weights_width = _LABEL + (s + 2 * m) * _SMALL[0] + 2 * 38
        self.weights_height = max(44 + max(s, d) * _SMALL[1] + 76, 172)
        across = max(2 * 470 + _EQUAL_GAP, 2 * (_LABEL + m * _LARGE[0] + 50) + _EQUAL_GAP,
                     2 * (_LABEL + s * _LARGE[0] + 52 + _LARGE[0] + 50) + _EQUAL_GAP, self.layer_width,
                     self.weights_width + 400)
        self.panel_width = (across - _EQUAL_GAP) / 2
        self.across, self.width = across, across + 2 * _MARGIN
        self.height = _TOP + self.layer_height + self.panel_height + _GAP + self.weights_height + _FOOT

    def document(self) -> str:
        """Draw everything."""
        e = self.example
        self.text(_MARGIN, 72, "Which axis do you sum?", 38, weight=700)
        sizes = [_coloured(count(number, axis[:-1]), axis) for number, axis in
                 ((e.samples, "samples"), (e.features, "features"), (e.outputs, "outputs"))]
        self.text(_MARGIN, 104, f"A dense layer, Z = X W + b, with {sizes[0]}, {sizes[1]} and {sizes[2]}", 19, "quiet")
        self.layer(_MARGIN + (self.across - self.layer_width) / 2, _TOP)
        top = _TOP + self.layer_height
        second = _MARGIN + self.panel_width + _EQUAL_GAP
        self.samples_first(_MARGIN, top)
        self.features_first(second, top)
        self.equal_sign(second - _EQUAL_GAP / 2, top + self.panel_height / 2)
        self.weights(_MARGIN, top + self.panel_height + _GAP)
        rule = f"whose length is {_coloured('the batch size', 'samples')}"
        if e.samples == e.outputs:
            rule = f"that counts the {_coloured('samples', 'samples')}"
        self.text(self.width / 2, self.height - 34,
                  f"Sum the axis {rule}. "
                  f"What is left has one entry per {_coloured('output', 'outputs')}, as b has.", 21, "middle", 600)
        return self._wrapped()

    def layer(self, x: float, y: float) -> None:
        """X W + b = Z."""
        e = self.example
        top, rows = y + 30, max(e.samples, e.features)
        for sign, name, values, row_axis, col_axis, tint in (
                ("", "X", e.x, "samples", "features", "samples"), ("·", "W", e.w, "features", "outputs", ""),
                ("+", "b", e.b[None], "", "outputs", "outputs"), ("=", "Z", e.z, "samples", "outputs", "samples")):
            middle = top + rows * _LARGE[1] / 2
            first = middle - len(values) * _LARGE[1] / 2
            if sign:
                self.text(x + 22, middle + 9, sign, 28, "middle", 500)
                x += 44
            if row_axis and name != "Z":
                self.text(x + _LABEL - 12, middle + 5, row_axis, 15, f"end {row_axis}", 600)
                x += _LABEL
            width = values.shape[1] * _LARGE[0]
            self.matrix(x, first, values, row_axis, col_axis, tint)
            self.text(x + width / 2, first - 10, col_axis, 15, f"middle {col_axis}", 600)
            axes = (row_axis, col_axis) if row_axis else (col_axis,)
            shape = values.shape if row_axis else values.shape[1:]
            foot = first + len(values) * _LARGE[1]
            self.text(x + width / 2, foot + 26, f"{name} {_shape(shape, axes)}", 16, "middle", 600)
            x += width
        for line, words in enumerate(("What comes back,", "dZ = dL/dZ,", "has the shape of Z")):
            self.text(x + 52, top + rows * _LARGE[1] / 2 - 17 + 22 * line, words, 16, "" if line == 1 else "quiet", 500)

    def samples_first(self, x: float, y: float) -> None:
        """dz (S, M): down the columns."""
        e = self.example
        self.panel(x, y, "dL/db, samples first", f"dz.shape is {_shape(e.dz.shape, ('samples', 'outputs'))}",
                   ("np.sum(dz, axis=0)  # or dz.T @ ones", "densegrad.bias_grad(dz)"))
        (cell, row), width = _LARGE, e.outputs * _LARGE[0]
        left = x + (self.panel_width - width - _LABEL) / 2 + _LABEL
        top = self.centred(y, 44 + e.samples * row + 40 + row) + 44
        self.axis_above(left, top, width, "outputs", 1)
        self.axis_beside(left, top, e.samples * row, "samples", 0, summed=True)
        self.matrix(left, top, e.dz, "samples", "outputs", "samples")
        bottom = top + e.samples * row
        for c in range(e.outputs):
            centre = left + (c + 0.5) * cell
            for r in range(1, e.samples):
                self.plus(centre, top + r * row)
            self.arrow(centre, bottom + 7, centre, bottom + 33)
        self.text(left - 20, bottom + 40 + row / 2 + 6, "db", 17, "end outputs", 700)
        self.matrix(left, bottom + 40, e.db[None], "", "outputs", "outputs", weight=700)

    def features_first(self, x: float, y: float) -> None:
        """dz_t (M, S): along the rows."""
        e = self.example
        self.panel(x, y, "dL/db, features first",
                   f"dz_t.shape is {_shape(e.dz.T.shape, ('outputs', 'samples'))}",
                   ("np.sum(dz_t, axis=1)", "densegrad.bias_grad(dz_t, batch_axis=1)"))
        (cell, row), width = _LARGE, e.samples * _LARGE[0]
        left = x + (self.panel_width - width - 52 - cell - _LABEL) / 2 + _LABEL
        top = self.centred(y, 44 + e.outputs * row) + 44
        self.axis_above(left, top, width, "samples", 1, summed=True)
        self.axis_beside(left, top, e.outputs * row, "outputs", 0)
        self.matrix(left, top, e.dz.T, "outputs", "samples", "samples")
        for r in range(e.outputs):
            centre = top + (r + 0.5) * row
            for c in range(1, e.samples):
                self.plus(left + c * cell, centre)
            self.arrow(left + width + 9, centre, left + width + 43, centre)
        self.text(left + width + 52 + cell / 2, top - 12, "db", 17, "middle outputs", 700)
        self.matrix(left + width + 52, top, e.db[:, None], "outputs", "", "outputs", weight=700)

    def weights(self, x: float, y: float) -> None:
        """dW = Xᵀ dZ: the samples are the inner axis."""
        e = self.example
        self.box(x, y, self.across, self.weights_height, _PANEL, 14)
        self.text(x + 22, y + 36, "dL/dW = Xᵀ dZ, the same axis", 20, weight=700)
        self.text(x + 22, y + 64, f"dw.shape is {_shape(e.dw.shape, ('features', 'outputs'))}", 16, "code")
        self.code(x + 14, y + self.weights_height, 340, ("x.T @ dz", "densegrad.weight_grad(x, dz)"))
        cell, row = _SMALL
        rows = max(e.samples, e.features)
        left = x + 354 + (self.across - 354 - self.weights_width) / 2 + _LABEL
        top = y + 54
        middle = top + rows * row / 2
        half = e.features * row / 2
        self.text(left - 12, middle + 5, "features", 15, "end features", 600)
        for name, values, row_axis, col_axis, tint, sign in (
                ("Xᵀ", e.x.T, "features", "samples", "samples", "·"),
                ("dZ", e.dz, "samples", "outputs", "samples", "="),
                ("dW", e.dw, "features", "outputs", "", "")):
            width, first = values.shape[1] * cell, middle - len(values) * row / 2
            self.matrix(left, first, values, row_axis, col_axis, tint, cell=_SMALL,
                        weight=700 if name == "dW" else 500)
            self.text(left + width / 2, middle + half + 26, name, 16, "middle", 700)
            if col_axis == "samples":
                self.bracket_above(left, first, width, col_axis)
            elif row_axis == "samples":
                self.bracket_beside(left, first, len(values) * row, row_axis)
            if name != "dZ":
                raised = 20 if name == "Xᵀ" else 10
                self.text(left + width / 2, first - raised, col_axis, 15, f"middle {col_axis}", 600)
            if sign:
                self.text(left + width + (14 if sign == "·" else 19), middle + 8, sign, 24, "middle", 500)
            left += width + 38

    # The parts of a panel.

    def panel(self, x: float, y: float, title: str, shape: str, code: tuple[str, ...]) -> None:
        """A box with a title, a shape and, at its foot, lines of code."""
        self.box(x, y, self.panel_width, self.panel_height, _PANEL, 14)
        self.text(x + 22, y + 36, escape(title), 20, weight=700)
        self.text(x + 22, y + 64, shape, 16, "code")
        self.code(x + 14, y + self.panel_height, self.panel_width - 28, code)

    def code(self, x: float, foot: float, width: float, lines: tuple[str, ...]) -> None:
        """Lines of code at the foot of a panel."""
        self.box(x, foot - _CODE, width, _CODE - 14, _CARD, 8)
        for i, line in enumerate(lines):
            self.text(x + 14, foot - _CODE + 26 + 25 * i, escape(line), 15, "code", 400 + 200 * i)

    def centred(self, y: float, needed: float) -> float:
        """Where something of this height starts, to stand in the middle of a panel's body."""
        return y + _HEAD + (self.panel_height - _HEAD - _CODE - 14 - needed) / 2

    def axis_above(self, x: float, y: float, width: float, axis: str, number: int, summed: bool = False) -> None:
        """The name of the axis that runs along the columns."""
        if summed:
            self.bracket_above(x, y, width, axis)
        raised, weight = (22, 700) if summed else (12, 600)
        self.text(x + width / 2, y - raised, f"{axis} · axis {number}", 15, f"middle {axis}", weight)

    def axis_beside(self, x: float, y: float, height: float, axis: str, number: int, summed: bool = False) -> None:
        """The name of the axis that runs down the rows."""
        if summed:
            self.bracket_beside(x, y, height, axis)
        away, weight = (22, 700) if summed else (12, 600)
        for line, words in enumerate((axis, f"axis {number}")):
            self.text(x - away, y + height / 2 - 3 + 18 * line, words, 15, f"end {axis}", weight)

    def bracket_above(self, x: float, y: float, width: float, axis: str) -> None:
        """A bracket over something."""
        self.path(f"M {x + 2:g} {y - 7:g} v -7 h {width - 4:g} v 7", _INK[axis])

    def bracket_beside(self, x: float, y: float, height: float, axis: str) -> None:
        """A bracket to the left of something."""
        self.path(f"M {x - 7:g} {y + 2:g} h -7 v {height - 4:g} h 7", _INK[axis])

    def arrow(self, x: float, y: float, to_x: float, to_y: float) -> None:
        """An arrow along the summed axis."""
        self.path(f"M {x:g} {y:g} L {to_x:g} {to_y:g}", _INK["samples"], "arrow")

    def plus(self, x: float, y: float) -> None:
        """A plus on the line between two entries."""
        self.elements.append(f'<circle cx="{x:g}" cy="{y:g}" r="7" fill="{_CARD}" stroke="{_INK["samples"]}"/>')
        self.path(f"M {x - 3.5:g} {y:g} h 7 M {x:g} {y - 3.5:g} v 7", _INK["samples"])

    def equal_sign(self, x: float, y: float) -> None:
        """Two orientations, one answer."""
        self.elements.append(f'<circle cx="{x:g}" cy="{y:g}" r="21" fill="{_INK["outputs"]}"/>')
        self.path(f"M {x - 9:g} {y - 5:g} h 18 M {x - 9:g} {y + 5:g} h 18", _CARD, width=3.5)
        self.text(x, y + 44, "the same", 15, "middle outputs", 600)
        self.text(x, y + 63, "db", 15, "middle outputs", 600)

    # The strokes.

    def matrix(self, x: float, y: float, values: np.ndarray, row_axis: str, col_axis: str, tint: str, *,
               cell: tuple[int, int] = _LARGE, weight: int = 500) -> None:
        """A grid of integers; the entries of the axis `tint` have backgrounds that tell them apart."""
        width, height = cell
        shades = _TINT.get(tint, (_CARD,))
        for (r, c), value in np.ndenumerate(values):
            shade = shades[(c if tint == col_axis else r) % len(shades)]
            left, top = x + c * width, y + r * height
            self.box(left, top, width, height, shade)
            digits = f"{int(value)}".replace("-", _MINUS)
            self.text(left + width / 2, top + height / 2 + 6, digits, 17, "middle", weight)
        across, down = values.shape[1] * width, len(values) * height
        self.elements.append(f'<rect x="{x:g}" y="{y:g}" width="{across}" height="{down}" rx="3" fill="none" '
                             f'stroke="{_TEXT}" stroke-width="1.5"/>')

    def box(self, x: float, y: float, width: float, height: float, fill: str, radius: int = 0) -> None:
        """A rectangle with a thin edge."""
        self.elements.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius}" '
                             f'fill="{fill}" stroke="{_LINE}"/>')

    def path(self, points: str, colour: str, head: str = "", width: float = 2) -> None:
        """A line, with an arrow head if one is named."""
        marker = f' marker-end="url(#{head})"' if head else ""
        self.elements.append(f'<path d="{points}" fill="none" stroke="{colour}" stroke-width="{width:g}" '
                             f'stroke-linecap="round"{marker}/>')

    def text(self, x: float, y: float, words: str, size: int, look: str = "", weight: int = 400) -> None:
        """Words on a baseline; `words` may hold tspans."""
        self.elements.append(f'<text x="{x:g}" y="{y:g}" font-size="{size}" font-weight="{weight}" class="{look}">'
                             f'{words}</text>')

    def _wrapped(self) -> str:
        e = self.example
        told = (f"For an upstream gradient of shape ({e.samples}, {e.outputs}), samples first, the bias gradient is "
                f"the sum over axis 0; for the transposed one, ({e.outputs}, {e.samples}), the sum over axis 1. Both "
                f"are {', '.join(str(int(value)) for value in e.db)}.")
        width, height = f"{self.width:g}", f"{self.height:g}"
        return "\n".join([
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            'role="img" aria-labelledby="title told">',
            '<title id="title">Which axis do you sum? The gradients of a dense layer</title>',
            f'<desc id="told">{told}</desc>',
            f"<style>{_STYLE}</style>",
            '<defs><marker id="arrow" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="5" markerHeight="5" '
            f'orient="auto"><path d="M 0 0 L 8 4 L 0 8 z" fill="{_INK["samples"]}"/></marker></defs>',
            f'<rect x="1" y="1" width="{self.width - 2:g}" height="{self.height - 2:g}" rx="18" fill="{_CARD}" '
            f'stroke="{_LINE}"/>',
            *self.elements, "</svg>", ""])


def _coloured(words: str, axis: str) -> str:
    return f'<tspan class="{axis}" font-weight="600">{escape(words)}</tspan>'


def _shape(shape: tuple[int, ...], axes: tuple[str, ...]) -> str:
    numbers = ", ".join(_coloured(str(length), axis) for length, axis in zip(shape, axes, strict=True))
    return f"({numbers}{',' if len(shape) == 1 else ''})"
