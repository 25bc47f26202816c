"""Device code: the CUDA kernels of densegrad and the primitives they are written in.

Nothing here launches, allocates or decides; see ``densegrad.families`` and ``densegrad.calls`` for that.
"""
