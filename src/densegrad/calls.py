"""A call: its arrays are looked at, its launches found, filled in and launched, and its results handed over.

    arrays, options --described, once a layout--> Recipe --filled in--> launches on the device --> results

Describing checks everything and works out the launches; what it gives is kept by the shapes, strides, dtypes and
alignments of the arrays, by the options and by the table of tuned plans that is active. A later call of that layout
checks only what depends on addresses and values: that nothing overlaps, numbers, labels. Copies before and after the
launches, and what waits for other streams, stand here alone. A prepared call is one that is filled in and not yet
launched.
"""
from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

from . import containers, device, tuned
from .device import Seen
from .errors import DeviceError, DTypeError, OutError, PrepareError, ShapeError
from .facts import accumulator_of
from .launches import Clear, Launch, workspace_bytes
from .operands import (
    LARGEST,
    Argument,
    Inputs,
    Target,
    accept_integer,
    accept_number,
    alpha_type,
    check_kind,
    cure_of_read_only,
    extent,
    overlap,
)

#: how many layouts of calls are kept; when another is met, the one that was described first leaves
MOST_LAYOUTS = 4096


class Given(NamedTuple):
    """An array of the call that kernels read, by its position; copied if they cannot read it where it is."""

    slot: str
    position: int
    copied: bool


class Made(NamedTuple):
    """A result: written to the `out` at this position, to a copy of that which is copied back, or to a new array."""

    slot: str
    position: int
    shape: tuple[int, ...]
    dtype: str
    features_first: bool
    given: bool
    copied: bool
    accumulate: bool


class Number(NamedTuple):
    """A number that a call fills in: its slot, what the user calls it, empty where it means nothing, and its type."""

    slot: str
    name: str
    dtype: str


@dataclass(frozen=True)
class Recipe:
    """What every call of one layout does."""

    launches: tuple[Launch | Clear, ...]
    given: tuple[Given, ...]
    made: tuple[Made, ...]
    numbers: tuple[Number, ...]
    place: str
    accumulator: str  # of the sums, and of an alpha on the device
    like: int  # the position of the array whose kind of container new results have
    kind: containers.Kind  # of that array
    spans: tuple[tuple[int, int] | None, ...] = ()  # of arrays, then of outs: bytes from the address that they take up
    in_place: tuple[tuple[int, int], ...] = ()  # (out, array) that may be one and the same
    check_values: Callable[[tuple, tuple], None] | None = None  # of arrays on the host, by the arrays and numbers

    @property
    def copied(self) -> list[str]:
        """The arrays that are copied before or after the launches."""
        return [one.slot for one in self.given if one.copied] + [one.slot for one in self.made if one.copied]

    @property
    def workspace_bytes(self) -> int:
        """Memory that the launches share, beside arguments and results."""
        return workspace_bytes(self.launches)


def recipe_of(inputs: Inputs, given: Sequence[Argument | None], targets: Sequence[Target | None],
              launches: tuple[Launch | Clear, ...], numbers: Sequence[tuple[str, str]] = ()) -> Recipe:
    """The recipe of checked arrays and results, by their positions in the call.

    Beside alpha, numbers are pairs of a slot, "parameter" or "ignored", and what the user calls it.
    """
    accumulator = accumulator_of(inputs.dtype)
    made = [target for target in targets if target is not None]
    types = {"parameter": accumulator, "ignored": "int64"}
    return Recipe(
        launches,
        tuple(Given(argument.name, position, argument.compact) for position, argument in enumerate(given)
              if argument is not None),
        tuple(_made(target, position) for position, target in enumerate(targets) if target is not None),
        (Number("alpha", "alpha", alpha_type(inputs, made)),
         *(Number(slot, name, types[slot]) for slot, name in numbers)),
        inputs.place, accumulator, like=next(n for n, argument in enumerate(given) if argument is inputs.dz),
        kind=containers.kind_of(inputs.dz.array),
        spans=tuple(_span(argument) for argument in [*given, *(None if target is None else target.argument
                                                         for target in targets)]))


