"""The instruction set the kernels are written in.

Every name exists twice: in ``ptx`` as LLVM and PTX for the compiler, and in ``simulator`` as plain Python and NumPy for
the Numba CUDA simulator; what becomes of numbers between memory and sums in ``number_ptx`` and ``number_simulator``,
tiles of operands in ``tile_ptx`` and ``tile_simulator``, what the lanes of a warp do together in ``warp_ptx`` and
``warp_simulator``. A test holds the two to each other.

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
    from .number_simulator import (
        backward,
        cross_entropy,
        exponential,
        leave_out,
        log_of_exponentials,
        merge_exponentials,
        minus,
        no_exponentials,
        rounded,
        weigh,
    )
    from .simulator import (
        add,
        add_inside,
        add_shared,
        add_vectors,
        convert,
        head,
        jit,
        load_each,
        load_if,
        load_integers,
        load_pieces,
        load_shared,
        load_vector,
        multiply_add,
        plus,
        rotate,
        scale,
        scale_at,
        settle,
        shared_array,
        store_each,
        store_pieces,
        store_shared,
        store_spread,
        store_vector,
        tidy,
        typed,
        zeros,
    )
    from .tile_simulator import (
        add_tile,
        again,
        deeper,
        load_tile,
        load_whole_tile,
        multiply_tile,
        place,
        split,
        store_line,
        store_tile,
        store_tile_sums,
        thread_lanes,
        tile_offset,
        tile_turn,
    )
    from .warp_simulator import (
        add_depths,
        commit_copies,
        copy_chunks,
        copy_place,
        fragment_places,
        load_fragments,
        mma,
        shared_bytes,
        store_depth_sums,
        store_products,
        wait_copies,
    )
else:
    from .number_ptx import (
        backward,
        cross_entropy,
        exponential,
        leave_out,
        log_of_exponentials,
        merge_exponentials,
        minus,
        no_exponentials,
        rounded,
        weigh,
    )
    from .ptx import (
        add,
        add_inside,
        add_shared,
        add_vectors,
        convert,
        head,
        jit,
        load_each,
        load_if,
        load_integers,
        load_pieces,
        load_shared,
        load_vector,
        multiply_add,
        plus,
        rotate,
        scale,
        scale_at,
        settle,
        shared_array,
        store_each,
        store_pieces,
        store_shared,
        store_spread,
        store_vector,
        tidy,
        typed,
        zeros,
    )
    from .tile_ptx import (
        add_tile,
        again,
        deeper,
        load_tile,
        load_whole_tile,
        multiply_tile,
        place,
        split,
        store_line,
        store_tile,
        store_tile_sums,
        thread_lanes,
        tile_offset,
        tile_turn,
    )
    from .warp_ptx import (
        add_depths,
        commit_copies,
        copy_chunks,
        copy_place,
        fragment_places,
        load_fragments,
        mma,
        shared_bytes,
        store_depth_sums,
        store_products,
        wait_copies,
    )
