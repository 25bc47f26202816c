"""Compiles every kernel variant and assembles it, without a GPU.

Each variant is compiled to PTX for the least compute capability that has its instructions, which is refused if it has
local memory, or float64 where neither operands nor result are. ptxas then assembles it for two of the architectures
from there on in turn, for all of them with --all, and spills are refused.
"""
import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


def check(name: str, architectures: list[str]) -> str:
    """What is wrong with a variant, or an empty string."""
    from numba import cuda

    variant = variants()[name]
    ptx, _ = cuda.compile(variant.kernel.py_func, variant.signature, cc=variant.min_cc, output="ptx", device=False,
                          abi="numba", launch_bounds=(variant.threads, 1))
    ptx = ptx if isinstance(ptx, str) else ptx.decode()
    code = "\n".join(line.split("//")[0] for line in ptx.splitlines())
    if ".local" in code:
        return "local memory"
    if "float64" not in name and re.search(r"\.f64\b", code):
        return "float64 arithmetic"
    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        major, minor = variant.min_cc
        able = [name for name in architectures if int(name.removeprefix("sm_")) >= 10 * major + minor]
        for architecture in able:
            done = subprocess.run([assembler(), "-v", f"-arch={architecture}", source, "-o", f"{folder}/out"],
                                  capture_output=True, text=True)
            if done.returncode:
                return f"{architecture}: {done.stderr.strip()}"
            if re.search(r"[1-9]\d* bytes spill", done.stderr):
                return f"{architecture}: spills"
    return ""


def variants():
    from densegrad.catalogue import kernel_variants

    return kernel_variants()


def assembler() -> str:
    """The path of ptxas: on PATH, or in the wheel nvidia-cuda-nvcc."""
    found = shutil.which("ptxas")
    wheels = [path for folder in sys.path for path in pathlib.Path(folder).glob("nvidia/*/bin/ptxas")]
    if not wheels and not found:
        sys.exit("ptxas was not found: pip install nvidia-cuda-nvcc")
    return str(wheels[0] if wheels else found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="assemble every variant for every architecture")
    everything = parser.parse_args().all
    names = list(variants())
    chosen = [ARCHITECTURES if everything else [ARCHITECTURES[n % 7], ARCHITECTURES[(n + 3) % 7]]
              for n in range(len(names))]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(check, names, chosen))
    for name, problem in zip(names, found, strict=True):
        if problem:
            print(f"FAIL {name}: {problem}")
    print(f"{len(names)} kernel variants, {sum(map(bool, found))} with problems")
    sys.exit(any(found))


if __name__ == "__main__":
    main()