def _made(target: Target, position: int) -> Made:
    argument = target.argument
    return Made(target.name, position, target.shape, target.dtype, target.features_first, argument is not None,
                argument is not None and argument.compact, target.accumulate)


def _span(argument: Argument | None) -> tuple[int, int] | None:
    """The bytes that an array takes up, from its first element."""
    if argument is None or 0 in argument.memory.shape:
        return None
    begin, end = extent(argument.memory)
    return begin - argument.memory.byte, end - argument.memory.byte


class _Kept(NamedTuple):
    """A recipe whose launches are loaded, with what every call of the layout asks it for."""

    where: Any  # the device with the memory and the streams of the library that the results are of
    recipe: Recipe
    loaded: tuple[Any, ...]
    needs_memory: bool
    as_they_are: bool  # whether nothing is copied, results are handed over as they were made, and no guest is there
    guests: bool  # whether arrays are those of libraries that free them whatever is queued on a stream
    watches: bool  # whether an out was given, which may overlap something
    in_place: tuple[tuple[str, int], ...]  # slots of arrays, then of outs, that are used where they lie; positions
    new: tuple[tuple[str, int, device.Maker], ...]  # slots of new arrays, positions of the results, what makes them
    workspace: device.Maker | None
    ranges: tuple[tuple[str, float], ...]  # slot of each number, and the largest float that needs no closer look


_kept: OrderedDict[Any, _Kept] = OrderedDict()
_keeping = threading.Lock()
_record: ContextVar[list[Launch] | None] = ContextVar("densegrad_launches", default=None)
_preparing: ContextVar[list[Bound] | None] = ContextVar("densegrad_preparing", default=None)


@contextmanager
def _collected(variable: ContextVar[list[Any] | None]) -> Iterator[list[Any]]:
    """A new list in the variable for as long as the with block lasts."""
    collected: list[Any] = []
    token = variable.set(collected)
    try:
        yield collected
    finally:
        variable.reset(token)


def recorded() -> AbstractContextManager[list[Launch]]:
    """A list that receives every launch made in the with block."""
    return _collected(_record)


def call(describe: Callable[..., Recipe], arrays: tuple, outs: tuple, options: tuple, numbers: tuple,
         stream: Any = None) -> list[Any]:
    """The results of a call, one for each out: None where none is made.

    `describe(arrays, outs, options)` checks everything but the numbers, those of its recipe, and says what a call of
    this layout does.
    """
    where = device.current()
    look = where.seen
    seen = [None if array is None else look(array) or Seen((object(),), 0) for array in arrays + outs]
    key: Any = (where, describe, tuned.active(), options, *map(type, options),
                *[None if one is None else one.layout for one in seen])
    try:
        kept = _kept.get(key)
    except TypeError:  # an option that has no hash: describing refuses it, or each call describes anew
        key = kept = None
    if kept is None:
        guests = _taken_over(where, (arrays, outs, numbers), stream)
        if guests is not None:
            arrays, outs, numbers = guests
            return [containers.given_back(one) for one in call(describe, arrays, outs, options, numbers, stream)]
    if kept is None or (kept.watches and not _as_described(kept.recipe, arrays, seen)):
        recipe = describe(arrays, outs, options)
        kept = _described(key, recipe, (arrays, outs), numbers)
    where, recipe, values = kept.where, kept.recipe, {}
    for position, (slot, largest) in enumerate(kept.ranges):
        value = numbers[position]
        if type(value) is not float or not -largest <= value <= largest:
            value = _checked(where, recipe, recipe.numbers[position], value)
        values[slot] = value
    if type(values["alpha"]) is float:
        values["alpha_address"] = 0
    else:
        _check_apart(where, "alpha", values["alpha"], recipe, outs)
    if recipe.check_values is not None:
        recipe.check_values(arrays, numbers)
    if kept.guests:
        return _beside_guests(kept, (arrays, outs, seen), values, stream, (describe, options))
    pointer = where.current_stream(recipe.place) if stream is None else None
    if pointer is not None:
        return _finished(kept, (arrays, outs, seen), values, pointer, (describe, options))
    with where.using(stream, recipe.place) as pointer:
        return _finished(kept, (arrays, outs, seen), values, pointer, (describe, options))


