"""Launches as values: which kernel runs, what it is made of, its grid and its arguments.

Pure: no device, no array, no compiler. What changes between calls of one layout is a `Slot`, or a `Room` in the call's
workspace; a call fills them in. The launches of a call follow one another on one stream.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from .facts import SIZES, number_of
from .signatures import MatrixAt, Scale

#: what the address of a workspace is a multiple of, in bytes
ALIGNMENT = 256
#: up to which alignments of operands are told apart: no kernel asks for more than a sector of memory
OPERAND_ALIGNMENT = 32
#: the widest access to memory, in bytes
WIDEST = 16


class Slot(NamedTuple):
    """What a call fills in: the address of an operand or a number, by name."""

    name: str


class Room(NamedTuple):
    """A piece of the call's workspace, which begins at a multiple of ALIGNMENT; a Clear makes it zeros beforehand."""

    offset: int  # bytes
    items: int
    dtype: str

    @property
    def end(self) -> int:
        """The byte of the workspace where the next room may begin."""
        # One without items has an address, too.
        return self.offset + max(-(-self.items * SIZES[self.dtype] // ALIGNMENT), 1) * ALIGNMENT


class TensorMap(NamedTuple):
    """A matrix, or several of one form behind each other, by which bulk copies find boxes of it in lines of 128 bytes.

    Its numbers follow from the address and are found when a call fills it in. Addresses and steps are multiples of 16
    bytes.
    """

    address: Slot | Room
    dtype: str  # "tfloat32" of float32 that is rounded to tf32 on the way
    lengths: tuple[int, ...]  # elements along each axis, the contiguous one first
    steps: tuple[int, ...]  # bytes from one index to the next, of all axes but the first
    box: tuple[int, ...]


#: what results are multiplied by: a number of the host's times, unless its address is 0, one on the device
ALPHA = Scale(Slot("alpha"), Slot("alpha_address"))
ONE = Scale(1.0, 0)


@dataclass(frozen=True)
class Matrix:
    """A matrix that launches read or write; strides count elements from the address of element (0, 0).

    `alignment` is a power of two that the address is known to be a multiple of.
    """

    address: Slot | Room | int
    dtype: str
    rows: int
    cols: int
    row_stride: int
    col_stride: int
    alignment: int = ALIGNMENT

    @property
    def T(self) -> Matrix:
        """The transposed matrix, in the same memory."""
        return Matrix(self.address, self.dtype, self.cols, self.rows, self.col_stride, self.row_stride,
                      alignment=self.alignment)

    @property
    def at(self) -> MatrixAt:
        """What a kernel takes of it."""
        return MatrixAt(self.address, self.row_stride, self.col_stride)

    @property
    def end(self) -> int:
        """The byte of the workspace where the next room may begin; 0 if the matrix lies elsewhere."""
        return self.address.end if isinstance(self.address, Room) else 0

    def access(self, most: int) -> int:
        """How many elements along the columns one access can take: a power of two, at most most."""
        if self.col_stride != 1:
            return 1
        size = SIZES[self.dtype]
        width = min(most, WIDEST // size)
        while width > 1 and (self.cols % width or (self.rows > 1 and self.row_stride % width)
                             or self.alignment % (width * size)):
            width //= 2
        return width


class Result(NamedTuple):
    """A matrix that is written to, and whether it is added to instead of overwritten."""

    matrix: Matrix
    accumulate: bool = False


def scratch(offset: int, rows: int, cols: int, dtype: str, pitch: int = 0) -> Matrix:
    """A matrix in C order in the workspace, from this byte on; its rows are `pitch` elements apart, or cols."""
    pitch = pitch or cols
    return Matrix(Room(offset, rows * pitch, dtype), dtype, rows, cols, pitch, 1)


@dataclass(frozen=True)
class Clear:
    """Zeros in a room of the workspace, by a memset on the stream of the launches. Counts as no launch."""

    room: Room

    def __str__(self) -> str:
        return f"zeros[{self.room.items} {self.room.dtype}]({_shown(self.room)})"


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Parameters
    ----------
    module, kernel : str
        Where the kernel's factory stands, `make_<kernel>`, and its name.
    constants, arguments : NamedTuple
        What the kernel is made of and what it takes, records of `densegrad.signatures`. Arguments are integers,
        numbers, slots and rooms.
    grid : tuple of int
        Blocks along x, y and z.
    block : int
        Threads of a block.
    plan : Any
        The plan that it carries out.
    shared_bytes : int
        Dynamic shared memory of a block.
    capability : tuple of int
        The first compute capability that has the kernel's instructions.
    alone : bool
        Whether no other compute capability has them.
    in_turn : bool
        Whether blocks take pieces of work in turn, so that fewer do the same.
    """

    module: str
    kernel: str
    constants: Any
    arguments: Any
    grid: tuple[int, ...]
    block: int
    plan: Any
    shared_bytes: int = 0
    capability: tuple[int, int] = (7, 5)
    alone: bool = False
    in_turn: bool = False

    def on(self, multiprocessors: int) -> Launch:
        """The launch on a device of so many: of no more blocks than these, where blocks take their work in turn."""
        blocks = self.grid[0]
        return self if not self.in_turn or blocks <= multiprocessors else replace(
            self, grid=(multiprocessors, *self.grid[1:]))

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Whether GPUs of this compute capability have the kernel's instructions."""
        return capability == self.capability if self.alone else capability >= self.capability

    @property
    def values(self) -> tuple[Any, ...]:
        """The arguments one by one, in the order of the kernel's parameters."""
        return tuple(value for value, _, _ in flattened(self.arguments))

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of the kernel's parameters."""
        return tuple(name for _, name, _ in flattened(self.arguments))

    @property
    def types(self) -> tuple[str, ...]:
        """The types of the arguments: int64, tensor_map, or that of numbers."""
        types = {"Number": number_of(self.constants), "TensorMap": "tensor_map"}
        return tuple(types.get(kind, "int64") for _, _, kind in flattened(self.arguments))

    def __str__(self) -> str:
        made_of = ", ".join(f"{name}={value}" for name, value in self.constants._asdict().items())
        takes = ", ".join(f"{name}={_shown(value)}" for name, value in zip(self.parameters, self.values, strict=True))
        shared = f", {self.shared_bytes} bytes of shared memory" if self.shared_bytes else ""
        return f"{self.kernel}[{' x '.join(map(str, self.grid))} blocks of {self.block} threads{shared}]({takes}) " \
               f"of {made_of}"


def _shown(value: Any) -> str:
    if isinstance(value, Slot):
        return f"<{value.name}>"
    if isinstance(value, TensorMap):
        return f"map of {_shown(value.address)}"
    return f"<workspace + {value.offset}>" if isinstance(value, Room) else str(value)


def flattened(record: Any, prefix: str = "") -> Iterator[tuple[Any, str, str]]:
    """(value, parameter, type) of a record's fields; a record within it gives its parts under its own name.

    The first part has the name alone: `z`, `z_down`, `z_across`.
    """
    annotations = type(record).__annotations__
    for position, (field, value) in enumerate(record._asdict().items()):
        name = f"{prefix}_{field}" if prefix and position else prefix or field
        if isinstance(value, tuple) and not isinstance(value, (Slot, Room, TensorMap)):
            yield from flattened(value, name)
        else:
            yield value, name, annotations[field].__forward_arg__


def workspace_bytes(launches: Iterable[Launch | Clear]) -> int:
    """The size of the workspace that these launches share, in bytes: the end of the last room that one of them uses."""
    ends = [0]
    for launch in launches:
        ends += [value.end for value in launch.values if isinstance(value, Room)] if isinstance(launch, Launch) else [
            launch.room.end]
    return max(ends)
