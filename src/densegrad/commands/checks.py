"""The self-test behind `densegrad check`: every function and orientation against float64, within derived bounds."""
from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np

from .. import reference
from ..calls import recorded
from ..device import dtype_of
from ..plans import TF32, CrossEntropyPlan, UpstreamPlan
from ..testing import ROUNDOFF, activation_roundings, cross_entropy_roundings, dz_bound, error_bound

#: (samples, in_features, out_features): less than a tile, in every dtype
SMALL = (19, 5, 10)
#: one of everything, and across tiles; on a GPU also many blocks and parts
OTHERS = {
    "simulator": ((1, 1, 1), (66, 65, 10)),
    "gpu": ((1, 1, 1), (70, 65, 66), (4099, 257, 130), (20000, 64, 10)),
}

#: (function, batch_axis, weight_layout, compensated)
_ORIENTATIONS: tuple[tuple[str, int, str, bool], ...] = (
    *(("bias_grad", axis, "in_out", compensated) for compensated in (False, True) for axis in (0, 1)),
    *((function, axis, layout, False) for function in ("weight_grad", "input_grad", "weight_bias_grad", "dense_grads")
      for axis in (0, 1) for layout in ("in_out", "out_in")),
    *((function, axis, "in_out", False) for function in ("activation_grad", "cross_entropy_grad") for axis in (0, 1)),
)
#: float32 on tensor cores: (function, batch_axis, precision)
_PRECISIONS: tuple[tuple[str, int, str], ...] = tuple(
    (function, axis, precision) for function in ("weight_grad", "input_grad", "weight_bias_grad")
    for axis in (0, 1) for precision in TF32)

ARGUMENTS = {"bias_grad": ("dz",), "weight_grad": ("x", "dz"), "input_grad": ("dz", "w"),
              "weight_bias_grad": ("x", "dz"), "dense_grads": ("x", "w", "dz")}
#: in the order of densegrad.WeightBiasGrads and densegrad.DenseGrads
_GRADIENTS = {"weight_bias_grad": ("weight_grad", "bias_grad"),
              "dense_grads": ("input_grad", "weight_grad", "bias_grad")}


@dataclass(frozen=True)
class Case:
    """One function on one size, dtype and orientation."""

    function: str
    samples: int
    in_features: int
    out_features: int
    dtype: str
    batch_axis: int
    weight_layout: str
    compensated: bool = False
    precision: str | None = None

    @property
    def options(self) -> str:
        """What differs from the defaults, but for the axis."""
        layout = "" if self.weight_layout == "in_out" else self.weight_layout
        return ", ".join(filter(None, (layout, "compensated" * self.compensated, self.precision)))

    def __str__(self) -> str:
        options = f", {self.options}" if self.options else ""
        return (f"{self.function} of S, D, M = {self.samples}, {self.in_features}, {self.out_features}, {self.dtype}, "
                f"axis {self.batch_axis}{options}")


@dataclass(frozen=True)
class Outcome:
    """What came out: the worst error as a share of its bound, where, and whether two runs gave the same bits."""

    case: Case
    error: float
    bound: float
    share: float
    repeats: bool
    fault: str = ""

    @property
    def passed(self) -> bool:
        """Whether the result is right and repeatable."""
        return not self.fault and self.share <= 1 and self.repeats

    @property
    def why(self) -> str:
        """Why it did not pass."""
        return self.fault or ("two runs gave different bits" if self.share <= 1 else "the error exceeds its bound")


def cases(kind: str, quick: bool = False, tensor_cores: bool = True) -> list[Case]:
    """The cases for a device of this kind ("gpu" or "simulator"), with or without tensor cores for float32.

    A small size comes in every dtype, or in one for each orientation if quick; the others only if not, and in one.
    """
    dtypes = cycle(ROUNDOFF)
    small = [Case(function, *SMALL, dtype, axis, layout, compensated)
             for function, axis, layout, compensated in _ORIENTATIONS
             for dtype in ((next(dtypes),) if quick else ROUNDOFF)]
    others: list[Case] = []
    for size in () if quick else OTHERS[kind]:
        next(dtypes)  # so that no orientation meets the same dtype in every size
        others += [Case(function, *size, next(dtypes), axis, layout, compensated)
                   for function, axis, layout, compensated in _ORIENTATIONS]
    rounded = [Case(function, *size, "float32", axis, "in_out", precision=precision)
               for size in (SMALL, *(() if quick else OTHERS[kind])) for function, axis, precision in _PRECISIONS]
    return small + others + rounded * tensor_cores


def compare(result: Any, exact: np.ndarray, bound: np.ndarray) -> tuple[float, float, float]:
    """Error, bound and share of the entry whose error is the largest share of its bound. NaN is infinitely wrong."""
    error = np.abs(np.asarray(result, np.float64) - exact)
    error = np.where(np.isnan(error), np.inf, error)
    share = np.divide(error, bound, out=np.where(error > 0, np.inf, 0.0), where=bound > 0)
    worst = np.unravel_index(np.argmax(share), share.shape)
    return float(error[worst]), float(bound[worst]), float(share[worst])


