"""Tuned plans: a file of plans that were timed on a GPU, which calls take instead of what the model of costs chooses.

    file --read and checked whole--> Table --use_plans--> active, for the process or in a with block
    the model's plan for a call --instead_of--> the table's plan for the same, or the model's own

Nothing is active by itself. What is taken is part of what calls are kept by, so that none outlives its table.
"""
from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from math import inf
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from . import __version__
from .errors import PlanError
from .families.batch_sum import BatchSumPlan
from .families.cost import ORDERS
from .families.matmul_hopper import HopperPlan
from .families.matmul_simt import MatmulPlan
from .families.matmul_tensor_core import TensorCorePlan
from .families.matmul_thin import ThinPlan

log = logging.getLogger("densegrad")

#: of the file: it changes when a reader of the old one would go wrong
FORMAT = 1
#: the classes of plans that a file may hold, by their names
PLANS: dict[str, Any] = {kind.__name__: kind for kind in (
    BatchSumPlan, MatmulPlan, TensorCorePlan, HopperPlan, ThinPlan)}
#: what an entry's plan is for
PRODUCT, BATCH_SUM = "product", "batch sum"
#: how many calls of use_plans can be taken back by with blocks that have not begun yet
MOST_WAITING = 1024

#: a type, as the fields of plans and the objects of a file name it -> what it is called, and whether a value is of it
_TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "int": ("a whole number", lambda value: type(value) is int),
    "float": ("a number above 0", lambda value: type(value) in (int, float) and 0 < value < inf),
    "bool": ("true or false", lambda value: type(value) is bool),
    "str": ("a string", lambda value: type(value) is str),
    "str | None": ("a string or null", lambda value: value is None or type(value) is str),
    "tuple[int, int]": ("a list of two whole numbers",
                        lambda value: type(value) is list and [*map(type, value)] == [int, int]),
    "list": ("a list", lambda value: type(value) is list),
    "dict": ("an object", lambda value: type(value) is dict),
}
_HEADER = {"format": "int", "densegrad": "str", "gpu": "str", "compute_capability": "tuple[int, int]", "date": "str",
           "command": "str", "plans": "list"}
_ENTRY = {"operation": "str", "order": "str | None", "plan": "str", "fields": "dict", "microseconds": "float",
          "model_microseconds": "float"}


class Entry(NamedTuple):
    """A tuned plan, how the operands of its product lie, and what it and the model's choice were measured to take."""

    plan: Any
    order: str | None  # of ORDERS; None of a batch sum, whose plan says it
    microseconds: float
    model_microseconds: float


def question_of(plan: Any, order: str | None) -> tuple[tuple[Any, ...], tuple[str, str]]:
    """What a plan is an answer to: sizes and dtype, and in words how the operands lie and what is computed of them."""
    if isinstance(plan, BatchSumPlan):
        return ((plan.samples, plan.outputs, plan.dtype),
                (f"layout {plan.layout}", "compensated" if plan.compensated else "not compensated"))
    precision = "ieee" if plan.dtype == "float64" else plan.precision
    if isinstance(plan, ThinPlan) and plan.accumulator != plan.dtype:
        precision = None  # of half types, which are thin beside tensor cores alone
    return (plan.rows, plan.cols, plan.depth, plan.dtype), (f"order {order}", f"precision {precision}")


@dataclass(frozen=True, eq=False)
class Table:
    """The plans of a file, and the GPU and version that they were timed on."""

    name: str  # of the file
    densegrad: str
    gpu: str
    compute_capability: tuple[int, int]
    date: str
    command: str
    entries: tuple[Entry, ...]

    @cached_property
    def plans(self) -> dict[tuple[Any, ...], dict[tuple[str, str], Any]]:
        """The plans by both halves of the question."""
        found: dict[tuple[Any, ...], dict[tuple[str, str], Any]] = {}
        for entry in self.entries:
            sizes, how = question_of(entry.plan, entry.order)
            found.setdefault(sizes, {})[how] = entry.plan
        return found

    def instead_of(self, plan: Any, order: str | None, where: Any, place: str) -> Any:
        """The plan for what the model's choice answers, or that; the log says once what is not taken, and why."""
        own = _machine(self.densegrad, self.gpu, self.compute_capability)
        here = _machine(__version__, where.name_of(place), where.capability(place))
        if own != here:
            _say_once(f"{self.name}: nothing is taken from it, since it was tuned by {own}, and this is {here} (run "
                      "densegrad tune on this GPU)")
            return plan
        sizes, how = question_of(plan, order)
        tuned = self.plans.get(sizes, {})
        if how not in tuned:
            for other in tuned:
                _say_once(f"{self.name}: the plan for {' x '.join(map(str, sizes))}, {', '.join(other)}, is not taken "
                          f"for a call with {', '.join(how)}")
            return plan
        return tuned[how]

    def __str__(self) -> str:
        """The file's text: a line for each field and each plan."""
        header = {"format": FORMAT} | {name: getattr(self, name) for name in _HEADER if name not in ("format", "plans")}
        lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in header.items()]
        plans = ",\n".join(f"  {json.dumps(_written(entry))}" for entry in self.entries)
        return "{\n" + ",\n".join([*lines, f' "plans": [\n{plans}\n ]']) + "\n}\n"


