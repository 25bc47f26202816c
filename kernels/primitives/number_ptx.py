"""What happens to numbers between memory and sums, as LLVM: formulas on the compiler's values, weights, exp."""
from math import e, log2

from llvmlite import ir
from numba import types

from ...activations import ENTRIES
from . import formulas
from .factories import cache
from .ptx import _FLOAT, _INT32, _NUMBA, _expand, _fragment_type, _from_8_0, _narrowed, _pack, _unpack, _widened


class _Number:
    """A float of the compiler's, with Python's operators; a plain number beside it is a constant of its type."""

    def __init__(self, builder, value):
        self.builder, self.value = builder, value

    def _with(self, operation, left, right):
        left, right = ((side.value if isinstance(side, _Number) else ir.Constant(self.value.type, side))
                       for side in (left, right))
        return _Number(self.builder, operation(left, right))

    def __add__(self, other):
        return self._with(self.builder.fadd, self, other)

    def __radd__(self, other):
        return self._with(self.builder.fadd, other, self)

    def __sub__(self, other):
        return self._with(self.builder.fsub, self, other)

    def __rsub__(self, other):
        return self._with(self.builder.fsub, other, self)

    def __mul__(self, other):
        return self._with(self.builder.fmul, self, other)

    def __rmul__(self, other):
        return self._with(self.builder.fmul, other, self)

    def __truediv__(self, other):
        return self._with(self.builder.fdiv, self, other)

    def __rtruediv__(self, other):
        return self._with(self.builder.fdiv, other, self)

    def __neg__(self):
        # NVVM knows no fneg.
        return -0.0 - self

    def __abs__(self):
        return _Functions(self.builder).abs(self)

    def _compared(self, operator, other):
        return self._with(lambda left, right: self.builder.fcmp_ordered(operator, left, right), self, other).value

    def __lt__(self, other):
        return self._compared("<", other)

    def __le__(self, other):
        return self._compared("<=", other)

    def __gt__(self, other):
        return self._compared(">", other)

    def __ge__(self, other):
        return self._compared(">=", other)

    def __eq__(self, other):
        return self._compared("==", other)

    __hash__ = None


class _Functions:
    """The functions that formulas take of the compiler's values: libdevice's, and for half types approximations."""

    inf = float("inf")

    def __init__(self, builder, approximate=False):
        self.builder, self.approximate = builder, approximate

    def where(self, condition, left, right):
        number = left if isinstance(left, _Number) else right
        return number._with(lambda a, b: self.builder.select(condition, a, b), left, right)

    def minimum(self, number, limit):
        return self._bounded("min", number < limit, number, limit)

    def maximum(self, number, limit):
        return self._bounded("max", number > limit, number, limit)

    def _bounded(self, name, inside, number, limit):
        """What is not a number stays so, which before capability 8.0 takes more than an instruction."""
        if number.value.type == ir.FloatType() and _from_8_0():
            return number._with(lambda *both: self._instruction(f"{name}.NaN.f32", *both), number, limit)
        stays = self.builder.or_(inside, self.builder.fcmp_unordered("uno", number.value, number.value))
        return self.where(stays, number, limit)

    def inverse(self, number):
        """1 / number, off by 2 u if approximate."""
        if self.approximate:
            return _Number(self.builder, self._instruction("rcp.approx.ftz.f32", number.value))
        return 1 / number

    def exp(self, number):
        """exp(number), off by (4 + 2 |number|) u of it if approximate."""
        if self.approximate:
            return _Number(self.builder, self.power_of_two((number * log2(e)).value))
        return self._call("exp", number)

    def power_of_two(self, value):
        """2 to the value, approximately."""
        return self._instruction("ex2.approx.ftz.f32", value)

    def abs(self, number):
        return self._call("fabs", number)

    def log(self, number):
        return self._call("log", number)

    def erfc(self, number):
        return self._call("erfc", number)

    def _instruction(self, name, *values):
        parameters = ", ".join(f"${place}" for place in range(len(values) + 1))
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType()] * len(values))
        return self.builder.asm(kind, f"{name} {parameters};", ",".join(["=f"] + ["f"] * len(values)), values,
                                side_effect=False)

    def _call(self, name, number):
        kind = number.value.type
        name = f"__nv_{name}{'f' if kind == ir.FloatType() else ''}"
        function = self.builder.module.globals.get(name) or ir.Function(
            self.builder.module, ir.FunctionType(kind, [kind]), name)
        return _Number(self.builder, self.builder.call(function, [number.value]))


def _numbers(builder, fragment):
    return [_Number(builder, value) for value in _unpack(builder, fragment)]


def _pack_numbers(builder, numbers):
    return _pack(builder, [number.value for number in numbers])


def _spread(values, count):
    """One value for each element: the values, or the only one of them for all."""
    return values if len(values) == count else values * count


@cache
def rounded(dtype, wide, count):
    """(fragment of wide) -> the same values as memory of dtype would give them back."""
    fragment = _fragment_type(wide, count)
    return _expand(fragment, (fragment,), lambda builder, values: _pack(builder, _widened(
        builder, _narrowed(builder, _unpack(builder, values), wide, dtype), dtype, wide)))


