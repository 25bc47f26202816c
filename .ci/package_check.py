"""Builds sdist and wheel, holds them to the tracked files, and tries both in a virtual environment of their own.

The wheel is built from the sdist. It must have the tracked files of src/densegrad and kernels and nothing else, the
sdist every tracked file. Installed, type checkers follow the wheel, and its demo runs in the simulator; in the unpacked
sdist all tests are collected, and a core of them passes against the installed wheel. `--keep FOLDER` keeps what passed.
"""
import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: what setuptools adds to an sdist
ADDED = ("PKG-INFO", "setup.cfg", "src/densegrad.egg-info/")
#: where the files of the wheel's packages lie
FOLDERS = {"src/densegrad/": "densegrad/", "kernels/": "densegrad/kernels/"}
CORE = ("tests/test_matmul_plans.py", "tests/test_operands.py", "tests/test_package.py")


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> None:
    """Run a command; if it fails, show what it said and end with its status."""
    print("==", *command, flush=True)
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    if done.returncode:
        print(done.stdout)
        sys.exit(done.returncode)


def tracked() -> set[str]:
    """The files that git knows."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name for name in listed.splitlines() if (ROOT / name).exists()}


def in_wheel(name: str) -> str | None:
    """Where a tracked file lies in the wheel, if it belongs there."""
    return next((to + name.removeprefix(folder) for folder, to in FOLDERS.items() if name.startswith(folder)), None)


def hold(what: str, got: set[str], wanted: set[str]) -> None:
    """End with the names that are missing or too many."""
    if got != wanted:
        sys.exit(f"the {what} lacks {sorted(wanted - got)} and has {sorted(got - wanted)} beside them")


def main() -> None:
    """Build, compare, try."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where sdist and wheel are kept if all is well")
    keep = parser.parse_args().keep
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        run(sys.executable, "-m", "build", "--outdir", work, ROOT)
        (wheel,), (sdist,) = work.glob("*.whl"), work.glob("*.tar.gz")
        run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)
        names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
        hold("wheel", names, {place for name in tracked() if (place := in_wheel(name))})
        with tarfile.open(sdist) as archive:
            archive.extractall(work, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        unpacked = work / sdist.name.removesuffix(".tar.gz")
        files = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
        hold("sdist", {name for name in files if not name.startswith(ADDED)}, tracked())

        venv.create(work / "new", with_pip=True)
        programs = work / "new" / "bin"
        run(programs / "pip", "install", "-q", f"{wheel}[test]")
        # In a folder without this repository, what is installed is what type checkers find.
        calls, python = shutil.copy(ROOT / "tests" / "typed_calls.py", work), programs / "python"
        run(sys.executable, "-m", "mypy", "--strict", "--config-file=", "--python-executable", python, calls, cwd=work)
        run(sys.executable, "-m", "pyright", "--pythonpath", python, calls, cwd=work)
        run(programs / "densegrad", "demo", "--steps", "1", cwd=work, NUMBA_ENABLE_CUDASIM="1")
        pytest = (programs / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--lane", "simulator")
        run(*pytest, "--collect-only", "-qq", cwd=unpacked)
        run(*pytest, *CORE, cwd=unpacked)
        if keep:
            keep.mkdir(parents=True, exist_ok=True)
            for path in (wheel, sdist):
                shutil.copy(path, keep)


if __name__ == "__main__":
    main()
