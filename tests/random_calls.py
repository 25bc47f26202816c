"""Random calls of every public function, held to float64 within derived bounds.

    python -m tests.random_calls --calls 1000 --seed 0

A call follows from its function and its seed alone: arrays with one to four batch axes in any order in memory, with
gaps, backwards and with stride 0, every option and dtype, numbers from the smallest to the largest, and outputs that
must be refused. The calls of a run have the seeds from --seed on; `--function F --calls 1 --seed N` repeats one alone.
"""
import argparse
import os
import sys
from collections import defaultdict
from itertools import permutations
from math import frexp, log2, prod

import numpy as np

import densegrad
from densegrad import device, reference
from densegrad.calls import recorded
from densegrad.device import dtype_of
from densegrad.errors import OutError
from densegrad.plans import (
    ACTIVATIONS,
    CrossEntropyPlan,
    Tiling,
    UpstreamPlan,
    accumulator_of,
    plan_cross_entropy,
)
from densegrad.testing import (
    SENTINEL,
    Placed,
    Strided,
    activation_roundings,
    bits,
    check_within,
    dz_bound,
    error_bound,
    expected_cross_entropy,
    host,
)

#: function -> the layer's arrays that it takes, in its order, and its results
FUNCTIONS = {
    "bias_grad": (("dz",), ("db",)),
    "weight_grad": (("x", "dz"), ("dw",)),
    "weight_bias_grad": (("x", "dz"), ("dw", "db")),
    "input_grad": (("dz", "w"), ("dx",)),
    "dense_grads": (("x", "w", "dz"), ("dx", "dw", "db")),
    "activation_grad": (("dz",), ("dz", "db")),
    "cross_entropy_grad": (("dz",), ("dz", "db")),
    "cross_entropy": (("dz",), ("loss", "dz", "db")),
}
#: those whose first argument, z, is called dz here, since it has the shape and the place of dz
LOSSES = ("cross_entropy_grad", "cross_entropy")
#: results with one value for each sample, or one in all, whose axes all flatten
COLUMNS = ("loss",)
#: those that form a dz of their own
FORMING = ("activation_grad", *LOSSES)
DTYPES = ("float16", "bfloat16", "float32", "float64")
#: Binary exponents of what is drawn: the least and the greatest, and what no result may reach.
EXPONENTS = {"float16": (-20, 8), "bfloat16": (-130, 90), "float32": (-130, 90), "float64": (-300, 300)}
TOP = {"float16": 15, "bfloat16": 127, "float32": 127, "float64": 1000}
#: Formulas of several products lose what lies below the smallest numbers; dZ is not made of such.
LEAST_OF_DZ = -90
#: Of normally distributed numbers none is beyond 2³.
NORMAL = 3
#: What can be said instead of drawn.
FIXED = {"accumulate", "activation", "alpha", "axes", "batch_axis", "class_weight", "dtype", "empty", "given",
         "ignore_index", "label_smoothing", "magnitude", "need", "out_dtype", "precision", "probabilities", "reduction",
         "refusals", "sample_weight", "sizes", "weight_layout"}
ORDERS_OF_FOUR = tuple(permutations(range(4)))
#: One of so many seeds in turn has the next of these orders.
EVERY = 4


def overlaps_itself(layout):
    """Whether two elements share memory."""
    places = _places(layout)
    return len(np.unique(places)) < places.size


def flattens(layout):
    """Whether the elements that follow one another along all axes but the last are equally far apart."""
    places = _places(layout)
    return not places.size or len(np.unique(np.diff(places.reshape(-1, layout.shape[-1])[:, 0]))) <= 1


def _places(layout):
    places = np.zeros(layout.shape, int)
    for axis, stride in enumerate(layout.strides):
        places += stride * np.arange(layout.shape[axis]).reshape([-1 if axis == at else 1
                                                                  for at in range(places.ndim)])
    return places


