"""The question worked through with small integers: which axis is summed for dL/db, and for dL/dW?"""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

#: largest samples, features or outputs that still make a page
MOST = 8

_SEED = 10
_WIDTH = 76
_PAGE = 80


@dataclass(frozen=True)
class Way:
    """One way to write a gradient: the expression and its value."""

    text: str
    value: np.ndarray


@dataclass(frozen=True)
class Example:
    """A dense layer Z = X W + b with integer entries, the upstream gradient dZ, and its gradients from the kernels."""

    x: np.ndarray
    w: np.ndarray
    b: np.ndarray
    z: np.ndarray
    dz: np.ndarray
    db: np.ndarray
    dw: np.ndarray
    bias_ways: Mapping[str, tuple[Way, ...]]
    weight_ways: Mapping[str, tuple[Way, ...]]
    rounding_ways: tuple[Way, ...]

    @property
    def samples(self) -> int:
        """S, the length of the batch."""
        return self.x.shape[0]

    @property
    def features(self) -> int:
        """D, the inputs of the layer."""
        return self.x.shape[1]

    @property
    def outputs(self) -> int:
        """M, the outputs of the layer."""
        return self.dz.shape[1]

    @property
    def agrees(self) -> bool:
        """Whether every way gives the same numbers: exactly, since they are small integers."""
        return (all(np.array_equal(way.value.ravel(), self.db) for ways in self.bias_ways.values() for way in ways)
                and all(np.array_equal(way.value, self.dw) for ways in self.weight_ways.values() for way in ways))


def work_out(samples: int = 2, features: int = 4, outputs: int = 3) -> Example:
    """An example of this size, with its gradients computed by densegrad's kernels."""
    from .. import bias_grad, weight_grad

    draw = np.random.default_rng(_SEED)
    x = draw.integers(-2, 4, (samples, features)).astype(np.float32)
    w = draw.integers(-2, 3, (features, outputs)).astype(np.float32)
    b = draw.integers(-3, 4, outputs).astype(np.float32)
    dz = draw.integers(-4, 6, (samples, outputs)).astype(np.float32)
    dz_t = np.ascontiguousarray(dz.T)
    ones = np.ones((samples, 1), np.float32)
    db, dw = bias_grad(dz), weight_grad(x, dz)
    bias_ways = {
        "NumPy": (
            Way("dz.T @ ones", dz.T @ ones),
            Way("np.sum(dz, axis=0, keepdims=True)", np.sum(dz, axis=0, keepdims=True)),
            Way("np.sum(dz_t, axis=1)", np.sum(dz_t, axis=1)),
        ),
        "the kernels": (
            Way("densegrad.bias_grad(dz)", db),
            Way("densegrad.bias_grad(dz, keepdims=True)", bias_grad(dz, keepdims=True)),
            Way("densegrad.bias_grad(dz_t, batch_axis=1)", bias_grad(dz_t, batch_axis=1)),
        ),
    }
    weight_ways = {
        "NumPy": (
            Way("x.T @ dz", x.T @ dz),
            Way("sum(np.outer(x[s], dz[s]) for s in range(samples))",
                np.sum([np.outer(*rows) for rows in zip(x, dz, strict=True)], axis=0)),
            Way("x.T @ dz_t.T", x.T @ dz_t.T),
        ),
        "the kernels": (
            Way("densegrad.weight_grad(x, dz)", dw),
            Way("densegrad.weight_grad(x, dz_t, batch_axis=1)", weight_grad(x, dz_t, batch_axis=1)),
            Way('densegrad.weight_grad(x, dz, weight_layout="out_in").T', weight_grad(x, dz, weight_layout="out_in").T),
        ),
    }
    cancelling = np.array([[1e8], [1], [-1e8]], np.float32)
    rounding_ways = (
        Way("densegrad.bias_grad(dz)", bias_grad(cancelling)),
        Way("densegrad.bias_grad(dz, compensated=True)", bias_grad(cancelling, compensated=True)),
    )
    return Example(x, w, b, x @ w + b, dz, db, dw=dw, bias_ways=bias_ways, weight_ways=weight_ways,
                   rounding_ways=rounding_ways)


