"""Calls with PyTorch as users write them, for mypy and pyright; `typed_calls.py` says how this file is read."""
# pyright: strict, reportUnnecessaryTypeIgnoreComment=true
import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import densegrad as dg
import densegrad.torch as dt


def tensors_come_back(x: Tensor, layer: nn.Linear, dz: Tensor, main: Tensor) -> None:
    assert_type(dg.bias_grad(dz), Tensor)
    assert_type(dg.input_grad(dz, layer.weight, weight_layout="out_in"), Tensor)
    assert_type(dg.weight_grad(x, dz, out=main, accumulate=True, alpha=torch.tensor(0.5)), Tensor)
    assert_type(dg.dense_grads(x, layer.weight, dz, weight_layout="out_in").dw, Tensor)
    assert_type(dg.bias_grad(layer.weight), Tensor)  # not Parameter


def layers_and_losses(x: Tensor, layer: nn.Linear, labels: Tensor) -> None:
    z = dt.linear(x, layer.weight, layer.bias, activation="gelu_tanh", into=dt.MainGrads(bias=layer.bias))
    assert_type(z, Tensor)
    assert_type(dt.cross_entropy(z, labels, reduction="sum"), Tensor)
    assert_type(dt.convert(nn.Sequential(layer)).swapped, list[str])
    assert_type(dt.Linear(3, 4, main_grad=True).forward(x), Tensor)


def mistakes(x: Tensor, layer: nn.Linear, labels: Tensor) -> None:
    dt.linear(x, layer.weight, activation="swish")  # type: ignore[arg-type]
    dt.cross_entropy(x, labels, reduction="avg")  # type: ignore[arg-type]
    dt.Linear(3, 4, fallbak=True)  # type: ignore[call-arg]
    dg.weight_grad(layer, x)  # type: ignore[arg-type]
