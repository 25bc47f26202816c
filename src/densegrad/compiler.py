"""Launches -> kernels: the only caller of densegrad.kernels.

Numba compiles a kernel the way its dispatcher does, with optimisation at link time, but for a stated compute capability
and argument types: no device is needed, and a bool or a NumPy integer never makes a second version.
"""
from __future__ import annotations

import importlib
import logging
import threading
import time
from collections.abc import Hashable
from functools import lru_cache
from typing import Any, NamedTuple

from .facts import MAP_WORDS
from .launches import Launch

log = logging.getLogger("densegrad")
_compiling = threading.RLock()  # Numba's compiler is not made for several threads
#: how freely ptxas takes registers: as it does by itself, sparingly, freely
_REGISTER_USES = (5, 2, 8)


class Code(NamedTuple):
    """Machine code of one kernel, and the name of its entry."""

    cubin: bytes
    entry: str


def key_of(launch: Launch) -> tuple[Hashable, ...]:
    """What the kernel of a launch follows from, beside the compute capability."""
    return launch.module, launch.kernel, launch.constants, launch.types


@lru_cache(maxsize=1024)
def kernel_of(module: str, name: str, constants: Any) -> Any:
    """The kernel as Numba's decorator gives it, for these constants."""
    return getattr(importlib.import_module(module), f"make_{name}")(constants)


def library_of(launch: Launch, capability: tuple[int, int]) -> Any:
    """Numba's code library of a launch's kernel for this compute capability, whose `get_cubin(architecture)` links."""
    from numba.core import types
    from numba.cuda.compiler import compile_cuda, kernel_fixup
    from numba.cuda.cudadrv import nvvm

    kernel = kernel_of(launch.module, launch.kernel, launch.constants)
    of_map = types.containers.UniTuple(types.int64, MAP_WORDS)
    arguments = tuple(of_map if name == "tensor_map" else getattr(types, name) for name in launch.types)
    compiled = compile_cuda(kernel.py_func, types.void, arguments, nvvm_options={"fastmath": False, "opt": 3},
                            cc=capability, lto=True)
    library = compiled.library
    function = library.get_function(compiled.fndesc.llvm_func_name)
    library._entry_name = compiled.fndesc.llvm_func_name
    kernel_fixup(function, False)
    nvvm.set_launch_bounds(function, kernel.targetoptions["launch_bounds"])
    return library


def architecture_of(capability: tuple[int, int]) -> tuple[int, int, str]:
    """With the suffix of all instructions of this very generation, as Numba's dispatcher takes it from 9.0 on."""
    return (*capability, "a" if capability >= (9, 0) else "")


def link(library: Any, architecture: tuple[int, int, str]) -> Any:
    """The object with the machine code of a code library: the first in which no registers spill, or else the first.

    What spills within the bounds of a launch often does not if ptxas is told to take registers more sparingly, or more
    freely, than it does by itself.
    """
    from cuda.core import Linker, LinkerOptions, ObjectCode

    code = ObjectCode.from_ltoir(library.get_ltoir(cc=architecture))
    linked = []
    for use in _REGISTER_USES:
        linker = Linker(code, options=LinkerOptions(
            arch="sm_{}{}{}".format(*architecture), link_time_optimization=True,
            ptxas_options=["--warn-on-spills", f"--register-usage-level={use}"]))
        linked.append(linker.link("cubin"))
        if "Registers are spilled" not in linker.get_info_log():
            return linked[-1]
    return linked[0]


def compile_launch(launch: Launch, capability: tuple[int, int]) -> Code:
    """The machine code of a launch's kernel, compiled and linked anew. Says so on the log: a call may wait for it."""
    log.info("compiling %s for compute capability %d.%d", launch.kernel, *capability)
    begun = time.perf_counter()
    with _compiling:
        library, architecture = library_of(launch, capability), architecture_of(capability)
        library._cubin_cache[architecture] = link(library, architecture)  # what the library gives whoever asks for it
        cubin = library.get_cubin(architecture)
    log.debug("compiled %s in %.1f s", launch.kernel, time.perf_counter() - begun)
    return Code(bytes(getattr(cubin, "code", cubin)), library._entry_name)


def ptx_of(launch: Launch, capability: tuple[int, int]) -> str:
    """The PTX of a launch's kernel after linking, for every GPU from this compute capability on that runs it.

    Raises
    ------
    ValueError
        If the compiler does not know the compute capability.
    """
    check_capability(capability)
    with _compiling:
        target = architecture_of(capability) if launch.alone else capability
        return library_of(launch, capability).get_lto_ptx(target).rstrip("\0")


def check_capability(capability: tuple[int, int]) -> None:
    """Hold a compute capability to those that the compiler makes code for.

    Raises
    ------
    ValueError
        If it knows it not.
    """
    from numba.cuda.cudadrv.nvrtc import get_supported_ccs

    if capability not in get_supported_ccs():
        raise ValueError("the compiler that is installed makes no code for sm_{}{}".format(*capability))
