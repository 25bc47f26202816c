"""The instruction set the kernels are written in.

Every name exists twice: in ``ptx`` as LLVM and PTX for the compiler, and in ``simulator`` as plain Python and NumPy for
the Numba CUDA simulator; what becomes of numbers between memory and sums in ``number_ptx`` and ``number_simulator``,
rows that are kept in registers in ``row_ptx`` and ``row_simulator``, tiles of operands in ``tile_ptx`` and
``tile_simulator``, what the lanes of a warp do together in ``warp_ptx`` and ``warp_simulator``, Hopper's warpgroups
and copies of boxes in ``warpgroup_ptx`` and ``warpgroup_simulator``. A test holds the two to each other.

Names
-----
address
    Where an operand's element (0, 0) lies: an int64 on the device, an object with ``read`` and ``write`` in the
    simulator. An *index* counts elements from there.
fragment
    What a thread holds in registers: a tuple of accumulators on the device, a NumPy array in the simulator.
"""
from numba import config

if config.ENABLE_CUDASIM:
    from .number_simulator import *
    from .row_simulator import *
    from .simulator import *
    from .tile_simulator import *
    from .warp_simulator import *
    from .warpgroup_simulator import *
else:
    from .number_ptx import *
    from .ptx import *
    from .row_ptx import *
    from .tile_ptx import *
    from .warp_ptx import *
    from .warpgroup_ptx import *
