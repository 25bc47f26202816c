"""What a learner writes first: dL/dW by one thread for each output, then by 16 x 16 tiles in shared memory.

    dw[d, m] = sum over s of x[s, d] dz[s, m]            x (S, D), dz (S, M), dw (D, M)

Both add in ascending order of the samples, as matmul_simt does. They are here to be counted and timed beside it: the
first reads both factors of every product from memory, the second each element once for 16 products. matmul_simt reads
it once for a whole tile of 64 to 256, in accesses of 16 bytes, and lets every thread multiply from registers.

    weight_grad("naive", x, dz, dw)         x, dz and dw: CuPy's arrays, or NumPy's in Numba's simulator

Source: CUDA C++ Programming Guide, "Shared Memory" (the matrix product with and without it).
"""
from functools import cache
from typing import Any

import numpy as np
from numba import cuda

from densegrad.kernels import primitives
from densegrad.testing import launch_kernel

TILE = 16


@cache
def make_naive(dtype: str) -> Any:
    """The kernel with one thread for each output; neighbours along a warp own neighbouring outputs m."""
    zero, multiply_add = primitives.zeros(dtype, 1), primitives.multiply_add(dtype, 1)
    load, store = primitives.load_vector(dtype, 1, dtype), primitives.store_vector(dtype, 1, dtype)

    @primitives.jit(TILE * TILE)
    def matmul_naive(x, dz, dw, samples, in_features, out_features):
        d = cuda.blockIdx.y * TILE + cuda.threadIdx.x // TILE
        m = cuda.blockIdx.x * TILE + cuda.threadIdx.x % TILE
        if d < in_features and m < out_features:
            total = zero()
            for s in range(samples):
                total = multiply_add(total, load(x, s * in_features + d), load(dz, s * out_features + m))
            store(dw, d * out_features + m, total)

    return matmul_naive


@cache
def make_shared_tiles(dtype: str) -> Any:
    """The kernel whose blocks share 16 samples of 16 features and 16 outputs; still one output for a thread."""
    zero, multiply_add = primitives.zeros(dtype, 1), primitives.multiply_add(dtype, 1)
    load, store = primitives.load_vector(dtype, 1, dtype), primitives.store_vector(dtype, 1, dtype)
    load_shared, store_shared = primitives.load_shared(dtype, 1), primitives.store_shared(dtype, 1)
    x_shared = primitives.shared_array("x", dtype, TILE * TILE)
    dz_shared = primitives.shared_array("dz", dtype, TILE * TILE)

    @primitives.jit(TILE * TILE)
    def matmul_shared_tiles(x, dz, dw, samples, in_features, out_features):
        thread = cuda.threadIdx.x
        down, across = thread // TILE, thread % TILE
        d, m = cuda.blockIdx.y * TILE + across, cuda.blockIdx.x * TILE + across  # what this thread loads
        row = cuda.blockIdx.y * TILE + down
        x_tile, dz_tile = x_shared(), dz_shared()
        total = zero()
        for first in range(0, samples, TILE):
            s = first + down
            x_value, dz_value = zero(), zero()
            if s < samples and d < in_features:
                x_value = load(x, s * in_features + d)
            if s < samples and m < out_features:
                dz_value = load(dz, s * out_features + m)
            store_shared(x_tile, thread, x_value)
            store_shared(dz_tile, thread, dz_value)
            cuda.syncthreads()
            for step in range(0, TILE * TILE, TILE):
                total = multiply_add(total, load_shared(x_tile, step + down), load_shared(dz_tile, step + across))
            cuda.syncthreads()
        if row < in_features and m < out_features:
            store(dw, row * out_features + m, total)

    return matmul_shared_tiles


#: name -> the factory of its kernel
BASELINES = {"naive": make_naive, "shared tiles": make_shared_tiles}


def weight_grad(baseline: str, x: Any, dz: Any, dw: Any) -> None:
    """dw = x.T @ dz by one launch of one of BASELINES on the default stream.

    Parameters
    ----------
    baseline : str
        Its name.
    x, dz, dw : arrays, (S, D), (S, M) and (D, M), float32 | float64
        In C order, on the device; dw is overwritten.
    """
    (samples, in_features), out_features = x.shape, dz.shape[1]
    grid = -(-out_features // TILE), -(-in_features // TILE)
    launch_kernel(BASELINES[baseline](np.dtype(dw.dtype).name), grid, TILE * TILE,
                  (x, dz, dw, samples, in_features, out_features))
