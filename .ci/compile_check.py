"""Judges the machine code of kernels, compiled and linked as launches do it, without a GPU.

The kernels are those of densegrad.catalogue, and those that the random calls of the tests launch. Refused are local
memory (spills), float64 arithmetic where neither operands nor results are float64, and what does not fit the launch:
its threads, its blocks' registers, its shared memory.

Each is judged for one compute capability in turn, for all of them with --all. With --one-in N every Nth of the
catalogue's is, and all that random calls launch. Machine code that is kept is not made again; what is made here is not
kept, since a rehearsal could not execute it.
"""
from __future__ import annotations

import argparse
import itertools
import os
import pathlib
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple
from unittest import mock

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks.host import Unlaunched
from densegrad import cache
from densegrad.catalogue import kernel_variants
from densegrad.compiler import compile_launch, kernel_of, key_of
from densegrad.launches import Launch
from densegrad.plans import TENSOR_CORE_CAPABILITY
from tests.random_calls import FUNCTIONS, Call

CAPABILITIES = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
#: those that the rehearsed tests compile for
REHEARSED = ((8, 0), (9, 0))
#: threads that a multiprocessor holds where it is not 1,536
RESIDENT = {(7, 5): 1024, (8, 0): 2048, (9, 0): 2048, (10, 0): 2048}
#: random calls of each function: those that the tests make, and the first of them where kernels are left out
SEEDS, FIRST_SEEDS = range(12), range(4)
#: arithmetic and conversions in SASS
FLOAT64 = re.compile(r"\s(U?D(ADD|MUL|FMA|SETP|MNMX|MMA)\b|[A-Z0-9.]+(\.F64|64H)\b)[^;]*")


class Used(NamedTuple):
    """What a kernel takes of a multiprocessor."""

    registers: int
    local_bytes: int
    shared_bytes: int


def used_by(cubin: bytes) -> Used:
    """What the ELF file of one kernel says: the attributes REGCOUNT and FRAME_SIZE, and memory that starts empty.

    Raises
    ------
    ValueError
        If it does not say how many registers it takes.
    """
    at, = struct.unpack_from("<Q", cubin, 0x28)
    count, = struct.unpack_from("<H", cubin, 0x3C)
    found, shared_bytes = {0x2F: 0, 0x11: 0}, 0
    for header in range(at, at + 64 * count, 64):
        kind, _, _, place, size = struct.unpack_from("<IQQQQ", cubin, header + 4)
        if kind == 8:  # without content: shared memory
            shared_bytes += size
        end = place + size if kind == 0x70000000 else 0  # attributes
        while place < end:
            form, attribute, length = struct.unpack_from("<BBH", cubin, place)
            if form == 4 and attribute in found:  # of a function, whose index comes first
                found[attribute] = max(found[attribute], struct.unpack_from("<I", cubin, place + 8)[0])
            place += 4 + (length if form == 4 else 0)
    registers, local_bytes = found.values()
    if not registers:
        raise ValueError("this machine code does not say how many registers it takes")
    return Used(registers, local_bytes, shared_bytes)


def judge(launch: Launch, capabilities: list[tuple[int, int]]) -> dict[tuple[int, int], str]:
    """What is wrong with a launch's kernel, by capability. Float64 is looked for once, in the first code."""
    from cuda.bindings import nvjitlink
    from numba.cuda.cudadrv import nvvm

    problems = {}
    for number, capability in enumerate(capabilities):
        try:
            code = cache.load(cache.name_of(launch, capability)) or compile_launch(launch, capability)
        except (nvvm.nvvmError, nvjitlink.nvJitLinkError) as error:
            problems[capability] = " ".join(str(error).split())[:300]
            continue
        problem = misfit(launch, capability, used_by(code.cubin))
        if not problem and not number and "float64" not in str(launch.constants):
            found = FLOAT64.search(disassembled(code.cubin))
            problem = f"float64 arithmetic: {found.group().strip()}" if found else ""
        if problem:
            problems[capability] = problem
    return problems


