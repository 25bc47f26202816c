"""The primitives as LLVM IR and inline PTX: the only module that knows the compiler.

Each factory is cached and returns an intrinsic that Numba's compiler expands in place, fully unrolled, so that
fragments stay in registers and memory is touched in accesses as wide as asked for.

Source: CUDA C++ Programming Guide, "Device Memory Accesses"; PTX ISA, "ld", "st", "cvt".
"""
from llvmlite import ir
from numba import cuda, types
from numba.cuda.core.targetconfig import ConfigStack
from numba.cuda.extending import intrinsic
from numba.cuda.typing import signature

from ...facts import ITEM_BYTES
from .factories import cache

_INT16, _INT32, _INT64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_SHARED = 3  # address space
_FLOAT = {"float16": ir.HalfType(), "float32": ir.FloatType(), "float64": ir.DoubleType()}
_STORED = {**_FLOAT, "bfloat16": _INT16}
_NUMBA = {"float32": types.float32, "float64": types.float64}


def jit(threads, blocks_per_multiprocessor=1):
    """Decorator of a kernel that is launched with this many threads a block."""
    return cuda.jit(launch_bounds=(threads, blocks_per_multiprocessor))


def typed(dtype):
    """The type that makes a literal of this dtype inside a kernel."""
    return _NUMBA[dtype]


def _fragment_type(dtype, count):
    return types.UniTuple(_NUMBA[dtype], count)


def _expand(result, parameters, body):
    """An intrinsic with these Numba types whose code is emitted by body(builder, *values)."""

    def define(*arguments):
        def emit(context, builder, sig, values):
            cast = [context.cast(builder, value, have, want)
                    for value, have, want in zip(values, sig.args, parameters, strict=True)]
            emitted = body(builder, *cast)
            return context.get_dummy_value() if emitted is None else emitted

        return signature(result, *arguments), emit

    return intrinsic(_WITH_PARAMETERS[len(parameters)](define))


#: Numba reads the number of parameters off the function that defines an intrinsic, and takes no starred ones
_WITH_PARAMETERS = (
    lambda define: lambda context: define(),
    lambda define: lambda context, a: define(a),
    lambda define: lambda context, a, b: define(a, b),
    lambda define: lambda context, a, b, c: define(a, b, c),
    lambda define: lambda context, a, b, c, d: define(a, b, c, d),
    lambda define: lambda context, a, b, c, d, e: define(a, b, c, d, e),
    lambda define: lambda context, a, b, c, d, e, f: define(a, b, c, d, e, f),
    lambda define: lambda context, a, b, c, d, e, f, g: define(a, b, c, d, e, f, g),
    lambda define: lambda context, a, b, c, d, e, f, g, h: define(a, b, c, d, e, f, g, h),
    lambda define: lambda context, a, b, c, d, e, f, g, h, i: define(a, b, c, d, e, f, g, h, i),
)


def _pack(builder, values):
    """LLVM values as the array that Numba uses for a tuple of one type."""
    packed = ir.Constant(ir.ArrayType(values[0].type, len(values)), ir.Undefined)
    for position, value in enumerate(values):
        packed = builder.insert_value(packed, value, position)
    return packed


def _unpack(builder, fragment):
    return [builder.extract_value(fragment, position) for position in range(fragment.type.count)]


def _shared_pointer(builder, array, index, dtype):
    """A pointer to the element of a shared array."""
    offset = builder.mul(index, ir.Constant(_INT32, ITEM_BYTES[dtype]))
    return builder.inttoptr(builder.add(array, offset), ir.PointerType(_STORED[dtype], _SHARED))


def _cast_pointer(builder, pointer, pointee):
    return builder.bitcast(pointer, ir.PointerType(pointee, _SHARED))


def _widen(builder, value, dtype, wide):
    """A stored value in the wider float type."""
    if dtype == "bfloat16":
        bits = builder.shl(builder.zext(value, _INT32), ir.Constant(_INT32, 16))
        value, dtype = builder.bitcast(bits, ir.FloatType()), "float32"
    return value if dtype == wide else builder.fpext(value, _FLOAT[wide])