def _machine(version: str, gpu: str, capability: tuple[int, int]) -> str:
    """What must agree for plans to be taken, in words."""
    return "densegrad {} on {}, compute capability {}.{}".format(version, gpu, *capability)


def _written(entry: Entry) -> dict[str, Any]:
    plan = entry.plan
    return dict(zip(_ENTRY, (
        _operation_of(plan), entry.order, type(plan).__name__,
        {field.name: getattr(plan, field.name) for field in fields(plan)}, round(entry.microseconds, 3),
        round(entry.model_microseconds, 3)), strict=True))


def _operation_of(plan: Any) -> str:
    return BATCH_SUM if isinstance(plan, BatchSumPlan) else PRODUCT


@lru_cache(maxsize=1024)
def _say_once(words: str) -> None:
    log.warning("%s", words)


def _refused(where: str, problem: str) -> PlanError:
    return PlanError(f"{where} {problem} (write the file anew with densegrad tune, or use another)")


def _held(where: str, value: Any, types: dict[str, str]) -> dict[str, Any]:
    """An object of the file that has these fields, of these types, and no others."""
    if type(value) is not dict:
        raise _refused(where, f"must be an object; got {value!r:.60}")
    missing, unknown = types.keys() - value.keys(), value.keys() - types.keys()
    if missing or unknown:
        problem = f"has no {min(missing)}" if missing else f"has {min(unknown)}, which means nothing here"
        raise _refused(where, f"must have the fields {', '.join(types)}, but {problem}")
    for name, kind in types.items():
        called, is_one = _TYPES[kind]
        if not is_one(value[name]):
            raise _refused(where, f"must have {called} as {name}; got {value[name]!r:.60}")
    return value


@lru_cache(maxsize=16)
def table_of(text: str, name: str) -> Table:
    """The table that a file's text is; equal texts give the same one, so that what calls keep stays of use.

    Raises
    ------
    PlanError
        If it is no such text, or has a plan that no kernel can carry out.
    """
    try:
        read = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _refused(name, f"must be a file of plans as JSON; it is not: {error}") from None
    if type(read) is dict and read.get("format", FORMAT) != FORMAT:
        raise _refused(name, f"must have format {FORMAT}, which this densegrad reads; got {read['format']!r:.60}")
    header = _held(name, read, _HEADER)
    capability = tuple(header["compute_capability"])
    entries = tuple(_entry(f"{name}: plan {number}", entry, capability)
                    for number, entry in enumerate(header["plans"], 1))
    questions = [question_of(entry.plan, entry.order) for entry in entries]
    for number, question in enumerate(questions, 1):
        if question in questions[:number - 1]:
            raise _refused(f"{name}: plan {number}", "must be the only one for its sizes and operands, but plan "
                           f"{questions.index(question) + 1} is for the same")
    return Table(name, header["densegrad"], header["gpu"], capability, header["date"], header["command"], entries)


def _entry(where: str, value: Any, capability: tuple[int, ...]) -> Entry:
    """One plan of the file; the GPU's compute capability is that of the header."""
    entry = _held(where, value, _ENTRY)
    if entry["plan"] not in PLANS:
        raise _refused(where, f"must be one of {', '.join(PLANS)}; got {entry['plan']!r:.60}")
    kind = PLANS[entry["plan"]]
    given = _held(f"{where}: fields", entry["fields"], {field.name: str(field.type) for field in fields(kind)})
    try:
        plan = kind(**{name: tuple(one) if type(one) is list else one for name, one in given.items()})
    except PlanError as error:
        raise _refused(where, f"must be a plan that a kernel can carry out; it is not: {error}") from error
    operation = _operation_of(plan)
    orders = (None,) if operation == BATCH_SUM else ORDERS
    if entry["operation"] != operation or entry["order"] not in orders:
        raise _refused(where, f"must have operation {operation!r} and order {' or '.join(map(json.dumps, orders))}, "
                       f"as a {entry['plan']}; got {entry['operation']!r:.60} and {entry['order']!r:.60}")
    needed = getattr(plan, "capability", capability)
    if needed > capability or (isinstance(plan, HopperPlan) and needed != capability):
        raise _refused(where, "must be made of instructions that the file's GPU has; got those of compute capability "
                       "{}.{}".format(*plan.capability))
    return Entry(plan, entry["order"], entry["microseconds"], entry["model_microseconds"])


