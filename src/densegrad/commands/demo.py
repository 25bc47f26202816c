"""The demonstration on real data: a softmax layer on handwritten digits, its gradients checked, then trained.

The forward pass is NumPy; every gradient of the layer is densegrad's. Arrays stay in NumPy, so on a GPU each call moves
them there and back: the demonstration shows what is right, not what is fast.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files

import numpy as np

from .. import reference
from ..calls import recorded
from ..testing import ROUNDOFF, error_bound
from .checks import compare

CLASSES = 10
BATCH = 128
_HELD_OUT = 360
_BRIGHTEST = 16
_SEED = 5
_STEP_SIZE = 1.0
_MOMENTUM = 0.9
_NUDGE = 1e-4


@dataclass(frozen=True)
class Digits:
    """Handwritten digits as rows of 64 pixels from 0 to 1, shuffled and split."""

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


def load_digits() -> Digits:
    """The 1,797 digits of the UCI repository that come with densegrad (data/digits.txt says whence)."""
    with files("densegrad.data").joinpath("digits.npz").open("rb") as file, np.load(file, allow_pickle=False) as stored:
        x, y = stored["images"].astype(np.float32) / _BRIGHTEST, stored["labels"].astype(np.int64)
    order = np.random.default_rng(_SEED).permutation(len(x))
    test, train = order[:_HELD_OUT], order[_HELD_OUT:]
    return Digits(x[train], y[train], x[test], y[test])


def sample_losses(x: np.ndarray, w: np.ndarray, b: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The cross-entropy of every sample."""
    z = x @ w + b
    top = z.max(axis=1, keepdims=True)
    return (top + np.log(np.exp(z - top).sum(axis=1, keepdims=True)))[:, 0] - z[np.arange(len(z)), labels]


