"""Calls as users write them, for mypy and pyright: what each returns, and mistakes, which `type: ignore` expects.

A checker that finds no mistake in such a line says that the comment is of no use.
"""
# pyright: strict, reportUnnecessaryTypeIgnoreComment=true
import numpy as np
from numpy.typing import NDArray
from typing_extensions import assert_type

import densegrad as dg
from densegrad.typing import ActivationName, Array, Kind

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


def results_are_of_the_kind_that_came_in(x: Float32, w: Float32, dz: Float32, labels: NDArray[np.int64]) -> None:
    assert_type(dg.bias_grad(dz), Float32)
    assert_type(dg.bias_grad(dz, batch_axis=1, keepdims=True, alpha=np.float32(0.5)), Float32)
    assert_type(dg.weight_grad(x, dz, weight_layout="out_in", precision="tf32x3"), Float32)
    assert_type(dg.input_grad(dz, w), Float32)
    assert_type(dg.weight_bias_grad(x, dz), dg.WeightBiasGrads[Float32])
    dx, dw, db = dg.dense_grads(x, w, dz, activation="gelu", z=dz)
    assert_type((dx, dw, db), tuple[Float32, Float32, Float32])
    assert_type(dg.dense_grads(x, w, dz).db, Float32)
    assert_type(dg.activation_grad(dz, x @ w, "leaky_relu", negative_slope=0.1).dz, Float32)
    assert_type(dg.cross_entropy(dz, labels, reduction="none").loss, Float32)
    assert_type(dg.cross_entropy_grad(dz, labels).db, Float32)


def a_result_has_neither_shape_nor_subclass_of_what_came_in(mapped: "np.memmap[tuple[int, int], np.dtype[np.float32]]",
                                                            ) -> None:
    assert_type(dg.bias_grad(np.ones((32, 10), np.float32)), Float32)
    assert_type(dg.bias_grad(mapped), Float32)


def out_says_what_comes_back(x: Float32, w: Float32, dz: Float32, main: Float64) -> None:
    assert_type(dg.weight_grad(x, dz, out=main, accumulate=True), Float64)
    both = dg.weight_bias_grad(x, dz, out=dg.WeightBiasGrads(dw=main), accumulate=("dw",))
    assert_type(both.dw, Float32 | Float64)


def what_is_not_needed_may_be_none(x: Float32, dz: Float32) -> None:
    _, dw, db = dg.dense_grads(x, None, dz, need=("dw", "db"))
    assert_type((dw, db), tuple[Float32 | None, Float32 | None])
    dg.dense_grads(x, None, dz)  # type: ignore[call-overload]


def a_prepared_call_returns_what_is_said_of_it(dz: Float32) -> None:
    step: dg.Prepared[Float32] = dg.prepare(dg.bias_grad, dz)
    assert_type(step(), Float32)
    assert_type(step.rebind(dz=dz).result, Float32)
    print(dg.prepare(dg.bias_grad, dz).workspace_bytes)


def own(da: Array[Kind], z: Array[Kind], activation: ActivationName) -> Kind:
    """A function of a user's own, for arrays of all kinds."""
    return dg.activation_grad(da, z, activation).dz


def it_knows_them_too(dz: Float64) -> None:
    assert_type(own(dz, dz, "relu"), Float64)


def mistakes(x: Float32, w: Float32, dz: Float32, labels: NDArray[np.int64]) -> None:
    dg.activation_grad(dz, dz, "gleu")  # type: ignore[arg-type]
    dg.dense_grads(x, w, dz, activation="GELU", z=dz)  # type: ignore[call-overload]
    dg.dense_grads(x, w, dz, need=("dw", "dz"))  # type: ignore[arg-type]
    dg.weight_grad(x, dz, weight_layout="out-in")  # type: ignore[arg-type]
    dg.weight_grad(x, dz, precision="TF32")  # type: ignore[arg-type]
    dg.cross_entropy(dz, labels, reduction="avg")  # type: ignore[arg-type]
    dg.warmup([(1, 2, 3)], ["float8"])  # type: ignore[list-item]
    dg.bias_grad(dz, axis=0)  # type: ignore[call-arg]
    dg.bias_grad(dz, 0)  # type: ignore
    dg.bias_grad([[1.0, 2.0]])  # type: ignore[arg-type]
    print(dg.activation_grad(dz, dz, "relu").dx)  # type: ignore[attr-defined]
