"""A primitive: who comes last. In two kinds, as all primitives are."""
from numba import config

if config.ENABLE_CUDASIM:
    import numpy as np

    def arrive(address, index):
        """Count this thread's block at the index; how many were counted there before."""
        before = int(address.read(index, 1)[0])
        address.write(index, np.array([before + 1]))
        return before
else:
    from llvmlite import ir
    from numba.cuda import types
    from numba.cuda.extending import intrinsic
    from numba.cuda.typing import signature

    @intrinsic
    def arrive(context, address, index):
        """Count this thread's block at the index; how many were counted there before.

        What the block has stored before its last barrier is seen by whoever is counted later, and what those have
        stored by this one. Source: PTX ISA, "Memory Consistency Model", and the CUDA sample threadFenceReduction.
        """

        def emit(context, builder, sig, arguments):
            first, place = (context.cast(builder, value, have, types.int64)
                            for value, have in zip(arguments, sig.args, strict=True))
            pointer = builder.add(first, builder.mul(place, ir.Constant(ir.IntType(64), 4)))
            code = "fence.acq_rel.gpu; atom.relaxed.gpu.global.add.u32 $0, [$1], 1; fence.acq_rel.gpu;"
            return builder.asm(ir.FunctionType(ir.IntType(32), [pointer.type]), code, "=r,l,~{memory}", [pointer],
                               side_effect=True)

        return signature(types.int32, address, index), emit