def run(case: Case) -> Outcome:
    """Run one case twice, into outputs full of NaN."""
    try:
        return _run(case)
    except Exception as error:  # a case that raises is a row that failed; the rows after it still count
        return Outcome(case, np.inf, 0.0, np.inf, False, f"{type(error).__name__}: {error}")


def _run(case: Case) -> Outcome:
    import densegrad

    if case.function in ("activation_grad", "cross_entropy_grad"):
        return _run_upstream(case)
    arrays, orientation = problem(case)
    names = _GRADIENTS.get(case.function, (case.function,))
    exact, magnitude, bounds = {}, {}, []
    options = {function: {"batch_axis": case.batch_axis} if function == "bias_grad" else orientation
               for function in (case.function, *names)}
    for name in names:
        given = [arrays[argument] for argument in ARGUMENTS[name]]
        exact[name] = getattr(reference, name)(*given, **options[name])
        magnitude[name] = getattr(reference, name)(*map(np.abs, given), **options[name])
    given = [arrays[argument] for argument in ARGUMENTS[case.function]]
    chosen: dict[str, Any] = {"compensated": True} if case.compensated else {}
    chosen |= {"precision": case.precision} if case.precision else {}
    gathered = {"weight_bias_grad": densegrad.WeightBiasGrads, "dense_grads": densegrad.DenseGrads}.get(case.function)
    results = []
    with recorded() as launches:
        for _ in range(2):
            outs = [np.full(exact[name].shape, np.nan, dtype_of(case.dtype)) for name in names]
            getattr(densegrad, case.function)(*given, out=gathered(*outs) if gathered else outs[0],
                                              **options[case.function], **chosen)
            results.append(outs)
    chain = max(launch.plan.chain for launch in launches)
    # What products may be off by at the precision that was asked for: nothing at any other.
    product_error = max((launch.plan.product_error for launch in launches if case.precision
                         and getattr(launch.plan, "precision", None) == case.precision), default=0.0)
    for name in names:
        terms = case.out_features if name == "input_grad" else case.samples
        bounds.append(error_bound(magnitude[name], exact[name], chain, terms, case.dtype, compensated=case.compensated,
                                  product_error=0.0 if name == "bias_grad" else product_error))
    worst = max((compare(*three) for three in zip(results[0], exact.values(), bounds, strict=True)),
                key=lambda compared: compared[2])
    repeats = all(first.tobytes() == second.tobytes() for first, second in zip(*results, strict=True))
    return Outcome(case, *worst, repeats)


def _run_upstream(case: Case) -> Outcome:
    """dz against float64, and db against the sum of the dz that came out."""
    import densegrad

    draw = np.random.default_rng([case.samples, case.out_features, case.batch_axis])
    shape = (case.out_features, case.samples) if case.batch_axis else (case.samples, case.out_features)
    da, z = (draw.standard_normal(shape).astype(dtype_of(case.dtype)) for _ in range(2))
    mask, labels = draw.random(case.samples) < 0.8, draw.integers(0, case.out_features, case.samples)
    options: dict[str, Any] = {"batch_axis": case.batch_axis, "sample_weight": mask}
    given, scale, roundings = (da, z, "gelu"), np.abs(da.astype(float)), float(
        activation_roundings("gelu", case.dtype))
    if case.function == "cross_entropy_grad":
        given, scale = (z, labels), np.ones(shape)  # type: ignore[assignment]
    results = []
    with recorded() as launches:
        for _ in range(2):
            out = densegrad.OutputGrads(np.full(shape, np.nan, da.dtype), np.full(case.out_features, np.nan, da.dtype))
            results.append(getattr(densegrad, case.function)(*given, out=out, **options))
    if case.function == "cross_entropy_grad":
        roundings = next(cross_entropy_roundings(launch.plan) for launch in launches
                         if isinstance(launch.plan, (CrossEntropyPlan, UpstreamPlan)))
    exact, _ = getattr(reference, case.function)(*given, **options)
    dz, db = results[0]
    total, magnitude = (reference.bias_grad(part, batch_axis=case.batch_axis) for part in (dz, np.abs(dz)))
    chain = max(launch.plan.chain for launch in launches)
    worst = max(compare(dz, exact, dz_bound(exact, scale, roundings, case.dtype)),
                compare(db, total, error_bound(magnitude, total, chain, case.samples, case.dtype)),
                key=lambda compared: compared[2])
    repeats = all(first.tobytes() == second.tobytes() for first, second in zip(*results, strict=True))
    return Outcome(case, *worst, repeats)


def problem(case: Case) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Normal data in the case's orientation, and the options that say it."""
    draw = np.random.default_rng([case.samples, case.in_features, case.out_features, case.batch_axis])
    s, d, m = case.samples, case.in_features, case.out_features
    x, w, dz = (draw.standard_normal(shape).astype(dtype_of(case.dtype)) for shape in ((s, d), (d, m), (s, m)))
    return ({"x": x, "w": w if case.weight_layout == "in_out" else np.ascontiguousarray(w.T),
             "dz": np.ascontiguousarray(dz.T) if case.batch_axis else dz},
            {"batch_axis": case.batch_axis, "weight_layout": case.weight_layout})
