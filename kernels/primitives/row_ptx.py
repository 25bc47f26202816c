"""A row that is kept in registers as it is stored, and what softmax makes of it, as LLVM and inline PTX."""
from math import e, log2

from llvmlite import ir
from numba import types

from ...facts import ITEM_BYTES
from .factories import cache
from .layout import WIDEST
from .number_ptx import _Functions, _numbers, _pack_numbers, _spread
from .ptx import (
    _FLOAT,
    _INT16,
    _INT32,
    _INT64,
    _NUMBA,
    _expand,
    _fragment_type,
    _from_8_0,
    _load_bytes,
    _load_global,
    _load_words,
    _narrowed,
    _pack,
    _split,
    _store_bytes,
    _times,
    _unpack,
    _widened,
    _words,
)

#: the bits of minus infinity
_LOWEST = {"float16": 0xFC00, "bfloat16": 0xFF80, "float32": 0xFF800000, "float64": 0xFFF0000000000000}
_HALF = ("float16", "bfloat16")


def _kept_type(dtype):
    return types.UniTuple(types.uint64, 2) if dtype == "float64" else types.UniTuple(types.uint32, 4)


@cache
def keep(dtype, width, offsets):
    """(address, index, left) -> 16 bytes of a row as they are stored: `width` elements at each offset from the index.

    Only those whose offset is less than `left` are touched; the others are minus infinity.
    """
    size, (_, word, _) = ITEM_BYTES[dtype], _words(dtype, width)
    lowest = _LOWEST[dtype] * (0x10001 if word == _INT32 and size == 2 else 1)

    def body(builder, address, index, left):
        pointer = builder.add(address, builder.mul(index, ir.Constant(_INT64, size)))
        found = []
        for offset in offsets:
            inside = builder.icmp_signed("<", ir.Constant(_INT32, offset), left)
            found += _load_words(builder, pointer, dtype, width, inside, further=offset * size, absent=lowest)
        if word == _INT16:
            wide = [builder.zext(half, _INT32) for half in found]
            found = [builder.or_(low, builder.shl(high, ir.Constant(_INT32, 16)))
                     for low, high in zip(wide[::2], wide[1::2], strict=True)]
        return _pack(builder, found)

    return _expand(_kept_type(dtype), (types.int64, types.int64, types.int32), body)


@cache
def store_row(dtype, width, offsets, wide):
    """(address, index, left, fragment): stores elements where `keep` would load them, each rounded once to dtype."""
    size = ITEM_BYTES[dtype]

    def body(builder, address, index, left, fragment):
        pointer = builder.add(address, builder.mul(index, ir.Constant(_INT64, size)))
        values = _narrowed(builder, _unpack(builder, fragment), wide, dtype)
        for piece, offset in enumerate(offsets):
            inside = builder.icmp_signed("<", ir.Constant(_INT32, offset), left)
            _store_bytes(builder, pointer, dtype, values[piece * width:(piece + 1) * width], offset * size, inside)

    fragment = _fragment_type(wide, width * len(offsets))
    return _expand(types.none, (types.int64, types.int64, types.int32, fragment), body)


@cache
def load_row(dtype, width, offsets, wide):
    """(address, index, left) -> what `keep` would load as a fragment of type wide; zeros for what is not touched."""
    size = ITEM_BYTES[dtype]

    def body(builder, address, index, left):
        pointer, values = builder.add(address, builder.mul(index, ir.Constant(_INT64, size))), []
        for offset in offsets:
            inside = builder.icmp_signed("<", ir.Constant(_INT32, offset), left)
            values += _widened(builder, _load_bytes(builder, pointer, dtype, width, inside, further=offset * size),
                               dtype, wide)
        return _pack(builder, values)

    return _expand(_fragment_type(wide, width * len(offsets)), (types.int64, types.int64, types.int32), body)


@cache
def kept(dtype, wide):
    """(16 bytes of a row as they are stored) -> their elements as a fragment of type wide."""
    count = WIDEST // ITEM_BYTES[dtype]
    word, letter = (_INT64, "l") if dtype == "float64" else (_INT32, "r")
    same = ir.FunctionType(word, [word])

    def body(builder, words):
        # What was widened for a step before is not kept for the next one: that would take twice the registers.
        anew = [builder.asm(same, f"mov.b{word.width} $0, $1;", f"={letter},{letter}", [one], side_effect=True)
                for one in _unpack(builder, words)]
        return _pack(builder, _widened(builder, _split(builder, anew, dtype, count), dtype, wide))

    return _expand(_fragment_type(wide, count), (_kept_type(dtype),), body)


@cache
def largest(dtype):
    """(value, value) -> the larger one, whatever NaN there is beside it."""
    return _expand(_fragment_type(dtype, 1), (_fragment_type(dtype, 1),) * 2, lambda builder, left, right: _pack(
        builder, [_larger(builder, *_unpack(builder, left), *_unpack(builder, right))]))


