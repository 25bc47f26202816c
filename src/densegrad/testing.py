"""What tests, `densegrad check` and benchmarks share: data, memory layouts with guards, derived bounds, the verdict."""
from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import frexp
from types import ModuleType
from typing import Any

import numpy as np

from . import device, reference
from .activations import ENTRIES
from .device import dtype_of
from .plans import CrossEntropyPlan, UpstreamPlan, accumulator_of

#: unit roundoff, and the error of rounding the smallest results
ROUNDOFF = {"float16": 2.0 ** -11, "bfloat16": 2.0 ** -8, "float32": 2.0 ** -24, "float64": 2.0 ** -53}
UNDERFLOW = {"float16": 2.0 ** -25, "bfloat16": 2.0 ** -134, "float32": 2.0 ** -150, "float64": 2.0 ** -1075}

#: what memory around an output holds before and after a call: a number that every dtype can represent
SENTINEL = -99.0
_MARGIN = 64


def normal(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    """Normally distributed numbers, the same for every call with this seed."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype_of(dtype))


def integers(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    """Integers from -3 to 3: their sums of products are exact in every dtype as long as they stay below 256."""
    return np.random.default_rng(seed).integers(-3, 4, shape).astype(dtype_of(dtype))


def _c(cells: Any, rows: int, cols: int) -> Any:
    return cells[:rows * cols].reshape(rows, cols)


def _padded(cells: Any, rows: int, cols: int) -> Any:
    pitch = cols + 16 - cols % 8
    return cells[:rows * pitch].reshape(rows, pitch)[:, :cols]


#: how a matrix may lie in memory: name -> (one-dimensional memory, rows, cols) -> view
LAYOUTS: dict[str, Callable[[Any, int, int], Any]] = {
    "C": _c,
    "F": lambda cells, rows, cols: _c(cells, cols, rows).T,
    "padded": _padded,
    "padded F": lambda cells, rows, cols: _padded(cells, cols, rows).T,
    "offset": lambda cells, rows, cols: _c(cells[1:], rows, cols),
    "gaps": lambda cells, rows, cols: _c(cells, rows, cols + 3)[:, 1:cols + 1],
    "spread": lambda cells, rows, cols: _c(cells, 2 * rows, 3 * cols)[::2, ::3],
    "upside down": lambda cells, rows, cols: _c(cells, rows, cols)[::-1],
    "mirrored": lambda cells, rows, cols: _c(cells, rows, cols)[:, ::-1],
}


@dataclass(frozen=True)
class Strided:
    """Where the elements of an array lie in one-dimensional memory; all of it counts elements.

    Parameters
    ----------
    shape, strides : tuple of int
        Of the array. Strides may be negative, or 0, where elements share memory.
    first : int
        Where the element (0, ..., 0) lies.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    first: int

    @classmethod
    def of(cls, shape: Sequence[int], order: Sequence[int] | None = None, gaps: Sequence[int] = (),
           backwards: Sequence[int] = (), repeated: Sequence[int] = (), offset: int = 0) -> Strided:
        """Axes in this order in memory, from the outermost to the innermost: in their own, if none is given.

        gaps[axis] elements lie between what belongs to neighbours along the axis; the axes `backwards` have negative
        strides, those `repeated` stride 0; offset elements lie before all of them.
        """
        strides, first, span = [0] * len(shape), offset, 1
        for axis in reversed(range(len(shape)) if order is None else order):
            if axis not in repeated:
                strides[axis] = span + (gaps[axis] if gaps else 0)
                reach = max(shape[axis] - 1, 0) * strides[axis]
                span += reach
                if axis in backwards:
                    strides[axis], first = -strides[axis], first + reach
        return cls(tuple(shape), tuple(strides), first)

    @classmethod
    def drawn(cls, draw: np.random.Generator, shape: Sequence[int], order: Sequence[int] | None = None, *,
              repeated: bool = False) -> Strided:
        """One of all orders of the axes, if none is given, as likely with gaps as without, forwards or backwards.

        repeated lets axes have stride 0.
        """
        axes = range(len(shape))
        gaps = draw.integers(0, 4, len(shape)) * (draw.random(len(shape)) < draw.choice([0, 0.5]))
        order = [int(axis) for axis in draw.permutation(len(shape))] if order is None else order
        return cls.of(shape, order, [int(gap) for gap in gaps],
                      [axis for axis in axes if draw.random() < 0.15],
                      [axis for axis in axes if repeated and draw.random() < 0.08], int(draw.choice([0, 0, 1, 8, 13])))

    @property
    def order(self) -> tuple[int, ...]:
        """The axes from the outermost in memory to the innermost."""
        return tuple(sorted(range(len(self.shape)), key=lambda axis: -abs(self.strides[axis])))

    @property
    def cells(self) -> int:
        """The elements of memory from its start to behind the last of the array's."""
        return self.first + 1 + sum(max(size - 1, 0) * max(stride, 0)
                                    for size, stride in zip(self.shape, self.strides, strict=True))

    def view(self, memory: Any, module: ModuleType = np) -> Any:
        """The array, in memory of one dimension."""
        return module.lib.stride_tricks.as_strided(memory[self.first:], self.shape,
                                                   [stride * memory.itemsize for stride in self.strides])


class Placed:
    """Values in memory of their own, with cells around and between them that nothing may touch.

    Parameters
    ----------
    values : ndarray of one or two dimensions, or of any number if Strided says where they lie
        What `array` holds.
    layout : str or Strided
        One of LAYOUTS, or where each element lies.
    module : numpy or cupy
        Whose array.
    surround : float
        What the other cells hold: NaN, which spoils every result it is read into, or a number to be found again.
    """

    def __init__(self, values: np.ndarray, layout: str | Strided = "C", module: ModuleType = np,
                 surround: float = np.nan):
        self._shape, self._layout = values.shape, layout
        rows, cols = (1, 1, *values.shape)[-2:]
        cells = layout.cells if isinstance(layout, Strided) else 6 * (rows + 16) * (cols + 16)
        self._host = np.full(2 * _MARGIN + cells, surround, values.dtype)
        self._view(self._host)[...] = values
        self._memory = module.asarray(self._host.copy())
        self.array = self._view(self._memory, module)

    def _view(self, memory: Any, module: ModuleType = np) -> Any:
        inside = memory[_MARGIN:-_MARGIN]
        if isinstance(self._layout, Strided):
            return self._layout.view(inside, module)
        rows, cols = (1, *self._shape)[-2:]
        return LAYOUTS[self._layout](inside, rows, cols).reshape(self._shape)

    def read(self) -> np.ndarray:
        """The values that `array` holds now.

        Raises
        ------
        AssertionError
            If a cell around or between them has changed.
        """
        now = host(self._memory)
        outside = np.ones(now.shape, bool)
        self._view(outside)[...] = False
        touched = np.flatnonzero(outside & (bits(now) != bits(self._host)))
        if touched.size:
            raise AssertionError(f"{touched.size} cells outside of the {self._shape} output were written, the first "
                                 f"{touched[0] - _MARGIN} cells from its memory's start: {now[touched[0]]}")
        return self._view(now)


def poisoned(shape: tuple[int, ...], dtype: str, layout: str = "C", module: ModuleType = np) -> Placed:
    """An output full of NaN, between sentinels."""
    return Placed(np.full(shape, np.nan, dtype_of(dtype)), layout, module, SENTINEL)


def launch_kernel(kernel: Any, grid: tuple[int, ...], block: int, arguments: tuple, shared_bytes: int = 0) -> None:
    """Launch a kernel that stands alone, of a test or a baseline, by Numba's dispatcher on the default stream.

    Arrays among the arguments are passed as addresses.
    """
    where, interval = device.current(), sys.getswitchinterval()
    given = tuple(where.address(value) if np.ndim(value) else value for value in arguments)
    sys.setswitchinterval(device.TURN_SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # small grids are what tests need
            kernel[grid, block, 0, shared_bytes](*given)
    finally:
        sys.setswitchinterval(interval)


def host(array: Any) -> np.ndarray:
    """The array as NumPy's."""
    return array.get() if hasattr(array, "get") else np.asarray(array)


def bits(array: Any) -> np.ndarray:
    """The array's bit patterns, by which results are equal to the last bit, NaN and signs of zeros included."""
    array = np.ascontiguousarray(host(array))
    return array.view(f"u{array.itemsize}")


def error_bound(magnitude: np.ndarray, exact: np.ndarray, chain: int, terms: int, dtype: str,
                result_dtype: str | None = None, *, compensated: bool = False, product_error: float = 0.0,
                alpha: float = 1.0, lost: np.ndarray | float = 0.0) -> np.ndarray:
    """What the error of a sum of products may be, entry by entry.

    Parameters
    ----------
    magnitude : ndarray
        The sum of the products' magnitudes, |x|ᵀ|dz|, times |alpha|.
    exact : ndarray
        The result in float64.
    chain, terms : int
        The longest chain of additions in the plan, and the number of products in the float64 sum.
    dtype, result_dtype : str
        Of the inputs; of the result if it has another one.
    compensated : bool
        Whether what the additions rounded away was added up beside the sums.
    product_error : float
        What each product may be off by before it is added, of its magnitude.
    alpha : float
        What the sum is multiplied by. One that is no power of two is rounded to the type of the sums, and so is what is
        multiplied by it.
    lost : ndarray or float
        What the result may be off by besides, since the numbers that it is the sum of are.

    Returns
    -------
    ndarray
        Rounding of the additions, (chain + 1) u |x|ᵀ|dz|, and of the result, and that of the float64 reference itself.
        Compensated sums lose nothing, the sums of what they round away lose ((chain + 1) u)² |x|ᵀ|dz|, and bringing
        both together is one rounding more where the result has another type.
    """
    accumulator, result_dtype = accumulator_of(dtype), result_dtype or dtype
    roundings = chain + 1 + 2 * (frexp(abs(alpha))[0] != 0.5)
    relative = (roundings * ROUNDOFF[accumulator]) ** (1 + compensated) + product_error
    sums = relative * magnitude + lost + (chain + 1) * max(1.0, abs(alpha)) * UNDERFLOW[accumulator]
    if compensated and result_dtype != accumulator:
        sums = sums + ROUNDOFF[accumulator] * np.abs(exact)
    return (sums + ROUNDOFF[result_dtype] * (np.abs(exact) + sums) + UNDERFLOW[result_dtype]
            + (terms + 1) * ROUNDOFF["float64"] * magnitude)


def activation_roundings(activation: str, dtype: str) -> int:
    """Roundings on the way to an activation's derivative, each of a number of at most 2: `activations` derives them."""
    return ENTRIES[activation].formula_of(dtype).roundings


def cross_entropy_roundings(plan: CrossEntropyPlan | UpstreamPlan) -> float:
    """Roundings on the way to softmax, each of a number of at most 1, by a plan of cross-entropy.

    With x what a logit is less than the largest, its exponential is off by 4 + 3 |x| u of it, where half types take
    approximate ones. Each weighted by its share of the sum, the |x| add up to ln M at most. The sum itself is off by
    every addition of its chain; where the largest is not known before, by 5 u for each, since what was added up is
    multiplied by another exponential. The logarithm is off by what its argument is, and 2 ln M at most by itself; x
    exp(-x) is at most 1, so that the roundings of the last exponential's argument count once each.
    """
    rescaled = 5 if isinstance(plan, UpstreamPlan) else 1
    outputs = plan.sum.outputs if isinstance(plan, UpstreamPlan) else plan.outputs
    return rescaled * plan.row_chain + 5 * np.log(max(outputs, 1)) + 16


def expected_cross_entropy(z: np.ndarray, labels: np.ndarray, plan: CrossEntropyPlan | UpstreamPlan,
                           **options: Any) -> tuple[tuple, tuple]:
    """What cross_entropy should give, (loss, dz, db) in float64, and how far each may be off, by this plan.

    A loss is a sum of at most as many roundings as softmax has, each of Q log(total) or of a target's product with what
    a logit is less than the largest. Where the largest rises, what was added up moves by no more than that. Divisors
    are off by the chain of their additions, which is shorter than that of the losses, as long as no weight is negative.
    What is left out is off by nothing.
    """
    dtype, batch_axis, alpha = z.dtype.name, options.get("batch_axis", 0), options.get("alpha", 1.0)
    reduction, accumulator = options.get("reduction", "mean"), accumulator_of(dtype)
    u, roundings = ROUNDOFF[accumulator], cross_entropy_roundings(plan) + plan.row_chain
    with np.errstate(all="ignore"):
        exact = reference.cross_entropy(z, labels, **options)
        logits = z.astype(np.float64).T if batch_axis else z.astype(np.float64).reshape(-1, z.shape[-1])
        named = {name: options[name] for name in ("class_weight", "ignore_index") if name in options}
        q, kept = reference.targets(logits.shape, labels, batch_axis=batch_axis, **named,
                                    label_smoothing=options.get("label_smoothing", 0.0))
        # The weight of each sample's gradient, divisor included.
        weight = options.get("sample_weight")
        size = np.ones(len(logits)) if weight is None else np.abs(np.asarray(weight, np.float64).reshape(-1))
        if weight is not None and np.asarray(weight).dtype == bool:
            kept = kept & np.asarray(weight).reshape(-1)
        size = np.where(kept, size, 0.0)
        share = 1.0
        if reduction == "mean":
            divisor = reference.divisor(logits.shape, labels, sample_weight=weight, **named)
            share = abs(1 / divisor) if divisor else 0.0
        magnitude = np.where(kept, np.abs(q).sum(axis=1), 0)
        highest = logits.max(axis=1, keepdims=True, initial=-np.inf)
        spread = np.where(np.isfinite(logits), highest - logits, 0)
        lost = size * (np.where(q == 0, 0, np.abs(q) * spread).sum(axis=1)
                       + magnitude * (np.log(max(logits.shape[1], 1)) + 1))
        lost = np.where(kept, lost, 0)
        of_losses = 2 * (roundings + 8) * u * lost + np.where(kept, UNDERFLOW[accumulator], 0)
        chain = plan.chain + 40
        if reduction != "none":
            of_losses = share * (of_losses.sum() + 2 * (chain + 8) * u * lost.sum())
        scale = abs(alpha) * share * size * magnitude
        of_dz = dz_bound(exact[1], (scale if batch_axis else scale[:, None]), roundings + chain, dtype)
        of_dz = np.where(kept if batch_axis else kept[:, None], of_dz, 0)
        of_db = of_dz.sum(axis=batch_axis) + error_bound(np.abs(exact[1]).sum(axis=batch_axis), exact[2], plan.chain,
                                                         len(logits), dtype)
    return exact, (of_losses, of_dz, of_db)


def dz_bound(exact: np.ndarray, scale: np.ndarray | float, roundings: float, dtype: str) -> np.ndarray:
    """What the error of dz may be, entry by entry: of scale times a factor of so many roundings, and three products."""
    u, underflow = ROUNDOFF[accumulator_of(dtype)], UNDERFLOW[accumulator_of(dtype)]
    error = (2 * roundings + 3) * u * scale + underflow * (1 + scale)
    return error + ROUNDOFF[dtype] * (np.abs(exact) + error) + UNDERFLOW[dtype]


def expected(function: str, arrays: tuple[np.ndarray, ...], options: dict[str, Any], chain: int,
             result_dtype: str | None = None, old: np.ndarray | None = None, *,
             product_error: float = 0.0, operand_error: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """What a public function should give, in float64, and how far it may be off.

    Parameters
    ----------
    function : str
        Its name, in `reference` too.
    arrays, options
        Its arguments, those that `reference` takes.
    chain : int
        The longest chain of additions in the plan.
    result_dtype : str, optional
        If not the inputs'.
    old : ndarray, optional
        What the result is added to.
    product_error : float
        What the plan says each product may be off by, of its magnitude.
    operand_error : float
        What the plan says operands below its smallest_operand may be off by, where there are such operands.
    """
    meaning, dtype = getattr(reference, function), arrays[0].dtype.name
    with np.errstate(all="ignore"):
        exact = meaning(*arrays, **options)
        sizes = [np.abs(array.astype(np.float64)) for array in arrays]
        magnitude, lost = meaning(*sizes, **options), 0.0
        if operand_error:
            # Times the other operand, which may be off by 2⁻¹¹ of itself.
            left, right = sizes
            lost = (1 + 2.0 ** -11) * operand_error * (meaning(np.ones_like(left), right, **options)
                                                       + meaning(left, np.ones_like(right), **options))
        terms = max(max(array.shape, default=0) for array in arrays)
        if old is not None:
            exact, magnitude = exact + old.astype(np.float64), magnitude + np.abs(old.astype(np.float64))
        return exact, error_bound(magnitude, exact, chain + (old is not None), terms, dtype, result_dtype,
                                  product_error=product_error, lost=lost)


def check_within(result: Any, exact: np.ndarray, bound: np.ndarray | float) -> None:
    """Hold a result to the exact one: not finite where that is not and in the same way, elsewhere within the bound.

    Raises
    ------
    AssertionError
        With the first five wrong entries.
    """
    result = host(result)
    if result.shape != exact.shape:
        raise AssertionError(f"the result has shape {result.shape}, not {exact.shape}")
    found, bound = result.astype(np.float64), np.broadcast_to(bound, exact.shape)
    with np.errstate(invalid="ignore"):
        error = np.abs(found - exact)
        right = np.where(np.isfinite(exact), error <= bound, (found == exact) | (np.isnan(found) & np.isnan(exact)))
    wrong = np.argwhere(~right)
    if len(wrong):
        rows = [f"  {tuple(map(int, index))}: got {found[tuple(index)]!s}, exactly {exact[tuple(index)]!s}, error "
                f"{error[tuple(index)]:.3g}, bound {bound[tuple(index)]:.3g}" for index in wrong[:5]]
        raise AssertionError("\n".join([f"{len(wrong)} of {exact.size} entries are wrong:", *rows]))