class Asked(list[tuple[Any, str | None]]):
    """In the place of a table: what calls ask for, as the model's plan and the order; that plan is what they get.

    A list has no hash, so that each call asks.
    """

    def instead_of(self, plan: Any, order: str | None, where: Any, place: str) -> Any:
        """The same plan."""
        self.append((plan, order))
        return plan


#: calls of use_plans alone: the last of them counts
_process: tuple[use_plans, ...] = ()
_switching = threading.Lock()
#: whose with block it is, and its table, or None for none: the last of them counts, and before the process's
_within: ContextVar[tuple[Any, ...]] = ContextVar("densegrad_plans", default=())


def active() -> Any:
    """The table that calls of this thread take plans from, or None."""
    within = _within.get()
    if within:
        return within[-1][1]
    process = _process  # another thread may change it meanwhile
    return process[-1]._table if process else None


def instead_of(plan: Any, where: Any, place: str, order: str | None = None) -> Any:
    """The active table's plan instead of the model's for operands at this place of a device, or the model's."""
    table = active()
    return plan if table is None else table.instead_of(plan, order, where, place)


@contextmanager
def asked() -> Iterator[Asked]:
    """What calls ask for in the with block, in which no table is active."""
    within, questions = _within.get(), Asked()
    _within.set((*within, (questions, questions)))
    try:
        yield questions
    finally:
        _within.set(within)


class use_plans:
    """Take plans from a file that `densegrad tune` has written, where they fit, instead of those of the model.

        use_plans("plans.json")             # from now on, in the whole process
        with use_plans("plans.json"):       # in the block, by this thread alone
            dx, dw, db = dense_grads(x, w, dz)

    Parameters
    ----------
    path : str, path or None
        The file; with None the model's plans are back.

    Raises
    ------
    PlanError
        If the file cannot be read or is none of plans: nothing changes then. It names the file, the plan in it, what
        was expected, what came and the cure.
    TypeError
        If path is something else.

    Notes
    -----
    A plan is taken for a call of the same sizes, dtype, precision, and memory order of the operands, on a GPU of the
    same name and compute capability, by the version of densegrad that it was tuned with. What is not taken is said
    once on the log, `logging` "densegrad". `plan=` always wins. Prepared calls keep the plans that they were prepared
    with.

    **Bits may differ** from those of the model's plans, as the order of additions may, and from GPU to GPU, as files
    do; on every run with one file they are equal, and bounds of errors hold.

    Called alone it holds for all threads. A with block holds for the thread that it is in, or the asyncio task, and
    takes back what the call has done to the process: from the call until the block begins, a moment if they are one
    line, other threads take these plans too. When the block ends, what was active before it is active again.

    Examples
    --------
    >>> with use_plans(None):
    ...     bias_grad(numpy.ones((3, 2), dtype="float32"))
    array([3., 3.], dtype=float32)
    """

    def __init__(self, path: str | PathLike[str] | None) -> None:
        global _process
        self._table = None if path is None else _read(path)
        with _switching:
            _process = (*_process, self)[-MOST_WAITING:]

    def __enter__(self) -> use_plans:
        global _process
        with _switching:
            _process = tuple(one for one in _process if one is not self)
        _within.set((*_within.get(), (self, self._table)))
        return self

    def __exit__(self, *exception: object) -> None:
        # A generator may end its block after another one has begun: each takes back its own.
        within = _within.get()
        last = max((number for number, (owner, _) in enumerate(within) if owner is self), default=len(within))
        _within.set((*within[:last], *within[last + 1:]))


def _read(path: str | PathLike[str]) -> Table:
    if not isinstance(path, (str, PathLike)):
        raise TypeError(f"path must be that of a file of plans, or None; got {type(path).__name__}")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise _refused(str(path), f"must be a file of plans, but cannot be read: {why}") from error
    return table_of(text, str(path))