def upstream(x: np.ndarray, w: np.ndarray, b: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """dL/dZ of the mean cross-entropy: (softmax(Z) - onehot(labels)) / S."""
    z = x @ w + b
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    p[np.arange(len(p)), labels] -= 1
    return p / len(p)


@dataclass(frozen=True)
class Comparison:
    """Worst errors of one gradient, against float64 and against central differences of the loss, and their bounds."""

    name: str
    shape: tuple[int, ...]
    error: float
    bound: float
    share: float
    difference_error: float
    difference_bound: float
    difference_share: float

    @property
    def passed(self) -> bool:
        """Whether both errors are within their bounds."""
        return self.share <= 1 and self.difference_share <= 1


def compare_gradients(digits: Digits) -> list[Comparison]:
    """dW, db and dX of one real batch at random weights, against float64 and finite differences.

    Notes
    -----
    Each bound is derived: rounding in the kernel as in `testing.error_bound`; for the differences also the rounding of
    dZ to float32, the third derivative that central differences leave out (for a softmax at most r³ / (6 sqrt 3),
    where r is the spread that a unit step gives the logits) and the rounding of the two losses in float64.
    """
    from .. import bias_grad, input_grad, weight_grad

    draw = np.random.default_rng(_SEED + 1)
    x, labels = digits.train_x[:BATCH], digits.train_y[:BATCH]
    w = draw.normal(0, 0.1, (x.shape[1], CLASSES)).astype(np.float32)
    b = draw.normal(0, 0.1, CLASSES).astype(np.float32)
    wide_x, wide_w, wide_b = (array.astype(np.float64) for array in (x, w, b))
    dz = upstream(wide_x, wide_w, wide_b, labels).astype(np.float32)
    losses = _Differences(wide_x, wide_w, wide_b, labels)
    rounding = losses.rounding / _NUDGE
    return [
        _compare("dW", weight_grad, reference.weight_grad, (x, dz), BATCH,
                 (losses.over_weights(), _left_out((np.abs(wide_x) ** 3).mean(axis=0))[:, None] + rounding)),
        _compare("db", bias_grad, reference.bias_grad, (dz,), BATCH,
                 (losses.over_bias(), _left_out(np.ones(1)) + rounding)),
        # A pixel's loss is its sample's share of the mean.
        _compare("dX", input_grad, reference.input_grad, (dz, w), CLASSES,
                 (losses.over_inputs(), (_left_out(np.ptp(wide_w, axis=1) ** 3) + rounding) / BATCH)),
    ]


def _left_out(cubes: np.ndarray) -> np.ndarray:
    """What central differences leave out, for logits that a unit step spreads by the cube root of `cubes`."""
    return _NUDGE ** 2 / 6 * cubes / (6 * np.sqrt(3))


def _compare(name: str, function: Callable, meaning: Callable, arrays: tuple[np.ndarray, ...], terms: int,
             differences: tuple[np.ndarray, np.ndarray]) -> Comparison:
    """A gradient against float64, and against (central differences, how far those are off)."""
    by_differences, difference_error = differences
    with recorded() as launches:
        result = function(*arrays)
    exact, magnitude = meaning(*arrays), meaning(*map(np.abs, arrays))
    bound = error_bound(magnitude, exact, max(launch.plan.chain for launch in launches), terms, "float32")
    difference_bound = bound + ROUNDOFF["float32"] * magnitude + difference_error
    return Comparison(name, exact.shape, *compare(result, exact, bound),
                      *compare(result, by_differences, difference_bound))


class _Differences:
    """Central differences of the mean loss, in float64."""

    def __init__(self, x: np.ndarray, w: np.ndarray, b: np.ndarray, labels: np.ndarray):
        self.x, self.w, self.b, self.labels = x, w, b, labels

    @property
    def rounding(self) -> float:
        """A bound on the rounding of one loss: of logits, of log-sum-exp over the classes, of the mean over samples."""
        logits = float((np.abs(self.x) @ np.abs(self.w) + np.abs(self.b)).max())
        operations = self.x.shape[1] + 1 + CLASSES + len(self.x) + 8
        return operations * ROUNDOFF["float64"] * (2 * logits + np.log(CLASSES) + 1)

    def over_weights(self) -> np.ndarray:
        """dL/dW, one weight at a time."""
        slopes = np.empty_like(self.w)
        for index in np.ndindex(slopes.shape):
            up, down = self.w.copy(), self.w.copy()
            up[index] += _NUDGE
            down[index] -= _NUDGE
            slopes[index] = self._slope(sample_losses(self.x, up, self.b, self.labels).mean(),
                                        sample_losses(self.x, down, self.b, self.labels).mean())
        return slopes

    def over_bias(self) -> np.ndarray:
        """dL/db, one bias at a time."""
        return np.array([self._slope(sample_losses(self.x, self.w, self.b + step, self.labels).mean(),
                                     sample_losses(self.x, self.w, self.b - step, self.labels).mean())
                         for step in _NUDGE * np.eye(CLASSES)])

    def over_inputs(self) -> np.ndarray:
        """dL/dX, one pixel of every image at a time: a sample's loss depends on its own pixels only."""
        return np.stack([self._slope(sample_losses(self.x + step, self.w, self.b, self.labels),
                                     sample_losses(self.x - step, self.w, self.b, self.labels)) / len(self.x)
                         for step in _NUDGE * np.eye(self.x.shape[1])], axis=1)

    @staticmethod
    def _slope(up: np.ndarray, down: np.ndarray) -> np.ndarray:
        return (up - down) / (2 * _NUDGE)


@dataclass(frozen=True)
class Step:
    """Training after a step: the loss of its mini-batch before it, the accuracy on held-out digits after it."""

    number: int
    loss: float
    accuracy: float
    w: np.ndarray
    b: np.ndarray


def train(digits: Digits, steps: int) -> Iterator[Step]:
    """Gradient descent with momentum on mini-batches, from zero; dW and db come from `weight_bias_grad`."""
    from .. import weight_bias_grad

    draw = np.random.default_rng(_SEED + 2)
    w: np.ndarray = np.zeros((digits.train_x.shape[1], CLASSES), np.float32)
    b: np.ndarray = np.zeros(CLASSES, np.float32)
    velocity_w, velocity_b = np.zeros_like(w), np.zeros_like(b)
    for number in range(1, steps + 1):
        picked = draw.choice(len(digits.train_x), BATCH, replace=False)
        x, labels = digits.train_x[picked], digits.train_y[picked]
        loss = float(sample_losses(x, w, b, labels).mean())
        dw, db = weight_bias_grad(x, upstream(x, w, b, labels))
        velocity_w = _MOMENTUM * velocity_w - _STEP_SIZE * dw
        velocity_b = _MOMENTUM * velocity_b - _STEP_SIZE * db
        w, b = w + velocity_w, b + velocity_b
        accuracy = float((predict(digits.test_x, w, b) == digits.test_y).mean())
        yield Step(number, loss, accuracy, w, b)


def predict(x: np.ndarray, w: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The digit with the largest logit."""
    return np.argmax(x @ w + b, axis=1)


def sketch(image: np.ndarray) -> list[str]:
    """An image of 64 pixels as four lines of eight half-block signs."""
    lit = image.reshape(8, 8) > 0.4
    return ["".join(" ▀▄█"[top + 2 * bottom] for top, bottom in zip(upper, lower, strict=True))
            for upper, lower in zip(lit[::2], lit[1::2], strict=True)]