@cache
def largest_kept(dtype, wide):
    """(value, 16 bytes of a row as they are stored) -> the largest of all, whatever NaN there is beside it."""
    count = WIDEST // ITEM_BYTES[dtype]
    name = {"float16": "f16x2", "bfloat16": "bf16x2"}.get(dtype)
    kind = ir.FunctionType(_INT32, [_INT32] * 2)

    def body(builder, value, words):
        kept, found = _unpack(builder, words), _unpack(builder, value)
        if name and _from_8_0():
            # Two halves at a time.
            while len(kept) > 1:
                kept = [builder.asm(kind, f"max.{name} $0, $1, $2;", "=r,r,r", pair, side_effect=False)
                        for pair in zip(kept[::2], kept[1::2], strict=True)]
        for one in kept:
            stored = _split(builder, [one], dtype, count // len(_unpack(builder, words)))
            for other in _widened(builder, stored, dtype, wide):
                found = [_larger(builder, found[0], other)]
        return _pack(builder, found)

    return _expand(_fragment_type(wide, 1), (_fragment_type(wide, 1), _kept_type(dtype)), body)


def _larger(builder, left, right):
    return _of_two(builder, "max", left, right, stays=False)


def _of_two(builder, name, left, right, *, stays):
    """One instruction on two floats; if it stays, between what is loaded and stored before and after it."""
    width, letter = (64, "d") if left.type == ir.DoubleType() else (32, "f")
    kind = ir.FunctionType(left.type, [left.type] * 2)
    return builder.asm(kind, f"{name}.f{width} $0, $1, $2;", ",".join([f"={letter}"] + [letter] * 2), [left, right],
                       side_effect=stays)


@cache
def exponentials(dtype, wide, count, samples):
    """(fragment, values) -> the exponential of their difference, as exact as values of dtype need it.

    One value for all elements, or one for each.
    """
    fragment, half = _fragment_type(wide, count), dtype in _HALF

    def body(builder, values, less):
        number, spread = _Functions(builder, half), _spread(_numbers(builder, less), count)
        pairs = zip(_numbers(builder, values), spread, strict=True)
        if not half:
            return _pack_numbers(builder, [number.exp(value - one) for value, one in pairs])
        # Both are multiplied by log2(e) in one instruction; that the difference is rounded once is within the bound.
        return _pack(builder, [number.power_of_two(builder.fma(
            value.value, ir.Constant(_FLOAT[wide], log2(e)), (one * -log2(e)).value)) for value, one in pairs])

    return _expand(fragment, (fragment, _fragment_type(wide, samples)), body)


@cache
def labelled(dtype, columns, samples):
    """(labels, first column, elsewhere, more) -> `elsewhere` for each element, and `more` at the column of the label.

    columns are the elements' distances from the first column; one label for all of them, or one for each.
    """
    fragment = _fragment_type(dtype, len(columns))

    def body(builder, labels, column, elsewhere, more):
        there = builder.fadd(elsewhere, more)
        values = []
        for label, distance in zip(_spread(_unpack(builder, labels), len(columns)), columns, strict=True):
            relative = builder.trunc(builder.sub(label, column), _INT32)
            is_label = builder.icmp_signed("==", relative, ir.Constant(_INT32, distance))
            values.append(builder.select(is_label, there, elsewhere))
        return _pack(builder, values)

    return _expand(fragment, (types.UniTuple(types.int64, samples), types.int64, _NUMBA[dtype], _NUMBA[dtype]), body)


@cache
def smooth(dtype, count):
    """(fragment, elsewhere, more) -> elsewhere + more times each element."""
    fragment = _fragment_type(dtype, count)
    return _expand(fragment, (fragment, _NUMBA[dtype], _NUMBA[dtype]), lambda builder, values, elsewhere, more: _pack(
        builder, [builder.fadd(elsewhere, _times(builder, value, more)) for value in _unpack(builder, values)]))


@cache
def inside(dtype, width, offsets):
    """(fragment, left) -> zeros for those elements whose offset is not less than `left`; `width` for each offset."""
    fragment, none = _fragment_type(dtype, width * len(offsets)), ir.Constant(_FLOAT[dtype], 0)

    def body(builder, values, left):
        wanted = [builder.icmp_signed("<", ir.Constant(_INT32, offset), left)
                  for offset in offsets for _ in range(width)]
        return _pack(builder, [builder.select(one, value, none)
                               for one, value in zip(wanted, _unpack(builder, values), strict=True)])

    return _expand(fragment, (fragment, types.int32), body)


@cache
def chosen(dtype, columns):
    """(fragment, column) -> the element at this distance from the first column, or zero if it is none of them."""
    def body(builder, values, column):
        found = ir.Constant(_FLOAT[dtype], 0)
        for value, distance in zip(_unpack(builder, values), columns, strict=True):
            found = builder.select(builder.icmp_signed("==", column, ir.Constant(_INT32, distance)), value, found)
        return _pack(builder, [found])

    return _expand(_fragment_type(dtype, 1), (_fragment_type(dtype, len(columns)), types.int32), body)


@cache
def minus_at(dtype, columns):
    """(fragment, column, number) -> the same, but less the number at this distance from the first column."""
    fragment = _fragment_type(dtype, len(columns))

    def body(builder, values, column, number):
        return _pack(builder, [builder.select(builder.icmp_signed("==", column, ir.Constant(_INT32, distance)),
                                              builder.fsub(value, number), value)
                               for value, distance in zip(_unpack(builder, values), columns, strict=True)])

    return _expand(fragment, (fragment, types.int32, _NUMBA[dtype]), body)


@cache
def weighted_sum(dtype, count):
    """(sum, weights, fragment) -> sum plus the products, in order; a weight of zero adds nothing at all."""
    fragment = _fragment_type(dtype, count)

    def body(builder, total, weights, values):
        found, = _unpack(builder, total)
        none = ir.Constant(_FLOAT[dtype], 0)
        for weight, value in zip(_unpack(builder, weights), _unpack(builder, values), strict=True):
            product = builder.select(builder.fcmp_ordered("==", weight, none), none, _times(builder, weight, value))
            found = builder.fadd(found, product)
        return _pack(builder, [found])

    return _expand(_fragment_type(dtype, 1), (_fragment_type(dtype, 1), fragment, fragment), body)


@cache
def join(dtype, counts):
    """(fragments of these lengths, one after another) -> all of their elements as one fragment."""
    fragments = tuple(_fragment_type(dtype, count) for count in counts)
    return _expand(_fragment_type(dtype, sum(counts)), fragments, lambda builder, *parts: _pack(
        builder, [value for part in parts for value in _unpack(builder, part)]))


@cache
def divide(dtype):
    """(left, right) -> left / right, rounded once; what is divided by zero is infinite or not a number."""
    return _expand(_NUMBA[dtype], (_NUMBA[dtype], _NUMBA[dtype]),
                   lambda builder, left, right: builder.fdiv(left, right))


@cache
def fill(dtype, count):
    """(number) -> a fragment of which every element is the number."""
    return _expand(_fragment_type(dtype, count), (_NUMBA[dtype],), lambda builder, number: _pack(
        builder, [number] * count))


@cache
def add_now(dtype, count):
    """(sums, fragment) -> their sum, element by element, before what is loaded or stored next.

    Left to itself the compiler adds at the end of a row, and keeps all of the row in registers until then.
    """
    fragment = _fragment_type(dtype, count)
    return _expand(fragment, (fragment, fragment), lambda builder, sums, values: _pack(builder, [
        _add_now(builder, total, value)
        for total, value in zip(_unpack(builder, sums), _unpack(builder, values), strict=True)]))


@cache
def add_each_now(dtype, count):
    """(sum, fragment) -> sum plus its elements, one after another, likewise."""

    def body(builder, total, values):
        found, = _unpack(builder, total)
        for value in _unpack(builder, values):
            found = _add_now(builder, found, value)
        return _pack(builder, [found])

    return _expand(_fragment_type(dtype, 1), (_fragment_type(dtype, 1), _fragment_type(dtype, count)), body)


def _add_now(builder, left, right):
    return _of_two(builder, "add", left, right, stays=True)


@cache
def load_between(dtype, count, wide, absent):
    """(address, index, stride, position, end) -> elements at index, index + stride, ...

    The first stands at `position` of a row: those in [0, end) are loaded, the others are `absent` and not touched.
    """
    other = ir.Constant(_FLOAT[wide], absent)

    def body(builder, address, index, stride, position, end):
        values = []
        for element in range(count):
            place = builder.add(position, ir.Constant(_INT64, element))
            wanted = builder.icmp_unsigned("<", place, end)
            stored = _load_global(builder, address, index, dtype, 1, wanted)
            values.append(builder.select(wanted, _widened(builder, stored, dtype, wide)[0], other))
            index = builder.add(index, stride)
        return _pack(builder, values)

    return _expand(_fragment_type(wide, count), (types.int64,) * 5, body)


@cache
def between(dtype, count):
    """(fragment, position, end) -> zeros for those elements that do not stand in [0, end), the first at `position`."""
    fragment, none = _fragment_type(dtype, count), ir.Constant(_FLOAT[dtype], 0)

    def body(builder, values, position, end):
        return _pack(builder, [builder.select(builder.icmp_unsigned(
            "<", builder.add(position, ir.Constant(_INT64, element)), end), value, none)
            for element, value in enumerate(_unpack(builder, values))])

    return _expand(fragment, (fragment, types.int64, types.int64), body)
