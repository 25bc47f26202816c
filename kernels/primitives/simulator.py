"""The primitives in plain Python and NumPy, for the Numba CUDA simulator.

A fragment is a NumPy array, so that one Python operation does the work of many instructions. Shared memory starts as
NaN, and every access is checked against the end of its array.
"""
import threading

import numpy as np
from numba import cuda

from .factories import cache

_TYPE = {"float32": np.float32, "float64": np.float64}


def jit(threads, blocks_per_multiprocessor=1):
    """Decorator of a kernel that is launched with this many threads a block."""
    return cuda.jit


def typed(dtype):
    """The type that makes a literal of this dtype inside a kernel."""
    return _TYPE[dtype]


# -- fragments


@cache
def zeros(dtype, count):
    """() -> a fragment of zeros."""
    return lambda: np.zeros(count, _TYPE[dtype])


@cache
def add(dtype, count):
    """(left, right) -> their sum, element by element."""
    return _quiet(lambda left, right: left + right)


@cache
def multiply_add(dtype, count):
    """(sums, left, right) -> sums + left * right, element by element, rounded twice."""
    return _quiet(lambda sums, left, right: sums + left * right)


@cache
def plus(dtype, count, compensated):
    """(sums, values) -> sums plus values.

    Compensated sums are a fragment of twice the length: the sums, then what their roundings lost.
    """
    return _quiet(lambda sums, values: _plus(sums, values, compensated))


@cache
def add_each(dtype, count, compensated):
    """(sums of one column, fragment) -> sums plus its elements, one after another."""

    def run(sums, fragment):
        for element in range(count):
            sums = _plus(sums, fragment[element:element + 1], compensated)
        return sums

    return _quiet(run)


@cache
def tidy(dtype, count, compensated):
    """(sums) -> the same; what was lost counts as nothing where it is not a number, as beside an infinite sum."""
    zero = _TYPE[dtype](0)
    return lambda sums: np.concatenate([sums[:count], np.where(np.isfinite(sums[count:]), sums[count:], zero)])


@cache
def settle(dtype, count, compensated):
    """(tidy sums) -> what they come to."""
    return _quiet(lambda sums: sums[:count] + sums[count:]) if compensated else lambda sums: sums


def _plus(sums, values, compensated):
    if not compensated:
        return sums + values
    totals, lost = sums[:len(values)], sums[len(values):]
    rounded = totals + values
    of_values = rounded - totals
    of_totals = rounded - of_values
    return np.concatenate([rounded, lost + ((totals - of_totals) + (values - of_values))])


@cache
def scale(dtype, count):
    """(fragment, factor) -> their product."""
    return _quiet(lambda fragment, factor: fragment * factor)


@cache
def scale_at(dtype, stored):
    """(number, address) -> number, times the one of type stored that lies there, unless the address is 0."""
    return _quiet(lambda number, address: number if isinstance(address, int) else number * _TYPE[dtype](
        address.read(0, 1)[0]))


@cache
def convert(dtype, wide, count):
    """(fragment of dtype) -> the same values as wide."""
    return lambda fragment: fragment.astype(_TYPE[wide])


@cache
def head(dtype, total, count):
    """(fragment of total) -> its first count elements."""
    return lambda fragment: fragment[:count]


@cache
def rotate(dtype, total, count):
    """(fragment of total) -> the same with its first count elements moved to the end."""
    return lambda fragment: np.roll(fragment, -count)


# -- global memory


@cache
def load_vector(dtype, count, wide):
    """(address, index) -> count neighbouring elements as a fragment of type wide, in one access."""
    return lambda address, index: address.read(index, count).astype(_TYPE[wide])


@cache
def add_vectors(dtype, count, wide, rows, across=1, spacing=0, compensated=False):
    """(sums, address, index, step) -> sums plus the vectors at index, index + step, ..., added in that order.

    Every row is `across` vectors of count elements, `spacing` apart.
    """

    def run(sums, address, index, step):
        for row in range(rows):
            values = [address.read(index + row * step + vector * spacing, count) for vector in range(across)]
            sums = _plus(sums, np.concatenate(values).astype(_TYPE[wide]), compensated)
        return sums

    return _quiet(run)


@cache
def add_inside(dtype, count, wide, rows, across=1, spacing=0, compensated=False, advance=0):
    """(sums, address, index, step, left, position, end) -> as add_vectors, but only of what lies inside.

    The first element stands at `position`, the next row's at position + advance: those in [0, end) of the first `left`
    rows count, the others are neither touched nor added.
    """

    def run(sums, address, index, step, left, position, end):
        position, end = int(position), int(end)
        for row in range(min(rows, left)):
            values = np.zeros((across, count), _TYPE[wide])
            for vector in range(across):
                place, stands = index + row * step + vector * spacing, position + row * advance + vector * spacing
                first, last = min(max(-stands, 0), count), min(max(end - stands, 0), count)
                element = first
                while element < last:
                    width = count
                    while element % width or element + width > last:
                        width //= 2
                    values[vector, element:element + width] = address.read(place + element, width)
                    element += width
            sums = _plus(sums, values.ravel(), compensated)
        return sums

    return _quiet(run)