def pages(example: Example) -> Iterator[tuple[str, str]]:
    """The explanation as (title, plain text) pairs, no line longer than 80 signs."""
    yield "The layer: Z = X W + b", _layer_page(example)
    yield "dL/db: add up the samples", _bias_page(example)
    yield '"Sum the rows" is "sum over axis 0"', _words_page(example)
    yield "Which axis? Ask the shape of the upstream gradient", _axis_page(example)
    yield "dL/dW: the same axis disappears", _weight_page(example)
    yield "What rounding takes from dL/db, and how to keep it", _rounding_page(example)


def _layer_page(e: Example) -> str:
    picture = _beside(("", _matrix("X", e.x, "samples", "features")), ("·", _matrix("W", e.w, "features", "outputs")),
                      ("+", _matrix("b", e.b[None], "", "outputs")), ("=", _matrix("Z", e.z, "samples", "outputs")))
    return f"""{picture}

There is one bias per output, and every sample uses it: b is added to every row
of Z. On the way back the upstream gradient dZ = dL/dZ arrives. It has the shape
of Z, ({e.samples}, {e.outputs})."""


def _bias_page(e: Example) -> str:
    return f"""Raise b[m] by a little and Z[s, m] rises by as much, in every sample s. The
chain rule adds up what each sample makes of that:

  dL/db[m] = sum over s of dL/dZ[s, m] · ∂Z[s, m]/∂b[m]
           = sum over s of dZ[s, m] · 1

{_beside(("", _matrix("dz", e.dz, "samples", "outputs", below=e.db)),
         (" ", _matrix("dz_t", e.dz.T, "outputs", "samples", right=e.db)))}

As a product with a column of ones this is dZᵀ·1. In NumPy it is a sum over
axis 0. And if the upstream gradient is handed over transposed, dz_t = dz.T of
shape ({e.outputs}, {e.samples}), the samples lie along axis 1, and that is the axis to sum:

{_ways(e.bias_ways, e)}"""


def _words_page(e: Example) -> str:
    rows = "\n".join(f"  {' ' if s == 0 else '+'} row {s}   {_row(e.dz[s])}" for s in range(e.samples))
    entries = count(e.outputs, "entry", "entries")
    other = f"and cannot be the gradient of b, which has {entries}, one per output."
    if e.samples == e.outputs:
        other = f"as many as b has entries here, and yet not its gradient: b has {entries}, one\nper output."
    if e.samples == e.outputs == 1:
        other = "which here is the same number: a batch of one sample and a layer of one output\nare too small to tell."
    return f""""Sum the rows" means: add the rows to one another, entry by entry, until one
row is left.

{rows}
  = db      {_row(e.db)}

Axis 0 is the index that counts the rows, the s of dZ[s, m]. "Sum over axis 0"
means: let that index run, and it disappears, ({e.samples}, {e.outputs}) -> ({e.outputs},). It is the same
addition, said once of the rows and once of their index.

It does not mean one total within each row. That is the sum over axis 1, gives
one number per sample, {_row(e.dz.sum(axis=1))},
{other}"""


def _axis_page(e: Example) -> str:
    rule = (f"Sum the axis whose length is the batch size, {e.samples}; never the one whose length is\n"
            f"the number of outputs, {e.outputs}. What is left must have as many entries as b.")
    hint = "Where batch size and number of outputs are equal, look at the forward pass:"
    if e.samples == e.outputs:
        rule = ("Sum the axis that counts the samples; never the one that counts the outputs.\n"
                "Where their lengths differ, the batch size tells which it is.")
        hint = f"Here both are {e.samples}, and the shape cannot tell. Look at the forward pass:"
    return f"""{rule}

  upstream gradient     shape   sum     call
  samples first, dz     ({e.samples}, {e.outputs})  axis 0  densegrad.bias_grad(dz)
  features first, dz_t  ({e.outputs}, {e.samples})  axis 1  densegrad.bias_grad(dz_t, batch_axis=1)

{hint}

  z = x @ w + b               samples first
  z_t = w_t @ x_t + b_t       features first: the column vectors of textbooks"""


def _weight_page(e: Example) -> str:
    picture = _beside(("", _matrix("x.T", e.x.T, "features", "samples")),
                      ("·", _matrix("dz", e.dz, "samples", "outputs")),
                      ("=", _matrix("dw", e.dw, "features", "outputs")))
    return f"""W[d, m] meets X[s, d] on its way to Z[s, m], so X[s, d] stands where b had a 1:

  dL/dW[d, m] = sum over s of X[s, d] · dZ[s, m]        dL/dW = Xᵀ dZ

{picture}

The samples are the inner axis of the product: summed, and gone. Of the upstream
gradient it is the same axis as for dL/db, told by the same rule:

{_ways(e.weight_ways, e)}

weight_layout="out_in" is PyTorch's: W and its gradient transposed, ({e.outputs}, {e.features})."""


