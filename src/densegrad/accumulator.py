"""Gradients of batches that are larger than memory: chunks are cut into blocks, and the blocks' gradients are added.

    chunks of any size --rows--> blocks of a fixed size --dense_grads--> dw, db of a block --added in order--> dw, db

A block is computed when its last row has come. It lies in memory as every block does, samples first and without gaps,
so that its launches, and its bits, do not depend on the chunks. Rows that lie so already are read where they are.
"""
from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from math import prod
from typing import Any, Literal, NamedTuple

import numpy as np

from . import containers, device, tensors
from .calls import Recipe
from .errors import AccumulatorError, DistributedError, DTypeError, ShapeError
from .facts import ITEM_BYTES, accumulator_of
from .folds import COMPENSATED, SUM, total_of
from .gradients import DenseGrads, dense_grads, describe_dense
from .launches import ALIGNMENT
from .operands import accept, accept_flag, accept_out, as_names, given
from .output_gradients import accept_activation, stray_slope
from .slips import meant
from .typing import ActivationName, GradName, Precision, WeightLayout

#: bytes of x and dz that a block has at most
BLOCK_BYTES = 2 ** 25
#: reductions of a batch
REDUCTIONS = ("sum", "mean")


def block_samples(in_features: int, out_features: int, dtype: str) -> int:
    """How many samples a block has: the largest power of two whose x and dz take at most BLOCK_BYTES."""
    samples = BLOCK_BYTES // (max(in_features + out_features, 1) * ITEM_BYTES[dtype])
    return 1 << max(samples.bit_length() - 1, 0)


class _Layout(NamedTuple):
    """What all chunks have in common: their kind and place, and what a row of each array is."""

    kind: str
    place: str
    fields: dict[str, tuple[tuple[int, ...], str]]
    dx: str  # the dtype of the places for dx, or an empty string

    def __str__(self) -> str:
        arrays = ", ".join(f"{name} of {dtype}" for name, (_, dtype) in self.fields.items())
        return f"{arrays}{self.dx and f', dx of {self.dx}'} ({self.kind}, on {self.place})"


class _Piece(NamedTuple):
    """Rows of a block, and the target for their dx."""

    rows: slice
    dx: Any