def _widened(builder, values, dtype, wide):
    return [_widen(builder, value, dtype, wide) for value in values]


def _from_8_0():
    """Whether what is compiled is for compute capability 8.0 or newer."""
    return ConfigStack().top().compute_capability >= (8, 0)


def _narrowed(builder, values, wide, dtype):
    """Float values as they are stored, each rounded once to nearest even."""
    if dtype == "bfloat16":
        if not _from_8_0():
            return [_round_to_bfloat16(builder, value) for value in values]
        whole = values + values[-1:] * (len(values) % 2)
        pairs = zip(whole[::2], whole[1::2], strict=True)
        return _halves(builder, [_pair_to_bfloat16(builder, *pair) for pair in pairs])[:len(values)]
    if dtype == wide:
        return values
    narrower = ITEM_BYTES[dtype] < ITEM_BYTES[wide]
    return [(builder.fptrunc if narrower else builder.fpext)(value, _FLOAT[dtype]) for value in values]


def _pair_to_bfloat16(builder, low, high):
    kind = ir.FunctionType(_INT32, [ir.FloatType()] * 2)
    return builder.asm(kind, "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f", [high, low], side_effect=False)


def _round_to_bfloat16(builder, value):
    """The upper 16 bits of a float32, rounded to nearest even in integers: capability 7.5 has no instruction for it."""
    bits = builder.bitcast(value, _INT32)
    lowest = builder.and_(builder.lshr(bits, ir.Constant(_INT32, 16)), ir.Constant(_INT32, 1))
    rounded = builder.add(bits, builder.add(lowest, ir.Constant(_INT32, 0x7FFF)))
    not_a_number = builder.fcmp_unordered("uno", value, value)
    quiet = builder.or_(bits, ir.Constant(_INT32, 0x400000))
    chosen = builder.select(not_a_number, quiet, rounded)
    return builder.trunc(builder.lshr(chosen, ir.Constant(_INT32, 16)), _INT16)


def _load_shared(builder, pointer, dtype, count):
    """count neighbouring shared values in one access."""
    vector = ir.VectorType(_STORED[dtype], count)
    loaded = builder.load(_cast_pointer(builder, pointer, vector), align=count * ITEM_BYTES[dtype], typ=vector)
    return _elements(builder, loaded, dtype, count)


def _store_shared(builder, pointer, dtype, values):
    """Neighbouring shared values in one access."""
    vector = _vector(builder, values)
    builder.store(vector, _cast_pointer(builder, pointer, vector.type), align=len(values) * ITEM_BYTES[dtype])


def _load_global(builder, address, index, dtype, count, condition=None):
    """count neighbouring stored values in one access; where there is a condition and it is false, zeros.

    Inline PTX, since NVVM splits vectors of eight 16-bit values and moves loads down to their first use.
    """
    pointer = builder.add(address, builder.mul(index, ir.Constant(_INT64, ITEM_BYTES[dtype])))
    return _load_bytes(builder, pointer, dtype, count, condition)


def _again(builder, number):
    """The same number, of which the compiler does not know it."""
    function = ir.FunctionType(_INT32, [_INT32])
    return builder.asm(function, "mov.u32 $0, $1;", "=r,r", [number], side_effect=True)


def _load_bytes(builder, pointer, dtype, count, condition=None, bounds=(), further=0):
    """As _load_global, `further` bytes on, where the condition holds and of each pair of bounds the first is less."""
    return _split(builder, _load_words(builder, pointer, dtype, count, condition, bounds, further), dtype, count)


