"""What every family needs: the size of grids, whole steps, the check of a user's plan, constants by name."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from functools import lru_cache, wraps
from typing import Any, TypeVar, cast

from ..errors import PlanError
from ..facts import SIZES, wide_of
from ..launches import Launch, Result
from ..signatures import Epilogue
from ..slips import meant, meant_capability

Record = TypeVar("Record", bound=tuple)
Maker = TypeVar("Maker", bound=Callable[..., Any])

#: the largest grid along y and z
GRID_Y = 65535


def constants_of(kind: type[Record], plan: Any, others: dict[str, Any]) -> Record:
    """A kernel's constants: those that have the names of others from there, the rest from the plan."""
    names = kind._fields  # type: ignore[attr-defined]
    return kind(**{name: others[name] if name in others else getattr(plan, name) for name in names})


def epilogue_of(result: Result, vector: int, accumulator: str) -> Epilogue:
    """What a kernel does with alpha times its sums, in accesses of at most vector elements and 16 bytes."""
    target = result.matrix
    access = target.access(min(vector, 16 // SIZES[target.dtype]))
    return Epilogue(target.dtype, access, wide_of(accumulator, target.dtype), result.accumulate)


def named(title: str, launches: Iterable[Launch]) -> Iterator[tuple[str, Launch]]:
    """(name, launch) of each: the kernel's name and the title."""
    return ((f"{launch.kernel}-{title}", launch) for launch in launches)


def check_plan(plan: Any, kind: type | tuple[type, ...], sizes: dict[str, Any], name: str = "plan") -> Any:
    """The plan that a user passed under this name, or None.

    Raises
    ------
    PlanError
        If it was made for other sizes than these.
    TypeError
        If it is no plan of this kind, or of one of these.
    """
    if plan is None:
        return None
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(plan, kinds):
        wanted = " or ".join(f"a{'n' * kind.__name__.startswith('U')} {kind.__name__}" for kind in kinds)
        raise TypeError(f"{name} must be {wanted}; got {type(plan).__name__}")
    for size, wanted in sizes.items():
        if getattr(plan, size) != wanted:
            given = ", ".join(f"{size} {wanted}" for size, wanted in sizes.items())
            raise PlanError(f"{name} was made for {size} {getattr(plan, size)}, but the inputs have {wanted} (make one "
                            f"for {given}, as the functions of densegrad.plans do)")
    return plan


def check_integers(plan: Any) -> None:
    """Hold the fields of a plan that count to ints: 2.0 equals 2, and so would the plans.

    Raises
    ------
    PlanError
        If one is something else.
    """
    for name in _counts(plan.__class__):
        value = getattr(plan, name)
        if type(value) is not int:
            raise PlanError(f"plan: {name} must be an int; got {value!r}")


@lru_cache(maxsize=64)
def _counts(kind: type) -> tuple[str, ...]:
    """The fields of such plans that count."""
    return tuple(field.name for field in fields(kind) if field.type == "int")


def check_positive(plan: Any, *sizes: str) -> None:
    """Hold the fields of a plan that count to at least 1, but for these, the sizes that it is made for.

    Raises
    ------
    PlanError
        If one is less.
    """
    for name in _counts(plan.__class__):
        if name not in sizes and getattr(plan, name) < 1:
            raise PlanError(f"plan: {name} must be at least 1; got {getattr(plan, name)}")


def check_sizes(**sizes: int) -> None:
    """Hold sizes to what they can be.

    Raises
    ------
    PlanError
        If one is negative or no int.
    """
    for name, size in sizes.items():
        if type(size) is not int or size < 0:
            raise PlanError(f"{name} must be an int, at least 0; got {size!r}")


def check_choice(name: str, value: str | None, choices: Iterable[str]) -> None:
    """Hold a name to those that there are.

    Raises
    ------
    PlanError
        If it is none of these.
    """
    if not isinstance(value, str) or value not in choices:
        raise PlanError(f"{name} must be one of {', '.join(choices)}; got {value!r}{meant(value, choices)}")


def check_capability(capability: tuple[int, int]) -> None:
    """Hold a compute capability to a tuple of two ints.

    Raises
    ------
    PlanError
        If it is none.
    """
    if not isinstance(capability, tuple) or [*map(type, capability)] != [int, int]:
        raise PlanError(f"capability must be a tuple of two ints, such as (9, 0); got {capability!r}"
                        f"{meant_capability(capability)}")


def remembered(make: Maker) -> Maker:
    """The function that makes a plan, which makes it once; arguments without a hash are left to it to refuse."""
    kept = lru_cache(maxsize=4096, typed=True)(make)

    @wraps(make)
    def made(*arguments: Any, **options: Any) -> Any:
        try:
            hash((arguments, *options.values()))
        except TypeError:
            return make(*arguments, **options)
        return kept(*arguments, **options)

    return cast(Maker, made)


def ceil_div(length: int, step: int) -> int:
    """How many steps cover the length."""
    return -(-length // step)


def power_of_two(number: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << (number - 1).bit_length()


def nth(number: int) -> str:
    """1st, 2nd, 3rd, 4th, ..."""
    return f"{number}{'th' if 10 < number % 100 < 20 else {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th')}"