def _rounding_page(e: Example) -> str:
    lines = "\n".join(f"  {way.text:<41}  {way.value.shape!s:<7} {_row(way.value)}" for way in e.rounding_ways)
    return f"""A float32 has 24 bits. Of three samples of one output, 1e8, 1 and -1e8, the
second is lost when it is added to the first:

{lines}

Compensated, what every addition rounds away is computed exactly and added up
beside the sum, and both are added in the end. dz is read once either way."""


def _ways(ways: Mapping[str, tuple[Way, ...]], e: Example) -> str:
    width = max(len(way.text) for group in ways.values() for way in group)
    lines = []
    for who, group in ways.items():
        lines.append(f"  {who}")
        for way in group:
            line = f"    {way.text:<{width}}  {way.value.shape!s:<7}"
            values = f" {_row(way.value.ravel())}" if way.value.size == e.outputs else ""
            lines += [(line + values).rstrip()] if len(line + values) <= _PAGE else [line.rstrip(), f"      {values}"]
    verdict = "All equal, entry for entry." if e.agrees else "NOT ALL EQUAL. This is a fault: see densegrad check."
    return "\n".join([*lines, "", f"  {verdict}"])


def count(number: int, one: str, many: str = "") -> str:
    """A number and its noun."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def _row(values: np.ndarray) -> str:
    return f"[{_numbers(values, _cell(values))} ]"


def _cell(values: np.ndarray) -> int:
    """The width of one entry, with the space before it."""
    return 1 + max(2, *(len(str(int(value))) for value in values.flat))


def _numbers(values: np.ndarray, cell: int) -> str:
    return "".join(f"{int(value):{cell}d}" for value in values)


def _matrix(name: str, values: np.ndarray, rows: str, cols: str, *, below: np.ndarray | None = None,
            right: np.ndarray | None = None) -> list[str]:
    """A matrix as lines of equal length, its axes labelled; its totals below or to the right if given."""
    side = f"{rows} ↓ " if rows else ""
    pad = " " * len(side)
    cell = max(_cell(values), 0 if below is None else _cell(below))
    inner = cell * values.shape[1] + 1
    shape = values.shape if rows else values.shape[1:]
    lines = [f"{pad}{name} {shape}", f"{pad}{cols} →", f"{pad}┌{' ' * inner}┐"]
    lines += [f"{pad if i else side}│{_numbers(row, cell)} │" for i, row in enumerate(values)]
    lines.append(f"{pad}└{' ' * inner}┘")
    if below is not None:
        lines.append(f"{pad} {(' ' * (cell - 1) + '↓') * len(below)}")
        lines.append(f"{'db ':>{len(pad)}}[{_numbers(below, cell)} ]")
    if right is not None:
        lines[3:-1] = [f"{line} → {_numbers(right[i:i + 1], _cell(right))}" for i, line in enumerate(lines[3:-1])]
        lines[2] += f"   {'db':>{_cell(right)}}"
    width = max(map(len, lines))
    return [line.ljust(width) for line in lines]


def _beside(*signed: tuple[str, list[str]]) -> str:
    """Blocks of lines next to one another, each with a sign before it, in as many rows as their width takes."""
    rows: list[list[list[str]]] = [[]]
    for sign, block in signed:
        if rows[-1] and sum(len(other[0]) for other in rows[-1]) + len(block[0]) + 4 > _WIDTH:
            rows.append([])
        lead = [f"{sign if i == 3 else '':^4}" if sign else "" for i in range(len(block))]
        rows[-1].append([before + line for before, line in zip(lead, block, strict=True)])
    return "\n\n".join(_join(_side_by_side(row)) for row in rows)


def _side_by_side(blocks: list[list[str]]) -> list[str]:
    height = max(map(len, blocks))
    filled = [block + [" " * len(block[0])] * (height - len(block)) for block in blocks]
    return ["".join(parts) for parts in zip(*filled, strict=True)]


def _join(lines: list[str]) -> str:
    return "\n".join(f"  {line}".rstrip() for line in lines)
