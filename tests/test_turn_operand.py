"""Operands of float32 as Hopper's kernel takes them: every number's terms, in their places, and nothing beside them."""
import numpy as np
import pytest

from densegrad.kernels.turn_operand import THREADS, make_turn_operand
from densegrad.signatures import TurnOperand
from densegrad.testing import bits, host, launch_kernel, normal

SIDE = 32


def rounded(numbers):
    """To 11 significant bits, ties away from zero."""
    mantissa, exponent = np.frexp(numbers.astype(np.float64))
    return np.ldexp(np.copysign(np.floor(np.abs(mantissa) * 2 ** 11 + 0.5), numbers), exponent - 11).astype(np.float32)


def turned(xp, source, *, along_depth, terms, access=1, pad=0):
    """The result's rows (outer, pitch) for a source (outer, depth), which lies so in memory or transposed."""
    outer, depth = source.shape
    lines = np.pad(source if along_depth else source.T, ((0, 0), (0, pad)), constant_values=np.nan)
    steps = -(-depth // SIDE)
    pitch = steps * terms * SIDE
    result = xp.asarray(np.full((outer + 1, pitch), np.nan, np.float32))
    launch_kernel(make_turn_operand(TurnOperand(along_depth, access, terms)), (-(-outer // SIDE) * steps, 1), THREADS,
                  (xp.asarray(np.ascontiguousarray(lines)), lines.shape[1], result, pitch, outer, depth, steps))
    found = host(result)
    assert np.isnan(found[outer]).all()
    return found[:outer]


def expected(source, terms):
    outer, depth = source.shape
    padded = np.pad(source, ((0, 0), (0, -depth % SIDE))).reshape(outer, -1, 1, SIDE)
    first = rounded(padded)
    parts = [first, rounded(padded - first)][:terms]
    return np.concatenate(parts, axis=2).reshape(outer, -1)


@pytest.mark.parametrize("shape", [(1, 1), (31, 33), (64, 32), (5, 100)])
@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("along_depth", [False, True])
def test_every_number_in_its_place(xp, shape, terms, along_depth):
    source = normal(shape, "float32", 3)
    found = turned(xp, source, along_depth=along_depth, terms=terms, pad=3)
    assert (bits(found) == bits(expected(source, terms))).all()


@pytest.mark.parametrize("access", [2, 4])
def test_wide_reads(xp, access):
    source = normal((33, 40), "float32", 4)
    found = turned(xp, source, along_depth=True, terms=2, access=access)
    assert (bits(found) == bits(expected(source, 2))).all()


def test_two_terms_are_the_number_but_for_two_to_the_minus_22(xp):
    source = normal((32, 32), "float32", 5)
    first, second = np.split(turned(xp, source, along_depth=False, terms=2).astype(np.float64), 2, axis=1)
    assert (np.abs(first + second - source) <= 2.0 ** -22 * np.abs(source)).all()
    assert not ((bits(first.astype(np.float32)) | bits(second.astype(np.float32))) & 0x1FFF).any()


def test_numbers_that_are_not_finite(xp):
    """An infinity stays one; what is left of it is not a number. Largest numbers round to infinity."""
    source = np.float32([[np.inf, -np.inf, np.nan, 2.0 ** 128 * (1 - 2.0 ** -12), -0.0, 2.0 ** -149]])
    first, second = turned(xp, source, along_depth=True, terms=2)[:, :6], turned(
        xp, source, along_depth=True, terms=2)[:, SIDE:SIDE + 6]
    np.testing.assert_array_equal(first[0], np.float32([np.inf, -np.inf, np.nan, np.inf, 0, 0]))
    assert np.isnan(second[0, :3]).all()