def _taken_over(where: Any, operands: tuple[tuple, ...], stream: Any) -> list[tuple] | None:
    """The same with what DLPack hands over for use on the stream, or None if there is nothing of that kind."""
    if stream is not None:
        where.pointer(stream)
    taken = [tuple(where.taken_over(one, stream) for one in group) for group in operands]
    changed = any(one is not other for now, then in zip(taken, operands, strict=True)
                  for one, other in zip(now, then, strict=True))
    return taken if changed else None


def _beside_guests(kept: _Kept, operands: tuple[tuple, tuple, list[Any]], values: dict[str, Any], stream: Any,
                   described: tuple[Callable[..., Recipe], tuple]) -> list[Any]:
    """The results of a call of guests, queued on the stream that the interface names, unless another is asked for.

    All streams that come in, and the current one if that is another, wait for what is queued.
    """
    where, place, seen = kept.where, kept.recipe.place, operands[2]
    streams = {one.stream for one in seen if one is not None and one.stream is not None}
    with where.using(None, place) as current:
        if stream is None:
            streams.add(current)
            stream = seen[kept.recipe.like].stream
        with where.using(stream, place) as pointer:
            results = _finished(kept, operands, values, pointer, described)
            if _preparing.get() is None:
                where.settle((operands, values), streams - {pointer}, pointer)
    return results


def _finished(kept: _Kept, operands: tuple[tuple, tuple, list[Any]], values: dict[str, Any], stream: int,
              described: tuple[Callable[..., Recipe], tuple]) -> list[Any]:
    """The results of a call that has been launched, or that is only being prepared."""
    preparing = _preparing.get()
    if preparing is not None and kept.guests and not all(made.given for made in kept.recipe.made):
        kind = containers.kind_of(operands[0][kept.recipe.like])
        if not kind.stays:
            raise PrepareError(f"a prepared call writes its results anew each time, which arrays of {kind.name} need "
                               f"not show (pass {'out=, or ' * kind.written}arrays of NumPy or CuPy)")
    if preparing is not None and kept.recipe.copied:
        raise PrepareError(f"{kept.recipe.copied[0]} would have to be copied at each call: it lies on the host, or no "
                           "axis of it is contiguous (pass an array on the device, for example "
                           "cupy.ascontiguousarray(...))")
    if kept.needs_memory and kept.where.capturing(stream):
        raise PrepareError("a call that needs memory of its own cannot be captured, since a replay would write where "
                           "that memory was (prepare it before the capture: densegrad.prepare(function, ...), and call "
                           "what that gives)")
    if preparing is None and kept.as_they_are and type(values["alpha"]) is float:  # most calls: nothing to hold
        results = _filled(kept, operands, values, stream)
        if kept.workspace is not None:
            workspace = kept.workspace()  # which lives until all is queued
            values["workspace"] = workspace[1]
        _launch(kept, values, stream)
        return results
    bound = Bound(kept, operands, values, stream)
    if preparing is None:
        bound.put_workspace(None)
        _launch(kept, values, stream)
    else:
        describe, options = described
        bound.describe = lambda arrays, outs: describe(arrays, outs, options)
        bound.asked = tuple(bound.seen)
        bound.hold["stream"] = bound.where.stream_in_use()
        preparing.append(bound)
    return bound.delivered()


def _filled(kept: _Kept, operands: tuple[tuple, tuple, list[Any]], values: dict[str, Any], stream: int) -> list[Any]:
    """Fill in where arrays lie that are used as they are, and new ones; the outs and these, by their positions."""
    arrays, outs, seen = operands
    where = kept.where
    as_seen = where.argument is None
    for slot, position in kept.in_place:
        one = seen[position]
        if as_seen and one.stream is None:
            values[slot] = one.address
        else:
            values[slot] = _address(where, (arrays + outs)[position], one, stream)
    results = [*outs]
    for slot, position, make in kept.new:
        results[position], values[slot] = make()
    return results


