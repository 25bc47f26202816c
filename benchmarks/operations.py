"""What is measured: the operations, their cases and their data. An operation is added here, in one place.

An operation is named by the function of densegrad that does it, names that beside, or is one of layers in PyTorch; what
it reads and writes says how many bytes and flops it takes, and what its results should be.
"""
from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from densegrad import reference, testing
from densegrad.commands import checks
from densegrad.device import dtype_of
from densegrad.facts import accumulator_of
from densegrad.layers import LAYERS
from densegrad.plans import plan_cross_entropy

#: how much of a large result is compared with float64: so many rows, the first and last among them
CHECKED_ROWS = 256
#: products up to which all of it is
CHECKED_PRODUCTS = 2 ** 36


@dataclass(frozen=True)
class Array:
    """One array of a layer: its shape for (S, D, M), and the scale of its normally distributed numbers."""

    shape: Callable[[int, int, int], tuple[int, ...]]
    scale: Callable[[int, int, int], float] = lambda s, d, m: 1.0
    classes: bool = False  # whether it holds classes from 0 to M - 1 instead
    main: bool = False  # whether it is a main gradient: float32, of half types too

    def dtype(self, floating: str) -> np.dtype:
        """Of its elements, where floating ones are of this dtype."""
        return np.dtype("int64") if self.classes else dtype_of(accumulator_of(floating) if self.main else floating)


@dataclass(frozen=True)
class Result:
    """What comes out: made by which function of densegrad.reference of which arrays, and by how many additions.

    No function is named where all results of an operation are worked out together.
    """

    array: Array
    meaning: Callable[..., np.ndarray] | None
    arguments: tuple[str, ...]
    depth: Callable[[int, int, int], int]
    flops: Callable[[int, int, int], int]
    rows: tuple[str, int] | None = None  # of a product: which axis of which argument its rows follow
    # of the arguments, the sum of magnitudes where it is not the meaning of the arguments' own
    magnitude: Callable[..., np.ndarray] | None = None
    added: bool = False  # whether it is added to what is there, which is 1 everywhere, in place of NaN


#: Inputs of a trained layer are about normal, weights are smaller the more inputs there are, gradients are small.
INPUTS = {
    "x": Array(lambda s, d, m: (s, d)),
    "w": Array(lambda s, d, m: (d, m), lambda s, d, m: d ** -0.5),
    "dz": Array(lambda s, d, m: (s, m), lambda s, d, m: 0.02),
    "da": Array(lambda s, d, m: (s, m), lambda s, d, m: 0.02),
    "z": Array(lambda s, d, m: (s, m)),
    "labels": Array(lambda s, d, m: (s,), classes=True),
}
#: of activation_grad: the one whose derivative takes no time, so that memory is what is measured
ACTIVATION = "relu"


