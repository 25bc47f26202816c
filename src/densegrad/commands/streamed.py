"""Gradients of arrays in files: whole, or block by block where they are larger than memory."""
from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, BinaryIO
from zipfile import ZipFile

import numpy as np

from ..accumulator import GradientAccumulator
from ..operands import accept

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
          "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
#: elements that are looked at or written at a time, so that no copy of an array is ever made
_AT_ONCE = 2**20


def bytes_of(words: str) -> int:
    """A number of bytes: "300MB", "2GiB", "500000000".

    Raises
    ------
    ValueError
        If the words are no such number.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", words.strip().lower())
    if found is None:
        raise ValueError(f"--memory must be a number of bytes, for example 300MB or 2GiB; got {words!r}")
    return int(float(found[1]) * _UNITS[found[2] or ""])


class Entry:
    """An array in a file, written from front to back, and the largest magnitude of its elements."""

    def __init__(self, file: Any, shape: tuple[int, ...], dtype: np.dtype):
        self.file, self.shape, self.dtype, self.largest = file, shape, dtype, 0.0
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)

    def write(self, rows: np.ndarray) -> None:
        """Write elements that follow those before."""
        flat = np.ascontiguousarray(rows).reshape(-1)
        for start in range(0, len(flat), _AT_ONCE):
            part = flat[start:start + _AT_ONCE]
            self.largest = float(np.maximum(self.largest, np.abs(part).max()))  # NaN stays
            self.file.write(part.view(np.uint8).data)


class Results:
    """A file of arrays: an archive of NumPy, or one array alone."""

    def __init__(self, file: BinaryIO, alone: bool):
        self._file, self._archive = file, None if alone else ZipFile(file, "w")
        self.entries: dict[str, Entry] = {}

    @contextmanager
    def entry(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> Iterator[Entry]:
        """The next array of the file."""
        opened = nullcontext(self._file) if self._archive is None else self._archive.open(
            f"{name}.npy", "w", force_zip64=True)
        with opened as file:
            self.entries[name] = Entry(file, shape, dtype)
            yield self.entries[name]

    def write(self, name: str, array: np.ndarray) -> None:
        """Write a whole array."""
        with self.entry(name, array.shape, array.dtype) as entry:
            entry.write(array)

    def close(self) -> None:
        """Write what an archive ends with."""
        if self._archive is not None:
            self._archive.close()


def write_gradients(results: Results, arrays: Mapping[str, Any], options: Mapping[str, Any], limit: int,
                    progress: Callable[[int, int], object]) -> None:
    """Write the gradients of mapped arrays x, w (or None) and dz, in at most so many bytes of memory.

    dx is written block by block, and first; then dw and db. progress is told how many samples of how many are done.

    Raises
    ------
    ValueError
        If that takes more memory than the limit.
    ShapeError, DTypeError
        As `dense_grads`.
    """
    x, w, dz = arrays["x"], arrays["w"], arrays["dz"]
    batch_axis, with_dx = options["batch_axis"], "dx" in options["need"]
    inputs = accept(x=x, w=w, dz=dz, batch_axis=batch_axis, weight_layout=options["weight_layout"])
    if len(inputs.batch_shape) != 1:
        raise ValueError(f"--memory takes arrays of 2 dimensions, (samples, features); --x has {x.ndim} (save "
                         "x.reshape(-1, x.shape[-1]), and dz likewise)")
    features, samples = inputs.in_features, inputs.samples
    progress(0, samples)
    with GradientAccumulator(features, inputs.out_features, inputs.dtype, w=w if with_dx else None,
                             **options) as accumulator:
        block = accumulator.block
        needed = accumulator.host_bytes | {"dx": min(block, samples) * features * dz.itemsize if with_dx else 0}
        if sum(needed.values()) > limit:
            parts = ", ".join(f"{what} {_megabytes(size)}" for what, size in needed.items() if size)
            raise ValueError(f"--memory must be at least {_megabytes(sum(needed.values()))} here ({parts}; blocks have "
                             f"{block} samples, whatever the limit, since bits follow from them); got "
                             f"{_megabytes(limit)}")
        room = np.empty((min(block, samples), features), dz.dtype) if with_dx else None
        dx = results.entry("dx", (samples, features), dz.dtype) if with_dx else nullcontext()
        with dx as entry:
            for start in range(0, samples, block):
                rows = slice(start, min(start + block, samples))
                part = None if room is None else room[:rows.stop - start]
                accumulator.add(x[rows], dz[:, rows] if batch_axis else dz[rows], dx=part)
                if rows.stop == samples:
                    accumulator.result()  # which computes the last block
                if entry is not None and part is not None:
                    entry.write(part)
                progress(rows.stop, samples)
        for name, array in accumulator.result()._asdict().items():
            if array is not None:
                results.write(name, array)


def _megabytes(size: int) -> str:
    """A size that is read back as at least as many bytes."""
    return f"{-(-size // 10**5) / 10:.1f}MB"