def misfit(launch: Launch, capability: tuple[int, int], used: Used) -> str:
    """What of the launch the kernel does not fit."""
    threads, blocks = kernel_of(launch.module, launch.kernel, launch.constants).targetoptions["launch_bounds"]
    whole = -(-threads // 32) * 32  # warps
    registers = min(blocks, RESIDENT.get(capability, 1536) // whole) * whole * -(-used.registers // 8) * 8
    shared_bytes = used.shared_bytes + launch.shared_bytes
    if used.local_bytes:
        return f"{used.local_bytes} bytes of local memory beside {used.registers} registers"
    if threads < launch.block:
        return f"compiled for at most {threads} threads, launched with {launch.block}"
    if registers > 65536:
        return f"{blocks} blocks of {threads} threads with {used.registers} registers do not fit on a multiprocessor"
    if shared_bytes > (227 if launch.alone else 64 if capability < (8, 0) else 99) * 1024:
        return f"{shared_bytes} bytes of shared memory"
    return ""


def launched_on(launch: Launch, capability: tuple[int, int]) -> bool:
    """Whether calls launch it there: float16 by 8 depths an instruction only where 16 are not to be had."""
    older = launch.kernel == "matmul_tensor_core" and launch.capability < TENSOR_CORE_CAPABILITY
    return launch.runs_on(capability) and not (older and capability >= TENSOR_CORE_CAPABILITY)


def disassembled(cubin: bytes) -> str:
    """The SASS of machine code, by nvdisasm: on PATH, or in the wheel nvidia-cuda-nvdisasm."""
    wheels = [path for folder in sys.path for path in pathlib.Path(folder).glob("nvidia/*/bin/nvdisasm")]
    tool = wheels[0] if wheels else shutil.which("nvdisasm")
    if not tool:
        sys.exit("nvdisasm was not found: pip install nvidia-cuda-nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-c", "-ndf", file.name], capture_output=True, text=True, check=True).stdout


class Aligned(Unlaunched):
    """A GPU of a compute capability whose memory is aligned as CuPy's, wherever NumPy's lies."""

    def __init__(self, capability: tuple[int, int]):
        super().__init__()
        self.has = capability

    def capability(self, place: str) -> tuple[int, int]:
        """Which plans ask for."""
        return self.has

    def address(self, array: np.ndarray) -> int:
        """Sixteen times where the array's memory begins, and on to its first element."""
        memory, owner = array, array
        while (owner := getattr(owner, "base", None)) is not None:
            memory = owner if isinstance(owner, np.ndarray) else memory
        begin = super().address(memory)
        return 16 * begin + super().address(array) - begin


def launched_by_random_calls(seeds: range) -> dict[str, Launch]:
    """The launches of the tests' random calls, one for each kernel, by the first call that makes it."""
    found: dict[str, Launch] = {}
    seen = set()
    for capability, function in itertools.product(REHEARSED, FUNCTIONS):
        with mock.patch("densegrad.device.current", return_value=Aligned(capability)):
            for seed in seeds:
                _, launches = Call(function, seed).run(np) or ({}, [])
                for number, launch in enumerate(launches):
                    if key_of(launch) not in seen:
                        seen.add(key_of(launch))
                        found[f"{launch.kernel}, launch {number + 1} of {function}, seed {seed}"] = launch
    return found


def main() -> None:
    """Judge all kernels, and say which have problems."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="for every compute capability, instead of one in turn")
    parser.add_argument("--capability", choices=["{}.{}".format(*one) for one in CAPABILITIES], action="append",
                        help="for this one; may be repeated")
    parser.add_argument("--one-in", type=int, default=1, metavar="N", help="of the catalogue only every Nth kernel")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="kernels whose name contains this")
    options = parser.parse_args()
    asked = [one for one in CAPABILITIES if "{}.{}".format(*one) in (options.capability or [])]
    jobs, seeds = {}, SEEDS if options.one_in == 1 else FIRST_SEEDS
    for kernels, capabilities, one_in in ((kernel_variants(), CAPABILITIES, options.one_in),
                                          (launched_by_random_calls(seeds), REHEARSED, 1)):
        for number, (name, launch) in enumerate(kernels.items()):
            if number % one_in:
                continue
            able = [capability for capability in asked or capabilities if launched_on(launch, capability)]
            jobs[name] = launch, able if asked or options.all else [able[number % len(able)]]
    jobs = {name: (launch, able) for name, (launch, able) in jobs.items() if able and options.only in name}
    failed = 0
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for name, problems in zip(jobs, pool.map(judge, *zip(*jobs.values(), strict=True)), strict=True):
            for capability in jobs[name][1]:
                if capability in problems:
                    failed += 1
                    print("FAIL {}: {}.{}: {}".format(name, *capability, problems[capability]), flush=True)
    print(f"{len(jobs)} kernels, {failed} problems")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