def _below_relu(da: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(dz, db)"""
    return reference.activation_grad(da, z, ACTIVATION)


RESULTS = {
    "dx": Result(Array(lambda s, d, m: (s, d)), reference.input_grad, ("dz", "w"), lambda s, d, m: m,
                 lambda s, d, m: 2 * s * d * m, ("dz", 0)),
    "dw": Result(Array(lambda s, d, m: (d, m)), reference.weight_grad, ("x", "dz"), lambda s, d, m: s,
                 lambda s, d, m: 2 * s * d * m, ("x", 1)),
    "db": Result(Array(lambda s, d, m: (m,)), reference.bias_grad, ("dz",), lambda s, d, m: s, lambda s, d, m: s * m),
    "dz below relu": Result(INPUTS["dz"], lambda da, z: _below_relu(da, z)[0], ("da", "z"), lambda s, d, m: 1,
                            lambda s, d, m: s * m, magnitude=lambda da, z: _below_relu(np.abs(da), z)[0]),
    "db below relu": Result(Array(lambda s, d, m: (m,)), lambda da, z: _below_relu(da, z)[1], ("da", "z"),
                            lambda s, d, m: s, lambda s, d, m: s * m,
                            magnitude=lambda da, z: _below_relu(np.abs(da), z)[1]),
    # The largest logit and the target are subtracted, and exponentials are added. The loss has the type of the sums.
    "loss": Result(Array(lambda s, d, m: (), main=True), None, ("z", "labels"), lambda s, d, m: s,
                   lambda s, d, m: 2 * s),
    "dz below cross-entropy": Result(INPUTS["dz"], None, ("z", "labels"), lambda s, d, m: 1, lambda s, d, m: 3 * s * m),
    "db below cross-entropy": Result(Array(lambda s, d, m: (m,)), None, ("z", "labels"), lambda s, d, m: s,
                                     lambda s, d, m: s * m),
}
RESULTS |= {f"main {name}": replace(RESULTS[name], array=replace(RESULTS[name].array, main=True))
            for name in ("dw", "db")}
RESULTS["main dw, added"] = replace(
    RESULTS["main dw"], meaning=lambda x, dz: 1 + reference.weight_grad(x, dz), added=True,
    magnitude=lambda x, dz: 1 + reference.weight_grad(np.abs(x), np.abs(dz)))
#: of the operations on losses, what becomes of those of the samples
REDUCTIONS = {"cross_entropy": "mean", "cross_entropy_grad": "sum"}


@dataclass(frozen=True)
class Expected:
    """One result in float64, and how far it may be off: by our plan, or by any order of additions."""

    exact: np.ndarray
    bound: np.ndarray
    any_order: np.ndarray


def _below_cross_entropy(case: Case, data: Mapping[str, np.ndarray]) -> dict[str, Expected]:
    """What all results of cross-entropy should be.

    A peer may add exponentials and losses in any order, and keep in the type of the logits, as PyTorch does,
    log-probabilities, each sample's loss and its gradient, and the mean. x exp(-x) is 1/e at most, which is what
    rounding log-probabilities does to softmax.
    """
    samples, _, classes = case.sizes
    plan, reduction = plan_cross_entropy(samples, classes, case.dtype, "flat"), REDUCTIONS[case.operation]
    exact, bounds = testing.expected_cross_entropy(data["z"], data["labels"], plan, reduction=reduction)
    (loss, dz, db), share = exact, 1 / samples if reduction == "mean" else 1.0
    kept, u = testing.ROUNDOFF[case.dtype], testing.ROUNDOFF[accumulator_of(case.dtype)]
    of_loss = bounds[0] + ((samples + 4 * classes) * u + 3 * kept) * (np.abs(loss) + samples * share)
    of_dz = kept * (share / np.e + np.abs(dz)) + testing.dz_bound(
        dz, share, testing.cross_entropy_roundings(plan) + 4 * classes, case.dtype)
    of_db = of_dz.sum(axis=0) + testing.error_bound(np.abs(dz).sum(axis=0), db, samples, samples, case.dtype)
    names = "loss", "dz below cross-entropy", "db below cross-entropy"
    return {name: Expected(*map(np.asarray, of_one))
            for name, *of_one in zip(names, exact, bounds, (of_loss, of_dz, of_db), strict=True)}


ORIENTATIONS = ("samples first", "features first")


@dataclass(frozen=True)
class Operation:
    """What goes in and comes out, and in which orientations of dz it is measured."""

    inputs: tuple[str, ...]
    results: tuple[str, ...]
    orientations: tuple[str, ...] = ORIENTATIONS[:1]
    in_pytorch: bool = False  # whether it is one of layers in PyTorch, and no function of densegrad
    in_parts: bool = False  # whether peers round parts of its sums to the dtype before they add them
    dtypes: tuple[str, ...] = ("float16", "bfloat16", "float32", "float64")
    # (case, inputs) -> all results, where they are worked out together
    expected: Callable[..., Mapping[str, Expected]] | None = None
    function: str = ""  # of densegrad, where the operation is not named by it

    @property
    def added(self) -> bool:
        """Whether results are added to what is there."""
        return any(RESULTS[name].added for name in self.results)


#: how many parts of the batch go one after another into main gradients
MICRO_BATCHES = 8
OPERATIONS = {
    "bias_grad": Operation(("dz",), ("db",), ORIENTATIONS),
    "weight_grad": Operation(("x", "dz"), ("dw",)),
    "input_grad": Operation(("dz", "w"), ("dx",)),
    "weight_bias_grad": Operation(("x", "dz"), ("dw", "db")),
    "dense_grads": Operation(("x", "w", "dz"), ("dx", "dw", "db")),
    "activation_grad": Operation(("da", "z"), ("dz below relu", "db below relu")),
    "cross_entropy_grad": Operation(("z", "labels"), ("dz below cross-entropy", "db below cross-entropy"),
                                    expected=_below_cross_entropy),
    "cross_entropy": Operation(("z", "labels"), ("loss", "dz below cross-entropy", "db below cross-entropy"),
                               expected=_below_cross_entropy),
    # Main gradients: float32 of half types, overwritten, or added to in place.
    "weight_grad_float32": Operation(("x", "dz"), ("main dw",), dtypes=("float16", "bfloat16"), function="weight_grad"),
    "weight_grad_added": Operation(("x", "dz"), ("main dw, added",), dtypes=("float16", "bfloat16"),
                                   function="weight_grad"),
    # Of layers in PyTorch, through autograd: one backward, and micro-batches of one batch into main gradients.
    "layer_backward": Operation(("x", "w", "dz"), ("dx", "dw", "db"), in_pytorch=True),
    "micro_batches": Operation(("x", "dz"), ("main dw", "main db"), in_pytorch=True, in_parts=True,
                               dtypes=("float16", "bfloat16")),
}


@dataclass(frozen=True)
class Case:
    """One operation on one shape."""

    operation: str
    samples: int
    in_features: int
    out_features: int
    dtype: str
    orientation: str = ORIENTATIONS[0]

    def __str__(self) -> str:
        sides = f", {self.orientation}" if self.orientation != ORIENTATIONS[0] else ""
        return f"{self.operation} {self.samples} x {self.in_features} x {self.out_features} {self.dtype}{sides}"

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(S, D, M)"""
        return self.samples, self.in_features, self.out_features

    @property
    def does(self) -> Operation:
        """The operation."""
        return OPERATIONS[self.operation]

    @property
    def batch_axis(self) -> int:
        """Of dz."""
        return ORIENTATIONS.index(self.orientation)

    @property
    def bytes(self) -> int:
        """What must be read and written: each input and each result once."""
        arrays = [INPUTS[name] for name in self.does.inputs] + [RESULTS[name].array for name in self.does.results]
        return sum(int(np.prod(array.shape(*self.sizes))) * array.dtype(self.dtype).itemsize for array in arrays)

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return sum(RESULTS[name].flops(*self.sizes) for name in self.does.results)

    @property
    def product_flops(self) -> int:
        """Those of matrix products, which cuBLAS sets the roof of."""
        return sum(RESULTS[name].flops(*self.sizes) for name in self.does.results if RESULTS[name].rows)

    def data(self) -> dict[str, np.ndarray]:
        """The inputs, the same on every run; dz lies as the orientation says."""
        draw = np.random.default_rng(self.sizes)
        arrays = {}
        for name in self.does.inputs:
            made, shape = INPUTS[name], INPUTS[name].shape(*self.sizes)
            values = (draw.integers(0, self.out_features, shape) if made.classes else
                      draw.standard_normal(shape, np.float32) * np.float32(made.scale(*self.sizes)))
            arrays[name] = values.astype(made.dtype(self.dtype))
        if self.batch_axis:
            arrays["dz"] = np.ascontiguousarray(arrays["dz"].T)
        return arrays


class Truth:
    """What a case should give, in float64; each result is worked out once, when it is first asked for."""

    def __init__(self, case: Case, data: Mapping[str, np.ndarray]):
        self.case, self.data = case, data
        self._known: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._together: Mapping[str, Expected] = {}

    def worst(self, result: str, got: np.ndarray, chain: int | None, product_error: float = 0.0) -> float:
        """The worst error as a share of its bound. NaN and a wrong shape are infinitely wrong.

        Parameters
        ----------
        result : str
            Which one.
        got : ndarray
            What came out.
        chain : int or None
            The longest chain of additions; None if it is not known: then any order of additions is allowed.
        product_error : float
            What each product may be off by, of its magnitude.
        """
        depth = RESULTS[result].depth(*self.case.sizes) + RESULTS[result].added
        if got.shape != RESULTS[result].array.shape(*self.case.sizes):
            return float("inf")
        if self.case.does.expected:
            self._together = self._together or self.case.does.expected(self.case, self.data)
            one = self._together[result]
            return checks.compare(got, one.exact, one.any_order if chain is None else one.bound)[2]
        if result not in self._known:
            self._known[result] = self._exactly(result)
        exact, magnitude = self._known[result]
        if exact.shape != got.shape:
            got = got[checked_rows(len(got))]
        longest = depth if chain is None else chain + RESULTS[result].added
        bound = testing.error_bound(magnitude, exact, longest, depth, self.case.dtype,
                                    RESULTS[result].array.dtype(self.case.dtype).name, product_error=product_error)
        return checks.compare(got, exact, bound)[2]

    def _arguments(self, result: str) -> dict[str, np.ndarray]:
        """What the result is made of, samples first and in float64."""
        arrays = {name: self.data[name].T if self.case.batch_axis and name == "dz" else self.data[name]
                  for name in RESULTS[result].arguments}
        return {name: array if INPUTS[name].classes else array.astype(np.float64) for name, array in arrays.items()}

    def _exactly(self, result: str) -> tuple[np.ndarray, np.ndarray]:
        """The result and that of the magnitudes; of a large one, the rows that are checked."""
        means, arrays = RESULTS[result], self._arguments(result)
        if means.rows and means.flops(*self.case.sizes) > 2 * CHECKED_PRODUCTS:
            name, axis = means.rows
            arrays[name] = arrays[name].take(checked_rows(arrays[name].shape[axis]), axis)
        given = arrays.values()
        if means.meaning is None:
            raise TypeError(f"{result} is worked out together with the others of its operation")
        return means.meaning(*given), means.magnitude(*given) if means.magnitude else means.meaning(*map(np.abs, given))


def checked_rows(rows: int) -> np.ndarray:
    """Of a large result: the first, the last, and some between."""
    edge = min(CHECKED_ROWS // 4, rows)
    between = np.linspace(0, rows - 1, min(CHECKED_ROWS // 2, rows)).astype(int)
    return np.unique(np.concatenate([np.arange(edge), between, np.arange(rows - edge, rows)]))


#: name -> shapes (S, D, M)
SHAPES = {
    "layers": tuple(LAYERS.values()),
    "tall": (*((samples, 64, outputs) for outputs in (1, 3, 10, 33, 128)
               for samples in (1_000, 10_000, 100_000, 1_000_003)), (1_000_003, 128, 128)),
    # what products on Hopper's tensor cores are raced on; the first two are over too soon to tell much
    "hopper": ((1024, 1024, 1024), (2056, 1000, 1032), (2048, 2048, 2048), (4096, 4096, 4096), (8192, 8192, 8192),
               (8192, 768, 3072), (8192, 3072, 768), (16384, 4096, 14336), (16384, 4096, 4096), (65536, 1024, 1024),
               (2048, 768, 32000), (16384, 1024, 4096)),
    "losses": tuple((samples, 1, classes) for samples, classes in (
        (2048, 32000), (8192, 3072), (2048, 16000), (65536, 1000), (2048, 50257))),
    "square": tuple((size, size, size) for size in (512, 1024, 2048, 4096, 8192)),
}


def shapes(name: str) -> tuple[tuple[int, int, int], ...]:
    """A list of (S, D, M) by its name, or from a CSV file with these columns.

    Raises
    ------
    ValueError
        If there is neither, or a line of the file is wrong.
    """
    if name in SHAPES:
        return SHAPES[name]
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"shapes must be {', '.join(SHAPES)} or a CSV file with columns S, D and M; got {name!r}")
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    try:
        found = tuple((int(line["S"]), int(line["D"]), int(line["M"])) for line in lines)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name} must have the columns S, D and M with whole numbers ({error})") from None
    if not found or min(map(min, found)) < 1:
        raise ValueError(f"{name} must name at least one shape, of numbers from 1 up")
    return found


def cases(operations: list[str], sizes: tuple[tuple[int, int, int], ...], dtypes: list[str]) -> Iterator[Case]:
    """Every operation on every shape; what does not depend on D is measured once for every (S, M)."""
    seen: set[Any] = set()
    for operation in operations:
        for dtype in (dtype for dtype in dtypes if dtype in OPERATIONS[operation].dtypes):
            for orientation in OPERATIONS[operation].orientations:
                for samples, inputs, outputs in sizes:
                    if not {"x", "w"} & set(OPERATIONS[operation].inputs):
                        inputs = 1
                    case = Case(operation, samples, inputs, outputs, dtype, orientation)
                    if case not in seen:
                        seen.add(case)
                        yield case