def _load_words(builder, pointer, dtype, count, condition=None, bounds=(), further=0, absent=0):
    """The registers that _load_bytes loads; where they are not to be loaded, each is `absent`."""
    words, word, letter = _words(dtype, count)
    outputs = ", ".join(f"${n}" for n in range(words))
    load = f"ld.global{_suffix(words, word)} {{{outputs}}}" if words > 1 else f"ld.global.b{word.width} {outputs}"
    code = f"{load}, [${words} + {further}];"
    arguments, tests = [pointer], []
    for lesser, greater in bounds:
        combined = ".and" if tests else ""
        tests.append(f"setp.lt{combined}.s32 wanted, ${words + len(arguments)}, ${words + len(arguments) + 1}"
                     f"{', wanted' if tests else ''};")
        arguments += [lesser, greater]
    if condition is not None:
        combined = ".and" if tests else ""
        tests.append(f"setp.ne{combined}.b32 wanted, ${words + len(arguments)}, 0{', wanted' if tests else ''};")
        arguments.append(builder.zext(condition, _INT32))
    if tests:
        clear = " ".join(f"mov.b{word.width} ${n}, {absent};" for n in range(words))
        code = f"{{ .reg .pred wanted; {' '.join(tests)} {clear} @wanted {code} }}"
    constraints = ",".join([f"=&{letter}"] * words + ["l"] + ["r"] * (len(arguments) - 1))
    result = word if words == 1 else ir.LiteralStructType([word] * words)
    function = ir.FunctionType(result, [argument.type for argument in arguments])
    loaded = builder.asm(function, code, constraints, arguments, side_effect=True)
    return [loaded] if words == 1 else [builder.extract_value(loaded, n) for n in range(words)]