@cache
def round_tf32(count):
    """(float32 fragment) -> the nearest numbers of tf32's 11 significant bits, ties away from zero."""
    fragment = _fragment_type("float32", count)

    def body(builder, values):
        rounded = [_round_tf32(builder, builder.bitcast(value, _INT32)) for value in _unpack(builder, values)]
        kept = [builder.and_(bits, ir.Constant(_INT32, 0xFFFFE000)) for bits in rounded]
        return _pack(builder, [builder.bitcast(bits, _FLOAT["float32"]) for bits in kept])

    return _expand(fragment, (fragment,), body)


def _round_tf32(builder, bits):
    """The nearest tf32, ties away from zero, in bits that mma uses: it drops the last 13.

    Half of the last kept place is added, which leaves infinity and NaN what they are. cvt.rna.tf32 takes an
    instruction more.
    """
    code = "{ .reg .b32 place; and.b32 place, $1, 0xff800000; fma.rn.f32 $0, place, 0f3a000000, $1; }"
    function = ir.FunctionType(_INT32, [_INT32])
    return builder.asm(function, code, "=r,r", [bits], side_effect=False)


@cache
def backward(activation, dtype, wide, count):
    """(gradient above an activation, its argument, parameter) -> the gradient below it, element by element, in wide."""
    fragment, formula = _fragment_type(wide, count), ENTRIES[activation].formula_of(dtype).backward

    def body(builder, gradients, z, parameter):
        parameter, number = _Number(builder, parameter), _Functions(builder, dtype in ("float16", "bfloat16"))
        pairs = zip(_numbers(builder, gradients), _numbers(builder, z), strict=True)
        return _pack_numbers(builder, [formula(number, gradient, argument, parameter) for gradient, argument in pairs])

    return _expand(fragment, (fragment, fragment, _NUMBA[wide]), body)


@cache
def weigh(dtype, count, samples):
    """(fragment, weights) -> their product; one weight for all, or one for each element."""
    fragment = _fragment_type(dtype, count)

    def body(builder, values, weights):
        spread = _spread(_unpack(builder, weights), count)
        return _pack(builder, [builder.fmul(value, weight)
                               for value, weight in zip(_unpack(builder, values), spread, strict=True)])

    return _expand(fragment, (fragment, _fragment_type(dtype, samples)), body)


@cache
def minus(dtype, count, samples):
    """(fragment, values) -> their difference; one value for all, or one for each element."""
    fragment = _fragment_type(dtype, count)

    def body(builder, left, right):
        spread = _spread(_unpack(builder, right), count)
        return _pack(builder, [builder.fsub(a, b) for a, b in zip(_unpack(builder, left), spread, strict=True)])

    return _expand(fragment, (fragment, _fragment_type(dtype, samples)), body)


@cache
def leave_out(dtype, count, samples):
    """(fragment, integers, integer) -> zeros where the integers are this one, whatever the fragment holds there."""
    fragment, none = _fragment_type(dtype, count), ir.Constant(_FLOAT[dtype], 0)

    def body(builder, values, integers, left_out):
        gone = _spread([builder.icmp_signed("==", one, left_out) for one in _unpack(builder, integers)], count)
        return _pack(builder, [builder.select(one, none, value)
                               for value, one in zip(_unpack(builder, values), gone, strict=True)])

    return _expand(fragment, (fragment, types.UniTuple(types.int64, samples), types.int64), body)


@cache
def no_exponentials(dtype):
    """() -> the state of a sum of exponentials to which nothing was added."""
    return _expand(_fragment_type(dtype, 2), (), lambda builder: _pack(
        builder, [ir.Constant(_FLOAT[dtype], -_Functions.inf), ir.Constant(_FLOAT[dtype], 0)]))


@cache
def add_exponentials(dtype, wide, count):
    """(state, fragment) -> the state of the sum with its exponentials, as exact as values of dtype need them."""
    state = _fragment_type(wide, 2)

    def body(builder, found, values):
        number = _Functions(builder, dtype in ("float16", "bfloat16"))
        return _pack_numbers(builder, formulas.add_exponentials(
            number, _numbers(builder, found), _numbers(builder, values)))

    return _expand(state, (state, _fragment_type(wide, count)), body)


@cache
def add_targets(dtype, wide, count):
    """(state, fragment, targets) -> the state of a row, as the formula says, with these values and their targets."""
    state, fragment = _fragment_type(wide, 4), _fragment_type(wide, count)

    def body(builder, found, values, targets):
        number = _Functions(builder, dtype in ("float16", "bfloat16"))
        return _pack_numbers(builder, formulas.add_targets(
            number, _numbers(builder, found), _numbers(builder, values), _numbers(builder, targets)))

    return _expand(state, (state, fragment, fragment), body)


@cache
def merge_targets(dtype):
    """(state, state) -> the state of both parts of a row."""
    state = _fragment_type(dtype, 4)

    def body(builder, left, right):
        return _pack_numbers(builder, formulas.merge_targets(
            _Functions(builder), _numbers(builder, left), _numbers(builder, right)))

    return _expand(state, (state, state), body)


@cache
def log_of_exponentials(dtype):
    """(state) -> the largest value, and the logarithm of the sum less it."""
    state = _fragment_type(dtype, 2)
    return _expand(state, (state,), lambda builder, values: _pack_numbers(
        builder, formulas.log_of_exponentials(_Functions(builder), _numbers(builder, values))))