def _address(where: Any, array: Any, seen: Seen, stream: int) -> Any:
    """Where an array lies, for kernels on this stream."""
    if seen.stream is not None:
        where.wait_for(seen, stream)
    return seen.address if where.argument is None else where.argument(array, seen)


def _launch(kept: _Kept, values: dict[str, Any], stream: int) -> None:
    """Queue every launch on the stream."""
    for loaded in kept.loaded:
        loaded(values, stream)
    record = _record.get()
    if record is not None:
        record += [one for one in kept.recipe.launches if isinstance(one, Launch)]


def _checked(where: Any, recipe: Recipe, number: Number, value: Any) -> Any:
    """A number in the range of its type; alpha may be an array on the device."""
    slot, name, dtype = number
    if dtype == "int64":
        return accept_integer(name, value)
    if type(value) is float and -LARGEST[dtype] <= value <= LARGEST[dtype]:
        return value
    memory = where.number_memory(value, recipe.accumulator) if slot == "alpha" else None
    if memory is None:
        return accept_number(name, value, dtype)
    check_alpha_memory(memory, recipe.accumulator, recipe.place)
    if containers.kind_of(value).name != "NumPy":  # whose arrays of no dimensions are numbers everywhere
        check_kind(name, value, "the inputs", recipe.kind)
    return value


def _check_apart(where: Any, name: str, array: Any, recipe: Recipe, outs: tuple) -> None:
    """Hold an array that launches read while they write, by its name, apart from the outs.

    Raises
    ------
    OutError
        If one of them overlaps it.
    """
    memory = where.memory(array)
    for made in recipe.made:
        if made.given and overlap(memory, where.memory(outs[made.position])):
            raise OutError(f"{made.slot} overlaps {name} in memory (pass another array)")


def _as_described(recipe: Recipe, arrays: tuple, seen: list[Any]) -> bool:
    """Whether the outs overlap nothing; where they may, describing looks closely."""
    spans, count = recipe.spans, len(arrays)
    for out in range(count, len(seen)):
        if spans[out] is None or seen[out] is None:
            continue
        begin, end = spans[out] or (0, 0)
        address = seen[out].address
        for other in range(out):
            one = spans[other]
            if one is not None and address + begin < seen[other].address + one[1] and (
                    seen[other].address + one[0] < address + end):
                same = (out - count, other) in recipe.in_place and address == seen[other].address
                if not (same and seen[out].layout == seen[other].layout):
                    return False
    return True


def _described(key: Any, recipe: Recipe, operands: tuple[tuple, tuple], numbers: tuple) -> _Kept:
    """A recipe, its values checked before its kernels are compiled, and kept for later calls unless it has no key."""
    arrays, outs = operands
    like = arrays[recipe.like]
    where = device.current().serving(like)
    for number, value in zip(recipe.numbers, numbers, strict=True):
        _checked(where, recipe, number, value)
    guests = any(containers.kind_of(one).guest for one in (*arrays, *outs))
    with where.using(None, recipe.place):
        loaded = where.loaded(recipe.launches, recipe.place)
    kept = _Kept(
        where, recipe, loaded,
        needs_memory=bool(recipe.workspace_bytes or recipe.copied),
        as_they_are=not recipe.copied and where.hands_over(like) and not guests,
        guests=guests,
        watches=any(made.given for made in recipe.made),
        in_place=tuple([(one.slot, one.position) for one in recipe.given if not one.copied]
                       + [(made.slot, len(arrays) + made.position) for made in recipe.made
                          if made.given and not made.copied]),
        new=tuple((made.slot, made.position, where.maker(made.shape, made.dtype,
                                                         made.features_first and not made.given))
                  for made in recipe.made if not made.given or (made.copied and not made.accumulate)),
        workspace=where.workspace(recipe.workspace_bytes) if recipe.workspace_bytes else None,
        ranges=tuple((number.slot, LARGEST.get(number.dtype, -1.0)) for number in recipe.numbers))
    if key is not None:
        with _keeping:
            _kept[key] = kept
            if len(_kept) > MOST_LAYOUTS:
                _kept.popitem(last=False)
    return kept


