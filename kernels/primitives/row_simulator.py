"""A row that is kept as it is stored, and what softmax makes of it, in NumPy."""
import numpy as np

from .factories import cache
from .number_simulator import _stored
from .simulator import _TYPE, _quiet, add_each, load_pieces, store_pieces


@cache
def keep(dtype, width, offsets):
    """(address, index, left) -> 16 bytes of a row as they are stored: `width` elements at each offset from the index.

    Only those whose offset is less than `left` are touched; the others are minus infinity.
    """

    def run(address, index, left):
        values = np.full((len(offsets), width), -np.inf, _stored(dtype))
        for piece, offset in enumerate(offsets):
            if offset < left:
                values[piece] = address.read(index + offset, width)
        return values.ravel()

    return run


@cache
def store_row(dtype, width, offsets, wide):
    """(address, index, left, fragment): stores elements where `keep` would load them, each rounded once to dtype."""
    store = store_pieces(dtype, width, offsets, wide)
    return lambda address, index, left, fragment: store(address, index, 1, left, fragment)


@cache
def load_row(dtype, width, offsets, wide):
    """(address, index, left) -> what `keep` would load as a fragment of type wide; zeros for what is not touched."""
    load = load_pieces(dtype, width, offsets, wide)
    return lambda address, index, left: load(address, index, 1, left)


@cache
def kept(dtype, wide):
    """(16 bytes of a row as they are stored) -> their elements as a fragment of type wide."""
    return lambda values: values.astype(_TYPE[wide])


@cache
def largest(dtype):
    """(value, value) -> the larger one, whatever NaN there is beside it."""
    return _quiet(np.fmax)


@cache
def largest_kept(dtype, wide):
    """(value, 16 bytes of a row as they are stored) -> the largest of all, whatever NaN there is beside it."""
    return _quiet(lambda value, kept: np.fmax.reduce(kept.astype(_TYPE[wide]), initial=value[0])[None])


@cache
def exponentials(dtype, wide, count, samples):
    """(fragment, values) -> the exponential of their difference, as exact as values of dtype need it.

    One value for all elements, or one for each.
    """
    return _quiet(lambda values, less: np.exp(values - less))


@cache
def labelled(dtype, columns, samples):
    """(labels, first column, elsewhere, more) -> `elsewhere` for each element, and `more` at the column of the label.

    columns are the elements' distances from the first column; one label for all of them, or one for each.
    """
    return _quiet(lambda labels, column, elsewhere, more: np.where(
        np.array(labels) - column == np.array(columns), _TYPE[dtype](elsewhere) + _TYPE[dtype](more),
        _TYPE[dtype](elsewhere)))


@cache
def smooth(dtype, count):
    """(fragment, elsewhere, more) -> elsewhere + more times each element."""
    return _quiet(lambda values, elsewhere, more: _TYPE[dtype](elsewhere) + values * _TYPE[dtype](more))


@cache
def inside(dtype, width, offsets):
    """(fragment, left) -> zeros for those elements whose offset is not less than `left`; `width` for each offset."""
    return lambda values, left: np.where(np.repeat(offsets, width) < left, values, _TYPE[dtype](0))


@cache
def chosen(dtype, columns):
    """(fragment, column) -> the element at this distance from the first column, or zero if it is none of them."""
    places = {column: place for place, column in enumerate(columns)}
    return lambda values, column: values[places[column]:][:1] if column in places else np.zeros(1, _TYPE[dtype])


@cache
def minus_at(dtype, columns):
    """(fragment, column, number) -> the same, but less the number at this distance from the first column."""
    return _quiet(lambda values, column, number: np.where(np.array(columns) == column, values - number, values))


@cache
def weighted_sum(dtype, count):
    """(sum, weights, fragment) -> sum plus the products, in order; a weight of zero adds nothing at all."""

    def run(total, weights, values):
        for product in np.where(weights == 0, _TYPE[dtype](0), weights * values):
            total = total + product
        return total

    return _quiet(run)


@cache
def join(dtype, counts):
    """(fragments of these lengths, one after another) -> all of their elements as one fragment."""
    return lambda *parts: np.concatenate(parts)


@cache
def divide(dtype):
    """(left, right) -> left / right, rounded once; what is divided by zero is infinite or not a number."""
    return _quiet(lambda left, right: np.divide(left, right, dtype=_TYPE[dtype]))


@cache
def fill(dtype, count):
    """(number) -> a fragment of which every element is the number."""
    return lambda number: np.full(count, number, _TYPE[dtype])


@cache
def add_now(dtype, count):
    """(sums, fragment) -> their sum, element by element, before what is loaded or stored next."""
    return _quiet(lambda sums, values: sums + values)


@cache
def add_each_now(dtype, count):
    """(sum, fragment) -> sum plus its elements, one after another, likewise."""
    return add_each(dtype, count, False)


@cache
def load_between(dtype, count, wide, absent):
    """(address, index, stride, position, end) -> elements at index, index + stride, ...

    The first stands at `position` of a row: those in [0, end) are loaded, the others are `absent` and not touched.
    """

    def run(address, index, stride, position, end):
        values = np.full(count, absent, _TYPE[wide])
        for element in range(count):
            if 0 <= position + element < end:
                values[element] = address.read(index + element * stride, 1)[0]
        return values

    return run


@cache
def between(dtype, count):
    """(fragment, position, end) -> zeros for those elements that do not stand in [0, end), the first at `position`."""
    places = np.arange(count)
    return lambda values, position, end: np.where((places >= -position) & (places < end - position), values,
                                                  _TYPE[dtype](0))