class Call:
    """One call: its arrays and options, what it must refuse, and how far its results may be off.

    Parameters
    ----------
    function : str
        One of FUNCTIONS.
    seed : int
        What all is drawn from.
    order : tuple of int, optional
        The order in memory of the axes of dz, all longer than one, and in reverse of those of x; without gaps.
    **fixed
        What is not drawn: some of FIXED. With refusals=False no output must be refused.

    Raises
    ------
    TypeError
        If something else is to be fixed.
    """

    def __init__(self, function, seed, order=None, **fixed):
        if not FIXED.issuperset(fixed):
            raise TypeError(f"what can be fixed is {', '.join(sorted(FIXED))}; got {', '.join(fixed)}")
        self.function, self.seed = function, seed
        self._draw, self._fixed = np.random.default_rng([list(FUNCTIONS).index(function), seed]), fixed
        taken, results = FUNCTIONS[function]
        self._plain = order is not None
        if order is None and seed % EVERY == 0 and not {"axes", "batch_axis"} & set(fixed):
            order = ORDERS_OF_FOUR[seed // EVERY % len(ORDERS_OF_FOUR)]
        self.dtype = self._choose("dtype", *DTYPES)
        self.batch_axis = 0 if order else self._choose("batch_axis", 0, 0, 0, 1)
        self._draw_shapes(len(order) - 1 if order else 1 if self.batch_axis else self._choose("axes", 1, 2, 3, 3, 4),
                          least=2 if order else 1)
        if function == "dense_grads":
            results = self._choose("need", results, results, ("dx",), ("dw",), ("db",), ("dx", "db"), ("dw", "db"))
            taken = tuple(name for name in taken if {"x": "dw", "w": "dx"}.get(name, results[0]) in results)
        self.taken, self.results = taken, results
        self.probabilities = False
        self.options = self._draw_options()
        self.alpha, self.activation = self.options["alpha"], None
        self.accumulate = bool(self._choose("accumulate", False, False, True))
        self._draw_outputs()
        self.layouts, self.values = {}, {}
        self._draw_inputs(order)
        self._draw_old()

    def __str__(self):
        shapes = {name: values.shape for name, values in self.values.items()}
        return f"{self.function}, seed {self.seed}: {self.dtype}, {shapes}, {self.options}, out {self.out_dtypes}"

    def _choose(self, name, *choices):
        chosen = choices[self._draw.integers(len(choices))]
        return self._fixed.get(name, chosen)

    # what is drawn

    def _draw_shapes(self, axes, least):
        lengths = {1: (1, 2, 3, 7, 8, 9, 16, 17, 31, 40), 2: (1, 2, 3, 4, 5, 6), 3: (1, 2, 2, 3, 3, 4), 4: (1, 2, 3)}
        self.batch = tuple(max(least, int(size)) for size in self._draw.choice(lengths[axes], axes))
        self.in_features, self.out_features = (
            max(least, int(self._draw.integers(1, 13 if self._draw.random() < 0.8 else 40))) for _ in range(2))
        empty = self._choose("empty", *[""] * 57, "batch", "in", "out") if least == 1 else ""
        if empty == "batch":
            self.batch = (*self.batch[:-1], 0)
        elif empty == "in":
            self.in_features = 0
        elif empty == "out" and self.function != "cross_entropy":  # which refuses to have a loss of no classes
            self.out_features = 0
        self.batch, self.in_features, self.out_features = self._fixed.get(
            "sizes", (self.batch, self.in_features, self.out_features))

    @property
    def samples(self):
        return prod(self.batch)

    def _shape(self, name):
        weights = (self.in_features, self.out_features)
        matrix = (self.out_features, *self.batch) if self.batch_axis else (*self.batch, self.out_features)
        db = (1, self.out_features) if self.options.get("keepdims") else (self.out_features,)
        return {"x": (*self.batch, self.in_features), "dx": (*self.batch, self.in_features), "dz": matrix, "z": matrix,
                "w": weights if self.options.get("weight_layout") == "in_out" else weights[::-1],
                "dw": weights if self.options.get("weight_layout") == "in_out" else weights[::-1],
                "sample_weight": self.batch, "labels": matrix if self.probabilities else self.batch, "db": db,
                "class_weight": (self.out_features,),
                "loss": self.batch if self.options.get("reduction") == "none" else ()}[name]

    def _draw_options(self):
        powers = [2.0 ** -int(power) for power in self._draw.integers(0, 21, 3)]
        others = () if self.function in ("bias_grad", "dense_grads") else (-0.75, 1 / 3, 3.0)
        options = {"batch_axis": self.batch_axis, "alpha": float(self._choose("alpha", 1.0, 1.0, *powers, *others))}
        if self.function == "bias_grad" or (self.function == "dense_grads" and "db" in self.results):
            # The bound of compensated sums is for powers of two.
            options["compensated"] = bool(self._choose("compensated", False, True))
            if not options["compensated"]:
                options["alpha"] = float(self._choose("alpha", options["alpha"], -0.75, 1 / 3, 3.0))
        if "db" in self.results:
            options["keepdims"] = bool(self._choose("keepdims", False, True))
        if {"x", "w"} & set(self.taken) or self.function == "dense_grads":
            options["weight_layout"] = self._choose("weight_layout", "in_out", "out_in")
            of_dtype = {"float32": (None, "ieee", "tf32", "tf32x3")}.get(self.dtype, (None, None, "ieee"))
            options["precision"] = self._choose("precision", *of_dtype)
        if self.function in LOSSES:
            self.probabilities = self._choose("probabilities", False, False, True)
            options["reduction"] = self._choose("reduction", "mean", "sum", "none")
            options["label_smoothing"] = float(self._choose("label_smoothing", 0.0, 0.1, 1.0))
            if not self.probabilities:
                options["ignore_index"] = int(self._choose("ignore_index", -100, -1, 0, 1))
        return options

    def _draw_outputs(self):
        """Of which dtypes results are, where they lie, and which are to be received in new arrays."""
        wider = ("float64", "float32") if self.dtype == "float64" else DTYPES
        self.out_dtypes, self.out_layouts = {}, {}
        for name in self.results:
            formed = name in ("dz", "loss")
            given = (self.accumulate and not formed) or self._choose("given", True, False) or "out_dtype" in self._fixed
            own = accumulator_of(self.dtype) if name == "loss" else self.dtype
            self.out_dtypes[name] = self._choose("out_dtype", *wider) if given and not formed else own
            if given:
                layout = self._draw_out_layout((*self._shape(name), *[1] * (name in COLUMNS)))
                if name in COLUMNS:
                    layout = Strided(layout.shape[:-1], layout.strides[:-1], layout.first)
                self.out_layouts[name] = layout

    def _draw_out_layout(self, shape):
        kind = self._draw.random()
        if kind < 0.35 and self._fixed.get("refusals", True):
            return Strided.drawn(self._draw, shape)
        *batch, last = shape
        flat = (prod(batch), last)
        layout = Strided.drawn(self._draw, flat)
        if kind < 0.5 and self._fixed.get("refusals", True):
            # Any strides at all, some of which let elements overlap.
            down, across = (int(stride) for stride in self._draw.integers(-7, 8, 2))
            reach = sum(max(size - 1, 0) * max(-stride, 0) for size, stride in zip(flat, (down, across), strict=True))
            layout = Strided(flat, (down, across), reach)
        down, across = layout.strides
        return Strided(tuple(shape), (*(down * prod(batch[axis + 1:]) for axis in range(len(batch))), across),
                       layout.first)

    def _draw_inputs(self, order):
        on_tensor_cores = self.options.get("precision") in ("tf32", "tf32x3")
        formed = self.function in (*FORMING, "dense_grads")
        kind = self._choose("magnitude", "usual", "usual", "small", "large", "any")
        # What the exponents of an array's and dz's numbers may come to, so that no sum and no result overflows.
        scale = NORMAL * 3 + max(0.0, log2(abs(self.alpha)))
        tops = [min(TOP[accumulator_of(self.dtype)], TOP[self.out_dtypes[name]]) for name in self.results]
        cap = min(tops) - scale - log2(max(self.samples, self.in_features, self.out_features, 1)) - 1
        exponents = {}
        for name in ("dz", "x", "w"):
            least, most = EXPONENTS[self.dtype]
            if formed and name == "dz":
                least = max(least, LEAST_OF_DZ)
            least, most = {"usual": (0, 1), "small": (least, 1), "large": (0, most), "any": (least, most)}[kind]
            most = int(min(most, cap - (exponents["dz"] if name != "dz" else 0)))
            exponents[name] = int(self._draw.integers(min(least, most - 1), most))
        self.exponent = exponents["dz"] + (exponents["x"] if self.taken != ("dz",) else 0)
        if on_tensor_cores and kind == "small":
            exponents["x"] = int(self._draw.integers(-140, -110))
        for name in self.taken:
            spread = exponents[name]
            if self.function in LOSSES:
                spread = int(self._draw.integers(-6, 11))
            self._draw_array(name, spread, order and {"dz": order, "x": order[::-1]}.get(name))
        if formed:
            self._draw_above()

    def _draw_array(self, name, exponent=0, order=None):
        """Normally distributed numbers times a power of two, some of them 0, wherever they lie."""
        shape = self._shape(name)
        if order and self._plain:
            layout = Strided.of(shape, order)
        else:
            layout = Strided.drawn(self._draw, shape, order, repeated=order is None)
        numbers = self._draw.standard_normal(self._unrepeated(layout))
        numbers[self._draw.random(numbers.shape) < 0.05] = 0
        self.layouts[name] = layout
        self.values[name] = np.broadcast_to(np.ldexp(numbers, exponent).astype(dtype_of(self.dtype)), shape)

    @staticmethod
    def _unrepeated(layout):
        return [1 if stride == 0 else size for size, stride in zip(layout.shape, layout.strides, strict=True)]

    def _draw_above(self):
        """An activation, or labels, and weights or a mask, which leaves out NaN."""
        if self.function not in LOSSES:
            self.activation = self._choose("activation", None, *ACTIVATIONS)
            if self.activation is not None:
                self.options["activation"] = self.activation
            if self.activation not in (None, "identity"):
                self._draw_array("z", int(self._draw.integers(-6, 11)))
            elif self.activation and self._choose("z", True, False):
                # identity takes z, and does not read it.
                self._draw_array("z")
                self.values["z"] = np.full_like(self.values["z"], np.nan)
            if self.activation == "leaky_relu":
                self.options["negative_slope"] = float(self._choose("negative_slope", 0.01, 0.3, -1.0))
        wider = ("float64",) if self.dtype == "float64" else ()
        weights = self._choose("sample_weight", None, None, "bool", "bool", "float16", "bfloat16", "float32", *wider)
        if weights is not None:
            layout = Strided.drawn(self._draw, self.batch, repeated=True)
            numbers = self._draw.standard_normal(self._unrepeated(layout))
            # A mean is divided by the weights' sum, which is known to few digits only where some are negative.
            numbers = np.abs(numbers) if self.options.get("reduction") == "mean" and weights != "bool" else numbers
            numbers = numbers > -0.5 if weights == "bool" else numbers.astype(dtype_of(weights))
            self.layouts["sample_weight"], self.values["sample_weight"] = layout, np.broadcast_to(numbers, self.batch)
        if self.function in LOSSES:
            self._draw_labels(weights)
            self._draw_class_weight(wider)
        if weights == "bool":
            for name in {"dz", "z", "labels" if self.probabilities else "z"} & set(self.values):
                if 0 not in self.layouts[name].strides:
                    self.values[name] = np.where(self._of_samples(self.values["sample_weight"]), self.values[name],
                                                 dtype_of(self.dtype).type(np.nan))

    def _draw_class_weight(self, wider):
        kind = self._choose("class_weight", None, None, "float32", "float16", "bfloat16", *wider)
        if kind is not None:
            layout = Strided.drawn(self._draw, self._shape("class_weight"), repeated=True)
            numbers = np.abs(self._draw.standard_normal(self._unrepeated(layout))).astype(dtype_of(kind))
            self.layouts["class_weight"] = layout
            self.values["class_weight"] = np.broadcast_to(numbers, layout.shape)

    def _draw_labels(self, weights):
        if self.probabilities:
            self._draw_array("labels")
            self.values["labels"] = np.abs(self.values["labels"])
            return
        layout = Strided.drawn(self._draw, self.batch, repeated=True)
        shape = self._unrepeated(layout)
        labels = self._draw.integers(0, max(self.out_features, 1), shape)
        lost = self._draw.random(shape) < (0.2 if self.out_features else 1.1)
        labels = np.broadcast_to(np.where(lost, self.options["ignore_index"], labels), self.batch)
        if weights == "bool" and 0 not in layout.strides:
            labels = np.where(self.values["sample_weight"], labels, self.out_features + 5)
        self.layouts["labels"] = layout
        self.values["labels"] = labels.astype(self._choose("label_dtype", "int32", "int64"))

    def _draw_old(self):
        """What outputs hold before: NaN, or what is added to."""
        self.old = {}
        for name, layout in self.out_layouts.items():
            dtype = dtype_of(self.out_dtypes[name])
            if self.accumulate and name not in ("dz", "loss"):
                power = frexp(self.alpha)[1] + self.exponent
                power = min(max(power, EXPONENTS[self.out_dtypes[name]][0]), EXPONENTS[self.out_dtypes[name]][1])
                shape = self._unrepeated(layout)
                numbers = self._draw.standard_normal(shape)
                if overlaps_itself(layout):
                    numbers[...] = 1
                self.old[name] = np.broadcast_to(np.ldexp(numbers, power).astype(dtype), layout.shape)
            else:
                self.old[name] = np.full(layout.shape, np.nan, dtype)
        # dz in the place of what it is made of
        self.in_place = ""
        if "dz" in self.out_layouts and self._draw.random() < 0.25:
            name = self._choose("in_place", "dz", "z" if "z" in self.values else "dz")
            if flattens(self.layouts[name]) and not overlaps_itself(self.layouts[name]):
                self.in_place = name
                self.out_layouts["dz"] = self.layouts[name]

    def _of_samples(self, per_sample):
        return per_sample if self.batch_axis else per_sample[..., None]

    # what is done

    def orders_of_four_axes(self):
        """(array, order in memory) of each array whose four axes are all longer than one."""
        layouts = [*self.layouts.items(), *((f"out.{name}", layout) for name, layout in self.out_layouts.items())]
        return {(name, layout.order) for name, layout in layouts
                if len(layout.shape) == 4 and min(layout.shape) > 1 and 0 not in layout.strides}

    @property
    def refused(self):
        """Whether an output must be refused: kernels write to its elements where they are, each once."""
        layouts = dict(self.out_layouts)
        for name in layouts.keys() & COLUMNS:
            column = layouts[name]
            layouts[name] = Strided((*column.shape, 1), (*column.strides, 1), column.first)
        return any(overlaps_itself(layout) or not flattens(layout) for layout in layouts.values())

    def run(self, xp, alpha=None):
        """({result: array of NumPy}, launches), or None where an output was refused, as it must be.

        Raises
        ------
        AssertionError
            If anything but the outputs was written, or an output was not refused.
        """
        placed = {name: Placed(values, self.layouts[name], xp, self._surround(values))
                  for name, values in self.values.items()}
        outs = {name: Placed(self.old[name], layout, xp, SENTINEL) for name, layout in self.out_layouts.items()
                if not (name == "dz" and self.in_place)}
        if self.in_place:
            outs["dz"] = placed[self.in_place]
        with recorded() as launches:
            try:
                given = self._call({name: one.array for name, one in placed.items()},
                                   {name: one.array for name, one in outs.items()}, alpha)
            except OutError:
                if not self.refused:
                    raise
                given = None
        if given is None:
            assert not launches
            for name, out in outs.items():
                assert (bits(out.read()) == bits(self.old[name])).all() or name == self.in_place
            return None
        assert not self.refused, "an output that kernels cannot write to was not refused"
        for name, one in placed.items():
            assert (bits(one.read()) == bits(self.values[name])).all() or name == self.in_place, f"{name} was written"
        found = {}
        for name in self.results:
            assert name not in outs or given[name] is outs[name].array
            found[name] = outs[name].read() if name in outs else host(given[name])
            assert found[name].dtype == dtype_of(self.out_dtypes[name])
        return found, launches

    @staticmethod
    def _surround(values):
        return {"b": True, "i": -7}.get(values.dtype.kind, np.nan)

    def _call(self, arrays, outs, alpha):
        options = dict(self.options, accumulate=self.accumulate)
        options["alpha"] = self.alpha if alpha is None else alpha
        function = getattr(densegrad, self.function)
        if self.function == "dense_grads":
            given = [arrays.pop(name, None) for name in ("x", "w", "dz")]
            options.update(arrays, need=self.results)
        else:
            given = [arrays.pop(name) for name in self.taken]
            options.update(arrays)
        if len(FUNCTIONS[self.function][1]) == 1:
            name, = self.results
            return {name: function(*given, out=outs.get(name), **options)}
        kind = {"weight_bias_grad": densegrad.WeightBiasGrads, "dense_grads": densegrad.DenseGrads,
                "cross_entropy": densegrad.LossGrads}.get(self.function, densegrad.OutputGrads)
        return function(*given, out=kind(**outs), **options)._asdict()

    # what it means

    def expected(self, launches, alpha=None):
        """{result: (exact, bound)}"""
        plans, alpha = [launch.plan for launch in launches], self.alpha if alpha is None else alpha
        formed, answers = self.function in FORMING, {}
        with np.errstate(all="ignore"):
            if self.function in LOSSES:
                answers["loss"], (dz, error) = self._losses(plans, alpha)
            else:
                dz, error = self._upstream(plans, alpha if formed else 1.0)
        answers["dz"] = dz, error
        for name in set(self.results) - set(answers):
            answers[name] = self._sums(name, dz, error, plans, 1.0 if formed else alpha)
        return {name: answers[name] for name in self.results}

    def _losses(self, plans, alpha):
        """The loss and dz, each with how far it may be off."""
        plan = next((plan for plan in plans if isinstance(plan, (CrossEntropyPlan, UpstreamPlan))), None)
        dz = self.values["dz"]
        if plan is None:  # of nothing nothing is launched
            plan = plan_cross_entropy(self.samples, self.out_features, self.dtype, "flat")
        named = ("batch_axis", "ignore_index", "label_smoothing", "reduction")
        options = {name: self.options[name] for name in named if name in self.options}
        options |= {name: self.values[name] for name in ("class_weight", "sample_weight") if name in self.values}
        (loss, exact, _), (of_loss, of_dz, _) = expected_cross_entropy(dz, self.values["labels"], plan, alpha=alpha,
                                                                      **options)
        loss, of_loss = (np.reshape(one, self._shape("loss")) for one in (loss, of_loss))
        return (loss, of_loss), (exact.reshape(dz.shape), of_dz.reshape(dz.shape))

    def _upstream(self, plans, alpha):
        """dz as it is summed and multiplied, and how far it may be off: what is left out is exactly 0."""
        wide, weight = self.values["dz"].astype(np.float64), self.values.get("sample_weight")
        if self.function != "activation_grad" and weight is None and self.activation in (None, "identity"):
            return wide, np.zeros(wide.shape)
        options = {name: self.options[name] for name in ("batch_axis", "negative_slope") if name in self.options}
        kept, scale = np.ones(self.batch, bool), np.full(self.batch, abs(alpha))
        if weight is not None and weight.dtype == bool:
            kept = kept & weight
        elif weight is not None:
            scale = scale * np.abs(weight.astype(np.float64))
        exact, _ = reference.activation_grad(wide, self.values.get("z"), self.activation, sample_weight=weight,
                                             alpha=alpha, **options)
        scale = self._of_samples(scale) * np.abs(wide)
        scale = scale * max(1.0, abs(self.options.get("negative_slope", 1.0)))
        roundings = activation_roundings(self.activation or "identity", self.dtype)
        exact = exact.reshape(wide.shape)
        bound = dz_bound(exact, np.broadcast_to(scale, exact.shape), roundings, self.dtype)
        return exact, np.where(self._of_samples(kept), bound, 0.0)

    def _sums(self, name, dz, error, plans, alpha):
        """The exact sums of products with dz, and their bound."""
        options = {key: self.options[key] for key in ("batch_axis", "weight_layout") if key in self.options}
        if name == "db":
            options.pop("weight_layout", None)
            options["keepdims"] = self.options["keepdims"]
        other = self.values.get({"dw": "x", "dx": "w"}.get(name))
        other = None if other is None else other.astype(np.float64)

        def meaning(other, dz):
            if name == "db":
                return reference.bias_grad(dz, **options)
            return reference.weight_grad(other, dz, **options) if name == "dw" else reference.input_grad(
                dz, other, **options)

        of_dz, of_other = np.abs(dz) + error, None if other is None else np.abs(other)
        exact, magnitude = alpha * meaning(other, dz), abs(alpha) * meaning(of_other, of_dz)
        lost, product_error, plans = meaning(of_other, error), 0.0, self._plans_of(name, plans)
        if name in ("dw", "dx") and plans:
            plan = max(plans, key=lambda plan: plan.product_error)
            product_error = plan.product_error

            def off(sizes):
                return np.where((sizes > 0) & (sizes < plan.smallest_operand), plan.operand_error, 0.0)

            # Of operands below the smallest, times the other one, which is rounded, too.
            lost = lost + (1 + 2.0 ** -11) * (meaning(off(of_other), of_dz) + meaning(of_other, off(of_dz))
                                              + meaning(off(of_other), off(of_dz)))
        lost = abs(alpha) * lost
        chain = max((plan.chain for plan in plans), default=0)
        if name == "db":
            # Where db rides along, a thread adds the depths of a tile that it shares with others, then their sums.
            chain = max((plan.chain + (plan.tile_depth if isinstance(plan, Tiling) else 0) for plan in plans),
                        default=0)
        terms = self.out_features if name == "dx" else self.samples
        if self.accumulate:
            old = self.old[name].astype(np.float64)
            exact, magnitude, chain = exact + old, magnitude + np.abs(old), chain + 1
        return exact, error_bound(magnitude, exact, chain, terms, self.dtype, self.out_dtypes[name],
                                  compensated=name == "db" and self.options.get("compensated", False),
                                  product_error=product_error,
                                  alpha=alpha, lost=lost)

    def _plans_of(self, name, plans):
        """The plans that a result may have been computed by."""
        if name == "db":
            sums = [plan for plan in plans if not isinstance(plan, Tiling)]
            return sums or [plan for plan in plans if plan.depth == self.samples]
        depth = self.samples if name == "dw" else self.out_features
        return [plan for plan in plans if isinstance(plan, Tiling) and plan.depth == depth]

    def check(self, xp):
        """Make the call and hold it to float64; whether it was refused, as it must be.

        Raises
        ------
        AssertionError
            With what is wrong.
        """
        answer = self.run(xp)
        if answer is None:
            return True
        found, launches = answer
        for name, (exact, bound) in self.expected(launches).items():
            try:
                check_within(found[name], exact, bound)
            except AssertionError as error:
                raise AssertionError(f"{self}\n{name}: {error}") from None
        return False


def main():
    """Make the calls, and say for each function how many there were, how many went wrong, and what they met."""
    parser = argparse.ArgumentParser(prog="python -m tests.random_calls", description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=int, default=1000, help="of each function (1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the first call; the others' follow it (0)")
    parser.add_argument("--function", choices=FUNCTIONS, action="append", help="one of the functions alone")
    arguments = parser.parse_args()
    if device.gpu_missing():
        os.environ["NUMBA_ENABLE_CUDASIM"] = "1"
        xp = np
    else:
        import cupy as xp
    print(f"{device.current().name}, seeds from {arguments.seed} on", flush=True)
    all_wrong = 0
    for function in arguments.function or FUNCTIONS:
        wrong, refused, orders = {}, 0, defaultdict(set)
        for seed in range(arguments.seed, arguments.seed + arguments.calls):
            try:
                call = Call(function, seed)
                for name, order in call.orders_of_four_axes():
                    orders[name].add(order)
                refused += call.check(xp)
            except Exception as error:  # whatever it is, the other calls are made
                wrong[seed] = f"{type(error).__name__}: {error}"
        met = ", ".join(f"{name} {len(orders[name])}" for name in sorted(orders))
        print(f"{function}: {arguments.calls} calls, {len(wrong)} wrong, {refused} refused as they must be; of "
              f"{len(ORDERS_OF_FOUR)} orders of four axes met: {met or 'none'}", flush=True)
        for seed, what in wrong.items():
            print(f"--function {function} --calls 1 --seed {seed}\n    {what[:1500]}", flush=True)
        all_wrong += len(wrong)
    return 1 if all_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