class GradientAccumulator:
    """The gradients of a dense layer for a batch that comes in chunks, and never has to be in memory as a whole.

        with GradientAccumulator(in_features, out_features, "bfloat16") as accumulator:
            for x, dz in chunks:
                accumulator.add(x, dz)
            dx, dw, db = accumulator.result()

    Parameters
    ----------
    in_features, out_features : int
        D and M, the sizes of the layer.
    dtype : str or dtype
        Of x, w and dz: float16, bfloat16, float32 or float64.
    block : int, optional
        Samples of a block. By default a power of two that follows from D, M and dtype alone: at most 32 MiB of x and
        dz. Another block gives other bits.
    w : array, (D, M) or (M, D), optional
        The layer's weights, if dx is needed. They must not change before the result is taken; after `reset` they may
        have.
    need : names among "dx", "dw", "db", optional
        Which gradients to compute: by default dw and db, and dx if there is w.
    activation, negative_slope, batch_axis, weight_layout, precision
        As in `dense_grads`; batch_axis is that of each chunk's dz and z.
    compensated : bool
        Whether what additions round away is added up, too: of db within a block, as in `bias_grad`, and of dw and db
        from block to block.
    reduction : "sum" or "mean"
        Whether dw and db are sums over all samples, or those divided by the number of samples.
    sum_dtype : str, optional
        Of dw and db and of their sums: float32 by default, float64 for float64, or float64 for any.
    keep_blocks : bool
        Whether each block's dw and db are kept until the end, D * M numbers a block. `all_reduce` needs them.
    progress : function, optional
        Called with the number of samples that have been computed, after every block.

    Attributes
    ----------
    block : int
        Samples of a block.
    samples : int
        How many samples have been added.

    Raises
    ------
    ShapeError, DTypeError, DeviceError, TypeError, ValueError
        As `dense_grads`, before anything is computed.

    Notes
    -----
    The batch is cut into blocks of `block` samples, the last of which may be shorter. Each block's dw and db are
    computed by `dense_grads` and added in ascending order, in `sum_dtype`. So chunks of any size give the same bits:
    those of

        for start in range(0, samples, block):
            rows = slice(start, start + block)
            dense_grads(x[rows], w, dz[rows], need=("dw", "db"), out=DenseGrads(dw=dw, db=db), accumulate=start > 0)

    where x[rows] and dz[rows] begin at multiples of 256 bytes. They are not the bits of one call with the whole batch,
    whose plan is another one. dx is that of `dense_grads` for each block.

    Chunks on a GPU are read where they are, or copied there once if they do not lie as blocks do. Chunks of the host
    are copied into page-locked memory, and from there on a stream of their own while the block before is computed; a
    dx on the host is waited for, block by block. Work is queued on the stream that is current when `add` is called: use
    one for all calls. One thread at a time.

    With n the longest chain of additions of a block's plan, B the number of blocks and u = 2^-24 (2^-53 for float64),
    the error of dw before it is rounded is at most (n + B + 1) u sum |x| |dz|.
    Source: Higham, "Accuracy and Stability of Numerical Algorithms", 2002, chapter 4.

    Examples
    --------
    >>> accumulator = GradientAccumulator(2, 1, "float32")
    >>> for x, dz in (([[1, 2]], [[1]]), ([[3, 4], [5, 6]], [[10], [100]])):
    ...     accumulator.add(numpy.array(x, "float32"), numpy.array(dz, "float32"))
    >>> accumulator.result().dw
    array([[531.],
           [642.]], dtype=float32)
    """

    def __init__(self, in_features: int, out_features: int, dtype: Any, *, block: int | None = None, w: Any = None,
                 need: Iterable[GradName] | None = None, activation: ActivationName | None = None,
                 negative_slope: float | None = None, batch_axis: int = 0, weight_layout: WeightLayout = "in_out",
                 compensated: bool = False, precision: Precision | None = None,
                 reduction: Literal["sum", "mean"] = "sum",
                 sum_dtype: str | None = None, keep_blocks: bool = False,
                 progress: Callable[[int], object] | None = None):
        self.in_features, self.out_features = (_size(name, size, 0) for name, size in (
            ("in_features", in_features), ("out_features", out_features)))
        self.dtype = _dtype_name("dtype", dtype, tuple(ITEM_BYTES))
        chosen = block_samples(self.in_features, self.out_features, self.dtype)
        self.block = chosen if block is None else _size("block", block, 1)
        if need is None:
            need = ("dw", "db") if w is None else ("dx", "dw", "db")
        self._need = as_names(need)
        if reduction not in REDUCTIONS:
            raise ValueError(f'reduction must be "sum" or "mean"; got {reduction!r}{meant(reduction, REDUCTIONS)}')
        sums = accumulator_of(self.dtype)
        self.sum_dtype = sums if sum_dtype is None else _dtype_name(
            "sum_dtype", sum_dtype, tuple(dict.fromkeys((sums, "float64"))))
        self._w, self._mean, self._progress = w, reduction == "mean", progress
        self._keep = accept_flag("keep_blocks", keep_blocks)
        if progress is not None and not callable(progress):
            raise TypeError(f"progress must be a function of a number of samples; got {progress!r}")
        self._compensated = accept_flag("compensated", compensated)
        self._fold = COMPENSATED if self._compensated else SUM
        self._how: dict[str, Any] = {
            "activation": activation, "negative_slope": negative_slope, "weight_layout": weight_layout,
            "precision": precision, "compensated": self._compensated and "db" in self._need}
        self._batch_axis = batch_axis
        self._describe(batch_axis)

        self._closed = False
        self._staging: Any = None
        self._layout: _Layout | None = None
        self._where = device.current()  # with the memory of the library whose arrays came
        self._like: Any = np.empty(0)  # or the first dz: of its kind results are
        self.reset()

    def _describe(self, batch_axis: int) -> Recipe:
        """What a call for one block does; that checks all options."""
        how, samples = self._how, self.block

        def ghost(*shape: int) -> np.ndarray:
            return np.broadcast_to(np.zeros((), device.dtype_of(self.dtype)), shape)

        dz = ghost(self.out_features, samples) if batch_axis else ghost(samples, self.out_features)
        w = ghost(self.in_features, self.out_features)
        options = (self._need, how["activation"], stray_slope(how["activation"], how["negative_slope"]), batch_axis,
                   how["weight_layout"], False, how["compensated"], how["precision"], (), None)
        return describe_dense((ghost(samples, self.in_features) if "dw" in self._need else None,
                               None if self._w is None else w if how["weight_layout"] == "in_out" else w.T,
                               dz, None if how["activation"] in (None, "identity") else dz, None),
                              DenseGrads(), options)

    def __enter__(self) -> GradientAccumulator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        size = self.block * (self.in_features + self.out_features) * ITEM_BYTES[self.dtype]
        return (f"<GradientAccumulator of ({self.in_features}, {self.out_features}) {self.dtype}: {self.samples} "
                f"samples added, in blocks of {self.block} ({size:,} bytes of x and dz), sums in {self.sum_dtype}>")

    def reset(self) -> None:
        """Begin anew, with no samples, in the memory that was taken for blocks; results that were given stay."""
        if self._closed:
            self._check_open()
        self._weights: Any = None  # w where kernels can read it
        self.samples = 0
        self._filled = 0  # rows of the block that is not complete
        self._pieces: list[_Piece] = []
        self._computed = 0  # samples of complete blocks
        self._state: list[tuple[Any, ...]] = []  # of the sums of dw and db, those that are needed
        self._kept: list[list[Any]] = []
        self._result: DenseGrads[Any] | None = None
        self._problem = ""

    def add(self, x: Any, dz: Any, *, z: Any = None, sample_weight: Any = None, dx: Any = None) -> None:
        """Add the gradients of a chunk of the batch.

        Parameters
        ----------
        x : array, (samples, D), or None if dw is not needed
            Rows of the layer's input, any number of them: of NumPy (a memory map, too), CuPy or PyTorch, any strides.
        dz : array, (samples, M), or (M, samples) for batch_axis 1
            The gradient with respect to the layer's output, of these samples.
        z : array of dz's shape, optional
            What the activation was applied to, if there is one.
        sample_weight : array, (samples,), optional
            As in `activation_grad`: with each chunk or with none.
        dx : array, (samples, D), if dx is needed
            Where to write it. Rows of a block that is not complete yet are written when it is, at the latest by
            `result`: the array must stay until then.

        Raises
        ------
        ShapeError, DTypeError, DeviceError, OutError, TypeError, ValueError
            As `dense_grads`, and if the chunk is of another library, device or dtype than those before, or has other
            arrays. Nothing of the chunk is added then.
        AccumulatorError
            If the accumulator is closed, has given its result, or failed before.
        """
        self._check_open()
        layout, rows, dx = self._accepted((x, dz, z, sample_weight, dx))
        if self._layout is None:
            self._begin(layout, dz)
        samples = len(rows["dz"])
        self._problem = "adding was interrupted, so that part of a chunk is missing"
        with self._where.using(None, layout.place) as stream:
            for at, count in self._cuts(samples):
                taken = {name: array[at:at + count] for name, array in rows.items()}
                target = None if dx is None else dx[at:at + count]
                if count == self.block and self._lies_as_blocks_do(taken):
                    self._compute(layout, taken, [_Piece(slice(0, count), target)])
                    continue
                into, end = self._staging.rows(), self._filled + count
                for name, array in taken.items():
                    into[name][self._filled:end] = array
                self._pieces.append(_Piece(slice(self._filled, end), target))
                self._filled = end
                if end == self.block:
                    self._flush(layout, stream)
        self.samples += samples
        self._problem = ""

    def update(self, chunks: Iterable[Any]) -> None:
        """Add every chunk of an iterator: tuples (x, dz), or dictionaries of what `add` takes."""
        for chunk in chunks:
            if isinstance(chunk, Mapping):
                self.add(**chunk)
            else:
                self.add(*chunk)

    def result(self) -> DenseGrads[Any]:
        """The gradients of all samples that were added; nothing can be added afterwards, until `reset`.

        Returns
        -------
        DenseGrads
            dw, (D, M) or (M, D), and db, (M,), in `sum_dtype`, of the kind that the chunks were; those that are not
            needed, and dx, are None. Of no samples they are zeros.

        Raises
        ------
        AccumulatorError
            If the accumulator was closed before, or adding failed.
        """
        if self._result is None:
            self._check_open()
            self._problem = "taking its result was interrupted"
            with self._using() as stream:
                self._complete(stream)
                for sums in self._kept:
                    self._go_on(sums)
                self._kept = []
                self._result = self._delivered(self.samples)
            self._problem = "it has given its result"
        return self._result

    def all_reduce(self, comm: Any, *, check: bool | None = None, deadline: float | None = None) -> DenseGrads[Any]:
        """The gradients of all ranks' samples, with the bits of one process that was given them all; on every rank.

        Every rank adds its shard of the batch, in the order of the ranks, and calls this instead of `result`. The
        accumulators must have been made with keep_blocks=True.

        Parameters
        ----------
        comm, check, deadline
            As in `densegrad.distributed.all_reduce`.

        Returns
        -------
        DenseGrads
            As `result` gives it. A mean is one over the samples of all ranks. A rank without a chunk gets NumPy's
            arrays.

        Raises
        ------
        DistributedError
            If a rank raised, does not come within the deadline, has another accumulator, or a shard that is no whole
            number of blocks: only the last one that is not empty may be. On every rank; it names them.
        AccumulatorError
            As `result` does; the other ranks raise DistributedError. So do they if this one keeps no blocks, which is a
            ValueError here.

        Notes
        -----
        The sum goes from rank to rank, each of which adds its blocks to it one by one, in pieces, so that all work at
        once: `densegrad.distributed.fold_along_ranks`.
        """
        from .distributed import fold_along_ranks, telling_ranks
        from .distributed.buckets import opened

        counted: list[int] = []

        def accept_shards(numbers: Any) -> None:
            counted.extend(numbers.samples)
            _check_shards(numbers.samples, self.block)

        def own(array: Any) -> Any:
            """In the memory of the library whose arrays came."""
            made = self._new(array.shape, self.sum_dtype)
            opened("a sum", made)[...] = array
            return made

        with telling_ranks(comm, deadline):
            if not self._keep:
                raise ValueError("all_reduce adds the blocks of all ranks in one order, and this accumulator keeps "
                                 "none (make it with keep_blocks=True)")
            self._check_open()
            self._problem = "a sum over ranks failed"
            with self._using() as stream:
                self._complete(stream)
                addends = [[opened("a sum", one) for one in sums] for sums in self._kept]
                like = [opened("a sum", self._new(shape, self.sum_dtype)) for _, shape in self._shapes()]
        how = {**self._how, "dtype": self.dtype, "need": self._need, "reduction": "mean" if self._mean else "sum"}
        of = f"blocks of {self.block} samples; {', '.join(f'{name}={value!r}' for name, value in how.items())}"
        planes = fold_along_ranks(comm, addends, like, fold=self._fold, of=of, samples=self.samples,
                                  accept=accept_shards, check=check, deadline=deadline, stream=stream)
        with self._using():
            self._kept, self._state = [], [tuple(map(own, state)) for state in zip(*planes, strict=True)]
            self._result = self._delivered(sum(counted))
        self._problem = "it has given its result"
        return self._result

    def close(self) -> None:
        """Give back all memory but that of the result, once nothing that is under way needs it."""
        if self._staging is not None:
            self._staging.close()
        self._staging, self._state, self._kept, self._pieces = None, [], [], []
        self._w = self._weights = self._like = None
        self._closed, self._problem = True, self._problem or "it is closed"

    @property
    def host_bytes(self) -> dict[str, int]:
        """Memory of the host in bytes that it takes where chunks are NumPy's arrays, beside these, by what it is for.

        Blocks on their way, sums with what adding them takes, and what launches share where the device is the host.
        """
        where, items = device.current(), ITEM_BYTES[self.dtype]
        row = self.out_features * (1 if self._how["activation"] in (None, "identity") else 2)
        row += self.in_features * (("dw" in self._need) + ("dx" in self._need))
        sums = sum(prod(shape) for _, shape in self._shapes()) * ITEM_BYTES[self.sum_dtype]
        if where.is_host:
            launches = self._describe(0).workspace_bytes
            # Beside a compensated sum: what it lost, a block's, and three temporaries of its addition.
            return {"blocks": self.block * row * items, "sums": sums * (6 if self._compensated else 1),
                    "launches": launches}
        return {"blocks": 2 * self.block * row * items, "sums": sums, "launches": 0}

    def _check_open(self) -> None:
        if self._problem:
            raise AccumulatorError(f"this accumulator takes nothing more and has no result to give: {self._problem} "
                                   f"({'make a new one' if self._closed else 'reset() begins anew'})")

    def _accepted(self, arrays: tuple[Any, ...]) -> tuple[_Layout, dict[str, Any], Any]:
        """A chunk's layout, its rows by their names, and the target of dx, when all of it has been checked."""
        x, dz, z, sample_weight, dx = arrays
        for name, array in zip(("x", "dz", "z", "sample_weight", "dx"), arrays, strict=True):
            kind = containers.kind_of(array)
            if kind.guest:
                raise TypeError(f"{name} must be an array of NumPy, CuPy or PyTorch; got one of {kind.name} (hand it "
                                "over with cupy.from_dlpack, or numpy.from_dlpack if it lies on the host)")
        x = given("x", x) if "dw" in self._need else None
        inputs = accept(x=x, w=self._w if "dx" in self._need else None, dz=given("dz", dz),
                        batch_axis=self._batch_axis, weight_layout=self._how["weight_layout"])
        if len(inputs.batch_shape) != 1:
            raise ShapeError("dz of a chunk must have 2 dimensions, (samples, outputs); got "
                             f"{len(inputs.batch_shape) + 1} (pass dz.reshape(-1, dz.shape[-1]), and x likewise)")
        for name, argument, sizes in (("x", inputs.x, self.in_features), ("dz", inputs.dz, self.out_features)):
            if argument is not None and argument.cols != sizes:
                raise ShapeError(f"{name} must have {sizes} features, as the accumulator was made for; got "
                                 f"{argument.cols}")
        if inputs.dtype != self.dtype:
            raise DTypeError(f"x and dz must be {self.dtype}, as the accumulator was made for; got {inputs.dtype} "
                             "(convert them with astype)")
        slope = stray_slope(self._how["activation"], self._how["negative_slope"])
        layer_above = accept_activation(inputs, (self._how["activation"], slope), z, self._batch_axis, sample_weight)
        written = ""
        if "dx" in self._need:
            target = accept_out("dx", given("dx", dx), replace(inputs, beside=layer_above.arguments),
                                (inputs.samples, self.in_features), False)
            written = target.dtype
        elif dx is not None:
            raise ValueError("dx was given, but it is not needed (make the accumulator with w=)")

        rows = {"dz": _rows(dz, self._batch_axis)}
        if x is not None:
            rows["x"] = _rows(x)
        if layer_above.z is not None:
            rows["z"] = _rows(z, self._batch_axis)
        if layer_above.weights is not None:
            rows["sample_weight"] = _rows(sample_weight)
        dtypes = {argument.name: argument.dtype for argument in (inputs.dz, inputs.x, *layer_above.arguments)
                  if argument is not None}
        layout = _Layout(containers.kind_of(dz).name, inputs.place,
                         {name: (tuple(array.shape[1:]), dtypes[name]) for name, array in rows.items()}, written)
        if self._layout not in (None, layout):
            raise TypeError(f"all chunks must be alike: those before had {self._layout}; got {layout}")
        return layout, rows, None if dx is None else _rows(dx)

    def _begin(self, layout: _Layout, like: Any) -> None:
        """Take the memory that chunks of this layout need."""
        self._where = device.current().serving(like)
        with self._where.using(None, layout.place):
            self._staging = self._where.staging(self.block, layout.fields, layout.place == device.HOST)
        self._layout, self._like = layout, like[:0]

    def _using(self) -> AbstractContextManager[int]:
        """The device and the stream in use, as that stream's pointer."""
        return self._where.using(None, device.HOST if self._layout is None else self._layout.place)

    def _cuts(self, samples: int) -> Iterator[tuple[int, int]]:
        """Where a chunk's rows are cut by blocks: each piece's first row, and how many."""
        at = 0
        while at < samples:
            count = min(self.block - self._filled, samples - at)
            yield at, count
            at += count

    def _lies_as_blocks_do(self, arrays: dict[str, Any]) -> bool:
        """Whether kernels can read a whole block where it is, in the layout that all blocks have."""
        for array in arrays.values():
            memory = self._where.memory(array)
            packed = memory.dtype.itemsize * prod(memory.shape[1:])
            if memory.place == device.HOST or memory.byte % ALIGNMENT or memory.strides != (
                    packed, *[memory.dtype.itemsize] * (len(memory.shape) - 1)):
                return False
        return True

    def _flush(self, layout: _Layout, stream: int) -> None:
        """Compute the block whose rows have been written so far."""
        arrays = self._staging.sent(self._filled, stream)
        pieces, self._pieces, self._filled = self._pieces, [], 0
        self._compute(layout, arrays, pieces)
        self._staging.read(stream)

    def _compute(self, layout: _Layout, arrays: dict[str, Any], pieces: list[_Piece]) -> None:
        """Add the gradients of one block, and hand its dx over."""
        samples, on_host = len(arrays["dz"]), layout.place == device.HOST
        names, dx = [name for name, _ in self._shapes()], None
        apart = self._keep or self._compensated  # whether the block's sums are results of their own
        added = bool(self._state) and not apart
        sums = [total for total, in self._state] if added else [
            self._new(shape, self.sum_dtype) for _, shape in self._shapes()]
        if "dx" in self._need:
            direct = len(pieces) == 1 and not on_host
            dx = pieces[0].dx if direct else self._new((samples, self.in_features), layout.dx)
            if self._weights is None:
                self._weights = self._where.placed(_rows(self._w), on_host)
        dense_grads(arrays.get("x"), self._weights, arrays["dz"], need=self._need,
                    z=arrays.get("z"), sample_weight=arrays.get("sample_weight"),
                    out=DenseGrads(dx=dx, **dict(zip(names, sums, strict=True))), accumulate=names if added else (),
                    **self._how)
        if self._keep:
            self._kept.append(sums)
        elif not added:
            self._go_on(sums)
        if dx is not None and dx is not pieces[0].dx:
            if on_host:
                dx = self._where.deliver(dx, pieces[0].dx)
            for rows, target in pieces:
                target[...] = dx[rows]
        self._computed += samples
        if self._progress is not None:
            self._progress(self._computed)

    def _complete(self, stream: int) -> None:
        """Compute what is left of the batch."""
        if self._layout is not None and self._filled:
            self._flush(self._layout, stream)

    def _shapes(self) -> list[tuple[GradName, tuple[int, ...]]]:
        """Those of dw and db that are needed, and their shapes."""
        weights = self.in_features, self.out_features
        if self._how["weight_layout"] == "out_in":
            weights = weights[::-1]
        shapes: list[tuple[GradName, tuple[int, ...]]] = [("dw", weights), ("db", (self.out_features,))]
        return [(name, shape) for name, shape in shapes if name in self._need]

    def _new(self, shape: tuple[int, ...], dtype: str) -> Any:
        return self._where.maker(shape, dtype, False)()[0]

    def _zeros(self, shape: tuple[int, ...]) -> Any:
        zeros = self._new(shape, self.sum_dtype)
        zeros[...] = 0
        return zeros

    def _go_on(self, sums: list[Any]) -> None:
        """Add the sums of the next block, which are this object's own from now on."""
        if self._state:
            self._state = [self._fold.add(state, one) for state, one in zip(self._state, sums, strict=True)]
        else:
            self._state = [(one, *(self._zeros(shape) for _ in range(1, self._fold.planes)))
                           for one, (_, shape) in zip(sums, self._shapes(), strict=True)]

    def _delivered(self, samples: int) -> DenseGrads[Any]:
        """dw and db, of so many samples, as the kind of container that the chunks were."""
        found = {}
        for position, (name, shape) in enumerate(self._shapes()):
            array = total_of(self._state[position]) if self._state else self._zeros(shape)
            if self._mean and samples:
                array = array / samples
            found[name] = self._where.deliver(array, self._like)
        return DenseGrads(**found)


