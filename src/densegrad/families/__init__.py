"""Families of kernels: each is one file with its plans, the choice among them, its launches and its variants.

A family module has `variants()`: (name, launch) of the kernels that are worth compiling ahead, one for each way in
which layers launch them.
"""

#: every family's module; what is named here is listed, compiled ahead and checked
FAMILIES = [
    "densegrad.families.batch_sum",
    "densegrad.families.add_parts",
    "densegrad.families.upstream",
    "densegrad.families.cross_entropy",
    "densegrad.families.matmul_simt",
    "densegrad.families.matmul_thin",
    "densegrad.families.matmul_tensor_core",
    "densegrad.families.turn_operand",
    "densegrad.families.matmul_hopper",
]