def as_prepared() -> AbstractContextManager[list[Bound]]:
    """A list that receives every call made in the with block, which is filled in and not launched."""
    return _collected(_preparing)


def is_preparing() -> bool:
    """Whether calls are only being prepared."""
    return _preparing.get() is not None


class Bound:
    """One call whose slots are filled in."""

    __slots__ = ("arrays", "asked", "describe", "hold", "kept", "outs", "recipe", "results", "seen", "stream", "values",
                 "where")

    describe: Callable[[tuple, tuple], Recipe]
    asked: tuple[Any, ...]  # what was seen of the arrays that the launches are for

    def __init__(self, kept: _Kept, operands: tuple[tuple, tuple, list[Any]], values: dict[str, Any], stream: int):
        recipe = kept.recipe
        self.where, self.kept, self.recipe, self.stream = kept.where, kept, recipe, stream
        self.arrays, self.outs, self.seen = operands
        self.values = values
        self.hold: dict[str, Any] = {}  # what only this call keeps alive
        if type(values["alpha"]) is not float:
            self.put_number("alpha", values["alpha"])
        self.results: list[Any] = _filled(kept, operands, values, stream)
        for slot, position, copied in recipe.given:
            if copied:
                self.hold[slot] = self.put_copy(slot, self.arrays[position], self.seen[position])
        for made in recipe.made:
            if made.copied and made.accumulate:
                self.results[made.position] = self.put_copy(made.slot, self.outs[made.position],
                                                            self.seen[len(self.arrays) + made.position])

    def put_number(self, slot: str, value: Any) -> None:
        """Fill a checked number in; an alpha on the device by its address."""
        values = self.values
        values[slot] = value
        if slot == "alpha":
            values["alpha_address"] = 0
            self.hold.pop(slot, None)
            if type(value) is not float:
                self.where.wait_for(self.where.seen(value), self.stream)
                values[slot], values["alpha_address"] = 1.0, self.where.address(value)
                self.hold[slot] = value

    def put_copy(self, slot: str, array: Any, seen: Seen) -> Any:
        """Fill in an array's copy where kernels can read it."""
        if seen.stream is not None:
            self.where.wait_for(seen, self.stream)
        copy = self.where.placed(array, True)
        self.values[slot] = self.where.address(copy)
        return copy

    def put_workspace(self, workspace: Any) -> None:
        """Fill in this workspace, or a new one."""
        if self.kept.workspace is not None:
            self.hold["workspace"], self.values["workspace"] = self.kept.workspace() if workspace is None else (
                workspace, self.where.workspace_address(workspace))

    def launch(self, stream: int) -> None:
        """Queue every launch on the stream."""
        _launch(self.kept, self.values, stream)

    def delivered(self) -> list[Any]:
        """The results by their positions, in the containers that the user gave or expects."""
        results = self.results
        for made in self.recipe.made:
            position = made.position
            if made.copied:
                out = self.outs[position]
                host = containers.host_array(out)
                host[...] = self.where.deliver(results[position], host)
                results[position] = out
            elif not made.given:
                results[position] = self.where.deliver(results[position], self.arrays[self.recipe.like])
        return results

    def rebind(self, changes: dict[str, Any]) -> None:
        """Fill other arrays of the same layout and other numbers in, by the names that the user has for them."""
        changes = {name: self.where.taken_over(value, self.stream) for name, value in changes.items()}
        recipe, first_out = self.recipe, len(self.arrays)
        operands, seen = [*self.arrays, *self.outs], list(self.seen)
        places = {one.slot: one.position for one in recipe.given} | {
            one.slot: first_out + one.position for one in recipe.made if one.given}
        numbers = {number.name: number for number in recipe.numbers if number.name}
        self._check_names(changes, [*places, *numbers])
        values = {numbers[name].slot: _checked(self.where, recipe, numbers[name], value)
                  for name, value in changes.items() if name in numbers}
        for name in changes.keys() & places.keys():
            position = places[name]
            seen[position] = self._seen_anew(name, changes[name], position, position >= first_out)
            operands[position] = changes[name]
        arrays, outs = tuple(operands[:first_out]), tuple(operands[first_out:])
        if not _as_described(recipe, arrays, seen):
            self.describe(arrays, outs)
        alpha = values.get("alpha", self.hold.get("alpha", 1.0))
        if type(alpha) is not float:
            _check_apart(self.where, "alpha", alpha, recipe, outs)
        self._check_apart_from_results({name: value for name, value in changes.items() if name in places}
                                       | ({} if type(alpha) is float else {"alpha": alpha}))
        if recipe.check_values is not None:
            now = {**self.values, **values}
            recipe.check_values(arrays, tuple(now[number.slot] for number in recipe.numbers))
        if "workspace" in self.hold:
            self.check_workspace(self.hold["workspace"], [*operands, None if type(alpha) is float else alpha])
        self.arrays, self.outs, self.seen = arrays, outs, seen
        for slot, value in values.items():
            self.put_number(slot, value)
        for name in changes.keys() & places.keys():
            self.values[name] = _address(self.where, operands[places[name]], seen[places[name]], self.stream)

    def _check_apart_from_results(self, arrays: dict[str, Any]) -> None:
        """Hold arrays apart from the results that the call allocated."""
        for made in self.recipe.made:
            for name, array in arrays.items():
                if not made.given and overlap(self.where.memory(self.results[made.position]), self.where.memory(array)):
                    raise OutError(f"{name} overlaps a result of this call in memory (pass another array)")

    def _check_names(self, changes: dict[str, Any], known: list[str]) -> None:
        made = {one.slot for one in self.recipe.made}
        for name in changes:
            if name in made and name not in known:
                raise PrepareError(f"{name} cannot be bound anew, since the call was prepared without it (pass it to "
                                   "prepare)")
            if name not in known:
                names = dict.fromkeys(one.partition(".")[0] for one in known)
                raise PrepareError(f"this call has no {name} that can be bound anew; it has {', '.join(names)}")

    def _seen_anew(self, name: str, array: Any, position: int, is_out: bool) -> Seen:
        """What is seen of an array in the place of one that the call was prepared for."""
        found, needed = self.where.seen(array), self.asked[position]
        memory = None if found is None else self.where.memory(array)
        if is_out and memory is not None and memory.readonly:
            raise OutError(f"{name} is read-only ({cure_of_read_only(array)})")
        if found is None or not found.fits(needed):
            got = f"{type(array).__name__}" if found is None else f"{found}"
            raise PrepareError(f"{name} must have the layout that the call was prepared for, {needed}; got {got} "
                               "(prepare another call for it)")
        return found

    def check_workspace(self, workspace: Any, operands: Iterable[Any]) -> None:
        """Hold a workspace apart from all that is read or written beside it.

        Raises
        ------
        PrepareError
            If it overlaps one of the operands, or an alpha on the device.
        """
        memory = self.where.memory(workspace)
        for array in [*operands, *self.results, self.hold.get("alpha")]:
            if array is not None and overlap(memory, self.where.memory(array)):
                raise PrepareError("workspace overlaps an array of the call in memory (pass memory of its own)")


def check_alpha_memory(memory: device.Memory, accumulator: str, place: str) -> None:
    """Hold an alpha on the device to what kernels read.

    Raises
    ------
    ShapeError, DTypeError, DeviceError
        If it is not one number of the type of the sums, aligned, where the inputs are.
    """
    if memory.shape not in ((), (1,)):
        raise ShapeError(f"alpha must be a number, or an array of one number; got shape {memory.shape}")
    if memory.dtype != accumulator:
        raise DTypeError(f"alpha on the device must have the type of the sums, {accumulator}; got {memory.dtype} "
                         f"(convert it with alpha.astype({accumulator!r}))")
    if memory.byte % memory.dtype.itemsize:
        raise ShapeError(f"alpha must begin at a multiple of its {memory.dtype.itemsize} bytes; got one at byte "
                         f"{memory.byte} (pass alpha.copy())")
    if memory.place != place:
        raise DeviceError(f"alpha must lie where the inputs do, on {place}; it is on {memory.place}")