@cache
def store_vector(dtype, count, wide):
    """(address, index, fragment): stores neighbouring elements in one access, each rounded once to dtype."""
    return _quiet(lambda address, index, fragment: address.write(index, fragment))


@cache
def load_each(dtype, count, wide):
    """(address, index, step, left) -> elements at index, index + step, ...: the first `left`, zeros for the others."""

    def run(address, index, step, left):
        values = np.zeros(count, _TYPE[wide])
        for element in range(min(count, left)):
            values[element] = address.read(index + element * step, 1)[0]
        return values

    return run


@cache
def store_each(dtype, count, wide):
    """(address, index, step, left, fragment): stores the first `left` elements at index, index + step, ..."""

    def run(address, index, step, left, fragment):
        for element in range(min(count, left)):
            address.write(index + element * step, fragment[element:element + 1])

    return _quiet(run)


@cache
def load_pieces(dtype, width, offsets, wide):
    """(address, index, stride, left) -> pieces of `width` neighbouring elements, at offset * stride from the index.

    Only pieces whose offset is less than `left` are touched, the others are zeros. The stride is 1 where width is not.
    """

    def run(address, index, stride, left):
        values = np.zeros((len(offsets), width), _TYPE[wide])
        for piece, offset in enumerate(offsets):
            if offset < left:
                values[piece] = address.read(index + offset * stride, width)
        return values.ravel()

    return run


@cache
def store_pieces(dtype, width, offsets, wide):
    """(address, index, stride, left, fragment): stores what load_pieces would load, each element rounded once."""

    def run(address, index, stride, left, fragment):
        for piece, offset in enumerate(offsets):
            if offset < left:
                address.write(index + offset * stride, fragment[piece * width:(piece + 1) * width])

    return _quiet(run)


@cache
def load_integers(dtype, offsets):
    """(address, index, stride, left, absent) -> as load_pieces of single integers or truth values, as 64-bit integers.

    Those that are not touched are `absent`.
    """
    return lambda address, index, stride, left, absent: tuple(
        int(address.read(index + offset * stride, 1)[0]) if offset < left else absent for offset in offsets)


# -- shared memory


class _Shared:
    """One block's array: like the device, it may not be read or written past its end."""

    def __init__(self, size, dtype):
        self.cells = np.full(size, np.nan, dtype)

    def span(self, index, count):
        """The cells of one access."""
        if not 0 <= index <= len(self.cells) - count or index % count:
            raise IndexError(f"shared elements {index} to {index + count - 1} of {len(self.cells)}, {count} aligned")
        return self.cells[index:index + count]


@cache
def shared_array(name, dtype, size):
    """() -> the block's array of this name."""

    def run():
        block = threading.current_thread()._manager
        with _shared_lock:
            arrays = block.__dict__.setdefault("densegrad_shared", {})
            if name not in arrays:
                arrays[name] = _Shared(size, _TYPE[dtype])
            return arrays[name]

    return run


_shared_lock = threading.Lock()


@cache
def load_shared(dtype, count):
    """(array, index) -> count neighbouring elements as a fragment, in one access."""
    return lambda array, index: array.span(index, count).copy()


@cache
def store_shared(dtype, count):
    """(array, index, fragment): stores neighbouring elements in one access."""

    def run(array, index, fragment):
        array.span(index, count)[:] = fragment

    return run


@cache
def add_shared(dtype, count, compensated=False, lost=0):
    """(sums of one column, array, index, step) -> sums plus the cells at index, index + step, ..., in that order.

    If compensated, each of them is followed by what was lost, `lost` cells further.
    """

    def run(sums, array, index, step):
        for cell in range(count):
            for offset in (0, lost) if compensated else (0,):
                sums = _plus(sums, array.span(index + cell * step + offset, 1), compensated)
        return sums

    return _quiet(run)


@cache
def store_spread(dtype, count, across, spacing):
    """(array, index, fragment, thread): stores `across` vectors of count elements, `spacing` apart."""
    width = min(16 // _TYPE[dtype]().itemsize, count)

    def run(array, index, fragment, thread):
        for start in range(0, across * count, width):
            array.span(index + start // count * spacing + start % count, width)[:] = fragment[start:start + width]

    return run


def _quiet(run):
    """A device neither warns of overflow nor of NaN."""

    def wrapped(*arguments):
        with np.errstate(all="ignore"):
            return run(*arguments)

    return wrapped