def _load_partly(builder, address, index, dtype, count, mask):
    """As _load_global, of those elements only whose bits are set in the mask; zeros for the others.

    Never touches the others' memory. The elements come in the widest accesses that the mask allows: all, halves,
    quarters...
    """
    words, word, letter = _words(dtype, count)
    size, packed = ITEM_BYTES[dtype], ITEM_BYTES[dtype] == 2
    code = [f".reg .pred one, {', '.join(f'whole{n}' for n in range(2 * count))};", ".reg .b32 bits;",
            f".reg .b16 half<{count}>;"]
    code += [f"mov.b{word.width} ${n}, 0;" for n in range(words)]
    code += [f"mov.b16 half{n}, 0;" for n in range(count) if packed]
    # The pieces are numbered as in a heap: whole1 is all of them, whole2 and whole3 its halves.
    for piece in range(1, 2 * count):
        width = count >> piece.bit_length() - 1
        first = (piece - count // width) * width
        bits = (2 ** width - 1) << first
        apart = f".and.b32 one, bits, {bits}, !whole{piece // 2}" if piece > 1 else f".b32 one, bits, {bits}"
        registers = [f"half{first}"] if packed and width == 1 else [
            f"${n}" for n in range(first * size // (word.width // 8), (first + width) * size // (word.width // 8))]
        suffix = f".b{word.width}" if len(registers) == 1 else _suffix(len(registers), word)
        suffix = f".b{8 * size}" if width == 1 else suffix
        into = registers[0] if len(registers) == 1 else f"{{{', '.join(registers)}}}"
        code += [f"and.b32 bits, ${words + 1}, {bits};", f"setp.eq.b32 whole{piece}, bits, {bits};", f"setp.eq{apart};",
                 f"@one ld.global{suffix} {into}, [${words} + {first * size}];"]
    code += [f"@!whole{count // 2 + n} mov.b32 ${n}, {{half{2 * n}, half{2 * n + 1}}};" for n in range(words) if packed]
    pointer = builder.add(address, builder.mul(index, ir.Constant(_INT64, size)))
    function = ir.FunctionType(ir.LiteralStructType([word] * words), [_INT64, _INT32])
    loaded = builder.asm(function, f"{{ {' '.join(code)} }}", ",".join([f"=&{letter}"] * words + ["l", "r"]),
                         [pointer, mask], side_effect=True)
    return _split(builder, [builder.extract_value(loaded, n) for n in range(words)], dtype, count)


def _plus(builder, sums, values, compensated):
    """sums plus values; if compensated, sums holds as many sums and then what their roundings lost.

    What an addition loses is a float, and these five more additions find it without a branch (Knuth).
    """
    if not compensated:
        return [builder.fadd(total, value) for total, value in zip(sums, values, strict=True)]
    totals, lost = [], []
    for total, error, value in zip(sums[:len(values)], sums[len(values):], values, strict=True):
        rounded = builder.fadd(total, value)
        of_value = builder.fsub(rounded, total)
        of_total = builder.fsub(rounded, of_value)
        missing = builder.fadd(builder.fsub(total, of_total), builder.fsub(value, of_value))
        lost.append(builder.fadd(error, missing))
        totals.append(rounded)
    return totals + lost


def _finite(builder, value):
    """Whether the value is neither infinite nor NaN."""
    return builder.fcmp_ordered("==", builder.fsub(value, value), ir.Constant(value.type, 0.0))


def _store_global(builder, address, index, dtype, values):
    """Neighbouring stored values in one access."""
    pointer = builder.add(address, builder.mul(index, ir.Constant(_INT64, ITEM_BYTES[dtype])))
    _store_bytes(builder, pointer, dtype, values)


def _store_bytes(builder, pointer, dtype, values, further=0, condition=None):
    """As _store_global, `further` bytes on, and where there is a condition only if it holds."""
    words, word, letter = _words(dtype, len(values))
    parts = [builder.bitcast(values[0], word)] if len(values) == 1 else _joined(builder, values, dtype)
    inputs = ", ".join(f"${n + 1}" for n in range(words))
    place = f"[$0 + {further}]"
    code = f"st.global{_suffix(words, word)} {place}, {{{inputs}}};" if words > 1 else (
        f"st.global.b{word.width} {place}, $1;")
    arguments, letters = [pointer, *parts], ["l"] + [letter] * words
    if condition is not None:
        code = f"{{ .reg .pred wanted; setp.ne.b32 wanted, ${len(arguments)}, 0; @wanted {code} }}"
        arguments, letters = [*arguments, builder.zext(condition, _INT32)], [*letters, "r"]
    function = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    builder.asm(function, code, ",".join(letters), arguments, side_effect=True)


def _words(dtype, count):
    """(how many, of which type, PTX register letter) of the registers that hold count stored values."""
    size = count * ITEM_BYTES[dtype]
    if size == 2:
        return 1, _INT16, "h"
    return (size // 8, _INT64, "l") if dtype == "float64" else (size // 4, _INT32, "r")


def _split(builder, words, dtype, count):
    """The stored values in registers."""
    if len(words) == count == 1:
        return [builder.bitcast(words[0], _STORED[dtype])]
    return _halves(builder, words) if dtype == "bfloat16" else _elements(builder, _vector(builder, words), dtype, count)


def _halves(builder, words):
    """Lower and upper 16 bits of each word, by shifts: those of widening meet them, and one instruction is left."""
    return [builder.trunc(half, _INT16) for word in words
            for half in (word, builder.lshr(word, ir.Constant(_INT32, 16)))]


def _joined(builder, values, dtype):
    """The registers that hold the stored values."""
    words, word, _ = _words(dtype, len(values))
    if dtype != "bfloat16":
        vector = builder.bitcast(_vector(builder, values), ir.VectorType(word, words))
        return [builder.extract_element(vector, ir.Constant(_INT32, n)) for n in range(words)]
    low, high = ([builder.zext(value, _INT32) for value in values[first::2]] for first in (0, 1))
    return [builder.or_(one, builder.shl(other, ir.Constant(_INT32, 16))) for one, other in zip(low, high, strict=True)]


def _suffix(words, word):
    return f".v{words}.b{word.width}"


def _vector(builder, values):
    vector = ir.Constant(ir.VectorType(values[0].type, len(values)), ir.Undefined)
    for lane, value in enumerate(values):
        vector = builder.insert_element(vector, value, ir.Constant(_INT32, lane))
    return vector


def _elements(builder, vector, dtype, count):
    """The stored values in a vector of words."""
    values = builder.bitcast(vector, ir.VectorType(_STORED[dtype], count))
    return [builder.extract_element(values, ir.Constant(_INT32, lane)) for lane in range(count)]


# -- fragments


@cache
def zeros(dtype, count):
    """() -> a fragment of zeros."""
    return _expand(_fragment_type(dtype, count), (),
                   lambda builder: _pack(builder, [ir.Constant(_FLOAT[dtype], 0.0)] * count))


@cache
def add(dtype, count):
    """(left, right) -> their sum, element by element."""
    fragment = _fragment_type(dtype, count)
    return _expand(fragment, (fragment, fragment), lambda builder, left, right: _pack(builder, [
        builder.fadd(a, b) for a, b in zip(_unpack(builder, left), _unpack(builder, right), strict=True)]))


@cache
def multiply_add(dtype, count):
    """(sums, left, right) -> sums + left * right, element by element, rounded once."""
    fragment = _fragment_type(dtype, count)

    def body(builder, sums, left, right):
        factors = zip(_unpack(builder, left), _unpack(builder, right), _unpack(builder, sums), strict=True)
        return _pack(builder, [builder.fma(*three) for three in factors])

    return _expand(fragment, (fragment, fragment, fragment), body)


@cache
def plus(dtype, count, compensated):
    """(sums, values) -> sums plus values.

    Compensated sums are a fragment of twice the length: the sums, then what their roundings lost.
    """
    fragment = _fragment_type(dtype, count * (1 + compensated))
    return _expand(fragment, (fragment, _fragment_type(dtype, count)), lambda builder, sums, values: _pack(
        builder, _plus(builder, _unpack(builder, sums), _unpack(builder, values), compensated)))


@cache
def add_each(dtype, count, compensated):
    """(sums of one column, fragment) -> sums plus its elements, one after another."""
    sums = _fragment_type(dtype, 1 + compensated)

    def body(builder, totals, fragment):
        totals = _unpack(builder, totals)
        for value in _unpack(builder, fragment):
            totals = _plus(builder, totals, [value], compensated)
        return _pack(builder, totals)

    return _expand(sums, (sums, _fragment_type(dtype, count)), body)


@cache
def tidy(dtype, count, compensated):
    """(sums) -> the same; what was lost counts as nothing where it is not a number, as beside an infinite sum."""

    def body(builder, sums):
        values = _unpack(builder, sums)
        return _pack(builder, values[:count] + [
            builder.select(_finite(builder, value), value, ir.Constant(value.type, 0.0)) for value in values[count:]])

    fragment = _fragment_type(dtype, count * (1 + compensated))
    return _expand(fragment, (fragment,), body)


@cache
def settle(dtype, count, compensated):
    """(tidy sums) -> what they come to."""

    def body(builder, sums):
        values = _unpack(builder, sums)
        if compensated:
            values = [builder.fadd(total, error) for total, error in zip(values[:count], values[count:], strict=True)]
        return _pack(builder, values)

    return _expand(_fragment_type(dtype, count), (_fragment_type(dtype, count * (1 + compensated)),), body)


@cache
def scale(dtype, count):
    """(fragment, factor) -> their product, rounded: what is added to it is not fused with it."""
    fragment = _fragment_type(dtype, count)

    return _expand(fragment, (fragment, _NUMBA[dtype]), lambda builder, values, factor: _pack(
        builder, [_times(builder, value, factor) for value in _unpack(builder, values)]))


def _times(builder, value, factor):
    """The rounded product."""
    name = "llvm.nvvm.mul.rn.d" if factor.type == ir.DoubleType() else "llvm.nvvm.mul.rn.f"
    times = builder.module.declare_intrinsic(name, fnty=ir.FunctionType(factor.type, [factor.type] * 2))
    return builder.call(times, [value, factor])


@cache
def scale_at(dtype, stored):
    """(number, address) -> number, times the one of type stored that lies there, unless the address is 0."""

    def body(builder, number, address):
        given = builder.icmp_signed("!=", address, ir.Constant(_INT64, 0))
        there, = _load_global(builder, address, ir.Constant(_INT64, 0), stored, 1, given)
        factor = builder.select(given, _widen(builder, there, stored, dtype), ir.Constant(_FLOAT[dtype], 1.0))
        return _times(builder, number, factor)

    return _expand(_NUMBA[dtype], (_NUMBA[dtype], types.int64), body)


@cache
def convert(dtype, wide, count):
    """(fragment of dtype) -> the same values as wide."""
    return _expand(_fragment_type(wide, count), (_fragment_type(dtype, count),),
                   lambda builder, values: _pack(builder, _widened(builder, _unpack(builder, values), dtype, wide)))


@cache
def head(dtype, total, count):
    """(fragment of total) -> its first count elements."""
    return _expand(_fragment_type(dtype, count), (_fragment_type(dtype, total),),
                   lambda builder, values: _pack(builder, _unpack(builder, values)[:count]))


@cache
def rotate(dtype, total, count):
    """(fragment of total) -> the same with its first count elements moved to the end."""
    fragment = _fragment_type(dtype, total)

    def body(builder, values):
        unpacked = _unpack(builder, values)
        return _pack(builder, unpacked[count:] + unpacked[:count])

    return _expand(fragment, (fragment,), body)


# -- global memory


@cache
def load_vector(dtype, count, wide):
    """(address, index) -> count neighbouring elements as a fragment of type wide, in one access."""
    return _expand(_fragment_type(wide, count), (types.int64, types.int64), lambda builder, address, index: _pack(
        builder, _widened(builder, _load_global(builder, address, index, dtype, count), dtype, wide)))


@cache
def add_vectors(dtype, count, wide, rows, across=1, spacing=0, compensated=False):
    """(sums, address, index, step) -> sums plus the vectors at index, index + step, ..., added in that order.

    Every row is `across` vectors of count elements, `spacing` apart. All of the loads are issued before the first
    addition.
    """

    def body(builder, sums, address, index, step):
        loaded = []
        for _ in range(rows):
            places = [builder.add(index, ir.Constant(_INT64, vector * spacing)) for vector in range(across)]
            loaded.append([value for place in places for value in _load_global(builder, address, place, dtype, count)])
            index = builder.add(index, step)
        totals = _unpack(builder, sums)
        for stored in loaded:
            totals = _plus(builder, totals, _widened(builder, stored, dtype, wide), compensated)
        return _pack(builder, totals)

    fragment = _fragment_type(wide, across * count * (1 + compensated))
    return _expand(fragment, (fragment, types.int64, types.int64, types.int64), body)


@cache
def add_inside(dtype, count, wide, rows, across=1, spacing=0, compensated=False, advance=0):
    """(sums, address, index, step, left, position, end) -> as add_vectors, but only of what lies inside.

    The first element stands at `position`, the next row's at position + advance: those in [0, end) of the first `left`
    rows count, the others are neither touched nor added.
    """

    def mask(builder, position, end):
        bits = ir.Constant(_INT32, 0)
        for element in range(count):
            inside = builder.icmp_unsigned("<", builder.add(position, ir.Constant(_INT64, element)), end)
            bits = builder.or_(bits, builder.select(inside, ir.Constant(_INT32, 1 << element), ir.Constant(_INT32, 0)))
        return bits

    def body(builder, sums, address, index, step, left, position, end):
        loaded = []
        for row in range(rows):
            wanted = builder.icmp_signed("<", ir.Constant(_INT64, row), left)
            values = []
            for vector in range(across):
                offset = ir.Constant(_INT64, vector * spacing)
                bits = mask(builder, builder.add(position, offset), end)
                bits = builder.select(wanted, bits, ir.Constant(_INT32, 0))
                values += _load_partly(builder, address, builder.add(index, offset), dtype, count, bits)
            loaded.append(values)
            index = builder.add(index, step)
            position = builder.add(position, ir.Constant(_INT64, advance))
        totals = _unpack(builder, sums)
        for stored in loaded:
            totals = _plus(builder, totals, _widened(builder, stored, dtype, wide), compensated)
        return _pack(builder, totals)

    fragment = _fragment_type(wide, across * count * (1 + compensated))
    return _expand(fragment, (fragment, *[types.int64] * 6), body)


@cache
def store_vector(dtype, count, wide):
    """(address, index, fragment): stores neighbouring elements in one access, each rounded once to dtype."""
    return _expand(types.none, (types.int64, types.int64, _fragment_type(wide, count)),
                   lambda builder, address, index, fragment: _store_global(
                       builder, address, index, dtype, _narrowed(builder, _unpack(builder, fragment), wide, dtype)))


@cache
def load_each(dtype, count, wide):
    """(address, index, step, left) -> elements at index, index + step, ...: the first `left`, zeros for the others."""

    def body(builder, address, index, step, left):
        values = []
        for element in range(count):
            wanted = builder.icmp_signed("<", ir.Constant(_INT64, element), left)
            values += _load_global(builder, address, index, dtype, 1, wanted)
            index = builder.add(index, step)
        return _pack(builder, _widened(builder, values, dtype, wide))

    return _expand(_fragment_type(wide, count), (types.int64, types.int64, types.int64, types.int64), body)


@cache
def store_each(dtype, count, wide):
    """(address, index, step, left, fragment): stores the first `left` elements at index, index + step, ..."""

    def body(builder, address, index, step, left, fragment):
        for element, value in enumerate(_unpack(builder, fragment)):
            with builder.if_then(builder.icmp_signed("<", ir.Constant(_INT64, element), left)):
                _store_global(builder, address, index, dtype, _narrowed(builder, [value], wide, dtype))
            index = builder.add(index, step)

    return _expand(types.none, (types.int64, types.int64, types.int64, types.int64, _fragment_type(wide, count)), body)


@cache
def load_pieces(dtype, width, offsets, wide):
    """(address, index, stride, left) -> pieces of `width` neighbouring elements, at offset * stride from the index.

    Only pieces whose offset is less than `left` are touched, the others are zeros. The stride is 1 where width is not.
    """

    def body(builder, address, index, stride, left):
        values = []
        for place, inside in _pieces(builder, index, stride, left, offsets):
            values += _widened(builder, _load_global(builder, address, place, dtype, width, inside), dtype, wide)
        return _pack(builder, values)

    return _expand(_fragment_type(wide, width * len(offsets)), (types.int64,) * 4, body)


@cache
def store_pieces(dtype, width, offsets, wide):
    """(address, index, stride, left, fragment): stores what load_pieces would load, each element rounded once."""

    def body(builder, address, index, stride, left, fragment):
        values = _narrowed(builder, _unpack(builder, fragment), wide, dtype)
        for piece, (place, inside) in enumerate(_pieces(builder, index, stride, left, offsets)):
            with builder.if_then(inside):
                _store_global(builder, address, place, dtype, values[piece * width:(piece + 1) * width])

    return _expand(types.none, (*(types.int64,) * 4, _fragment_type(wide, width * len(offsets))), body)


@cache
def load_integers(dtype, offsets):
    """(address, index, stride, left, absent) -> as load_pieces of single integers or truth values, as 64-bit integers.

    Those that are not touched are `absent`.
    """
    suffix, letter, kind = {"bool": ("u8", "h", _INT16), "int32": ("b32", "r", _INT32),
                            "int64": ("b64", "l", _INT64)}[dtype]
    item = ir.Constant(_INT64, 1 if dtype == "bool" else kind.width // 8)
    function = ir.FunctionType(kind, [_INT64, _INT32])
    code = (f"{{ .reg .pred wanted; setp.ne.b32 wanted, $2, 0; mov.b{kind.width} $0, 0; "
            f"@wanted ld.global.{suffix} $0, [$1]; }}")

    def body(builder, address, index, stride, left, absent):
        values = []
        for place, inside in _pieces(builder, index, stride, left, offsets):
            pointer = builder.add(address, builder.mul(place, item))
            loaded = builder.asm(function, code, f"=&{letter},l,r", [pointer, builder.zext(inside, _INT32)],
                                 side_effect=True)
            value = loaded if kind == _INT64 else builder.sext(loaded, _INT64)
            values.append(builder.select(inside, value, absent))
        return _pack(builder, values)

    return _expand(types.UniTuple(types.int64, len(offsets)), (types.int64,) * 5, body)


def _pieces(builder, index, stride, left, offsets):
    """(index, whether it is touched) of each piece."""
    for offset in offsets:
        distance = ir.Constant(_INT64, offset)
        yield builder.add(index, builder.mul(distance, stride)), builder.icmp_signed("<", distance, left)


# -- shared memory


@cache
def shared_array(name, dtype, size):
    """() -> the block's array of this name, aligned to 16 bytes."""

    def body(builder):
        unique = f"densegrad_{name}_{dtype}_{size}"
        module = builder.module
        array = module.globals.get(unique)
        if array is None:
            array = ir.GlobalVariable(module, ir.ArrayType(_STORED[dtype], size), unique, addrspace=_SHARED)
            array.linkage, array.align = "internal", 16
            array.initializer = ir.Constant(array.value_type, ir.Undefined)
        return builder.ptrtoint(array, _INT32)

    return _expand(types.int32, (), body)


@cache
def load_shared(dtype, count):
    """(array, index) -> count neighbouring elements as a fragment, in one access."""
    return _expand(_fragment_type(dtype, count), (types.int32, types.int32), lambda builder, array, index: _pack(
        builder, _load_shared(builder, _shared_pointer(builder, array, index, dtype), dtype, count)))


@cache
def store_shared(dtype, count):
    """(array, index, fragment): stores neighbouring elements in one access."""
    return _expand(types.none, (types.int32, types.int32, _fragment_type(dtype, count)),
                   lambda builder, array, index, fragment: _store_shared(
                       builder, _shared_pointer(builder, array, index, dtype), dtype, _unpack(builder, fragment)))


@cache
def add_shared(dtype, count, compensated=False, lost=0):
    """(sums of one column, array, index, step) -> sums plus the cells at index, index + step, ..., in that order.

    If compensated, each of them is followed by what was lost, `lost` cells further. A step that is known when the
    kernel is compiled takes no registers.
    """

    def body(builder, sums, array, index, step):
        totals, start = _unpack(builder, sums), _shared_pointer(builder, array, index, dtype)
        for cell in range(count):
            place = builder.mul(step, ir.Constant(_INT32, cell))
            for offset in (0, lost) if compensated else (0,):
                pointer = start
                for distance in (place, ir.Constant(_INT32, offset)):
                    pointer = builder.gep(pointer, [distance], inbounds=True, source_etype=_STORED[dtype])
                totals = _plus(builder, totals, _load_shared(builder, pointer, dtype, 1), compensated)
        return _pack(builder, totals)

    fragment = _fragment_type(dtype, 1 + compensated)
    return _expand(fragment, (fragment, types.int32, types.int32, types.int32), body)


@cache
def store_spread(dtype, count, across, spacing):
    """(array, index, fragment, thread): stores `across` vectors of count elements, `spacing` apart.

    At most 16 bytes are stored at once. Where a vector takes two of them, every second group of four threads begins
    with the upper one: the threads that are served together then meet all banks, though their vectors lie 32 bytes
    apart.
    """
    width = 16 // ITEM_BYTES[dtype]

    def body(builder, array, index, fragment, thread):
        values = _unpack(builder, fragment)
        upper = builder.trunc(builder.lshr(thread, ir.Constant(_INT32, 2)), ir.IntType(1))
        for vector in range(across):
            start = builder.add(index, ir.Constant(_INT32, vector * spacing))
            part = values[vector * count:(vector + 1) * count]
            if count <= width:
                _store_shared(builder, _shared_pointer(builder, array, start, dtype), dtype, part)
                continue
            for first in (upper, builder.not_(upper)):
                place = builder.add(start, builder.select(first, ir.Constant(_INT32, width), ir.Constant(_INT32, 0)))
                halves = zip(part[:width], part[width:], strict=True)
                chosen = [builder.select(first, high, low) for low, high in halves]
                _store_shared(builder, _shared_pointer(builder, array, place, dtype), dtype, chosen)

    return _expand(types.none, (types.int32, types.int32, _fragment_type(dtype, across * count), types.int32), body)
