"""A family of kernels outside of the package: the squared norms of rows.

All that belongs to a kernel, and nothing that the package would have to know of: one line in
`densegrad.families.FAMILIES` has it listed, compiled and checked. What its function gives can be called, prepared and
captured like every other.

signatures.py   what the kernel is made of and what it takes
kernel.py       device code
arrivals.py     a primitive of its own, in its two kinds
family.py       plan, choice, launches, variants
function.py     the function that users call
meaning.py      the same in float64, and how far a result may be off
"""