def _check_shards(samples: Sequence[int], block: int) -> None:
    """Hold the ranks' shards to whole blocks: of all but the last that is not empty.

    Raises
    ------
    DistributedError
        On every rank alike.
    """
    *whole, _ = [rank for rank, count in enumerate(samples) if count] or [0]
    cut = tuple(rank for rank in whole if samples[rank] % block)
    if cut:
        shards = ", ".join(f"{samples[rank]} of rank {rank}" for rank in cut)
        raise DistributedError(f"every shard but the last must be a whole number of blocks of {block} samples, since "
                               f"one process would cut the batch there; got {shards} (cut it at multiples of {block})",
                               cut, agreed=True)


def _rows(array: Any, batch_axis: int = 0) -> Any:
    """An array of NumPy or CuPy, or a CUDA tensor as its values, with samples on axis 0."""
    array = containers.host_array(array)
    if tensors.is_tensor(array):
        array = array.detach()
    return array.T if batch_axis else array


def _size(name: str, size: Any, least: int) -> int:
    try:
        number = None if isinstance(size, bool) else operator.index(size)
    except TypeError:
        number = None
    if number is None or number < least:
        raise (TypeError if number is None else ValueError)(f"{name} must be an integer, {least} or more; got {size!r}")
    return number


def _dtype_name(name: str, dtype: Any, known: tuple[str, ...]) -> str:
    """The name of a dtype of NumPy, PyTorch or of that name."""
    found = str(dtype).removeprefix("torch.")
    if found not in known and dtype is not None:  # which NumPy takes for float64
        with suppress(TypeError):
            found = str(np.dtype(dtype))
    if found not in known:
        raise DTypeError(f"{name} must be {' or '.join(known)}; got {dtype!r}{meant(dtype, known)}")
    return found
