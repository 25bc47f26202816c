"""The arrows between modules go one way, and importing the package costs nothing."""
import ast
import functools
import subprocess
import sys
import time
from pathlib import Path

import pytest

import densegrad
from densegrad.cache import sources

SOURCE = Path(densegrad.__file__).parent
KERNELS = Path(__file__).parents[1] / "kernels"

#: what every family may import of what lies outside: that which says what launches are
OF_LAUNCHES = {".errors", ".facts", ".launches", ".signatures"}
#: module -> those beside it that it may import, and with a dot those beside its folder; kernels are one more of them
ARROWS = {
    "__init__": {"accumulator", "calls", "device", "errors", "gradients", "launches", "layers", "losses", "plans",
                 "prepared", "reference", "output_gradients", "tuned", "typing", "warming"},
    "__main__": {"commands"},
    "errors": set(),
    "slips": set(),
    "typing": set(),
    "activations": set(),
    "reference": {"activations"},
    "layers": set(),
    "folds": set(),
    "staging": set(),
    "facts": set(),
    "signatures": {"facts"},
    "launches": {"facts", "signatures"},
    "families/__init__": set(),
    "families/common": OF_LAUNCHES | {".slips"},
    "families/batch_sum": OF_LAUNCHES | {"common"},
    "families/add_parts": OF_LAUNCHES | {"common"},
    "families/upstream": OF_LAUNCHES | {".activations", "batch_sum", "common"},
    "families/cross_entropy": OF_LAUNCHES | {"batch_sum", "common", "upstream"},
    "families/cost": {".facts", "common"},
    "families/tiling": OF_LAUNCHES | {"add_parts", "batch_sum", "common", "cost"},
    "families/matmul_simt": OF_LAUNCHES | {"common", "tiling"},
    "families/matmul_tensor_core": OF_LAUNCHES | {"common", "tiling"},
    "families/turn_operand": OF_LAUNCHES | {"common", "tiling"},
    "families/matmul_hopper": OF_LAUNCHES | {"batch_sum", "common", "cost", "tiling", "turn_operand"},
    "families/matmul_thin": OF_LAUNCHES | {"common", "cost", "tiling"},
    "families/product": {".errors", ".facts", ".slips", "common", "cost", "matmul_hopper", "matmul_simt",
                         "matmul_tensor_core", "matmul_thin", "tiling"},
    "plans": {"facts", "families"},
    "compiler": {"facts", "launches"},
    "cache": {"compiler", "launches"},
    "catalogue": {"compiler", "families", "launches"},
    "estimate": {"launches"},
    "tensors": set(),
    "containers": {"tensors"},
    "packing": {"errors", "facts", "launches"},
    "device": {"cache", "compiler", "containers", "errors", "estimate", "launches", "packing",
               "staging", "tensors"},
    "operands": {"containers", "device", "errors", "facts", "launches", "slips"},
    "tuned": {"__version__", "errors", "families"},
    "calls": {"containers", "device", "errors", "facts", "launches", "operands", "tuned"},
    "prepared": {"calls", "errors", "launches", "operands", "typing"},
    "gradients": {"calls", "containers", "distributed", "errors", "families", "launches", "operands",
                  "output_gradients", "slips", "tuned", "typing"},
    "output_gradients": {"activations", "calls", "errors", "families", "launches", "operands", "slips", "typing"},
    "losses": {"calls", "errors", "families", "launches", "operands", "output_gradients", "slips", "typing"},
    "accumulator": {"calls", "containers", "device", "distributed", "errors", "facts", "folds", "gradients", "launches",
                    "operands", "output_gradients", "slips", "tensors", "typing"},
    "distributed/__init__": {".errors", ".folds", "agreement", "messages", "reductions"},
    "distributed/engines": {".tensors"},
    "distributed/messages": set(),
    "distributed/lines": {"engines", "messages"},
    "distributed/agreement": {".__version__", ".errors", "engines", "lines", "messages"},
    "distributed/buckets": {".containers", ".device", ".errors", ".facts", ".slips", ".tensors", "engines"},
    "distributed/reductions": {".device", ".errors", ".facts", ".folds", ".slips", ".typing", "agreement", "buckets",
                               "engines", "messages"},
    "jax": {"activations", "containers", "device", "errors", "facts", "gradients", "operands", "slips", "typing"},
    "torch/__init__": {"layers", "loss", "main_grads"},
    "torch/common": {".device", ".errors", ".tensors"},
    "torch/layers": {".activations", ".errors", ".gradients", ".operands", ".slips", ".typing", "common"},
    "torch/main_grads": {".distributed", ".typing"},
    "torch/loss": {".errors", ".losses", ".slips", ".typing", "common"},
    "warming": {"cache", "compiler", "device", "errors", "facts", "families", "gradients", "launches",
                "losses", "output_gradients", "slips", "typing"},
    "testing": {"activations", "device", "plans", "reference"},
}
#: what is not the standard library -> the modules that may import it
OUTSIDE = {
    "numpy": {"accumulator", "containers", "device", "distributed/buckets", "distributed/engines", "folds", "operands",
              "reference", "tensors", "testing", "warming"},
    "ml_dtypes": {"containers", "device", "tensors"},
    "cupy": {"device"},
    "cuda": {"cache", "compiler", "device", "packing"},
    "numba": {"compiler", "device", "staging"},
    "platformdirs": {"cache"},
    "typing_extensions": {"gradients", "losses", "output_gradients", "typing"},
    "jax": {"jax"},
    "torch": {"torch/__init__", "torch/common", "torch/layers", "torch/loss", "torch/main_grads"},
}
#: the command line may use the whole package, but only `python -m densegrad` uses the command line
COMMANDS = SOURCE / "commands"
#: what kernels may import from outside, and which kind of their primitives more than that
OF_KERNELS = {"math", "numba", "typing"}
OF_PRIMITIVES = {"factories": {"functools", "types"}, "ptx": {"llvmlite"},
                 "simulator": {"ml_dtypes", "numpy", "threading"}}


@functools.cache
def imports(path, package):
    """(modules of the package, modules from outside) that a file imports, wherever in it."""
    own, outside = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            of_package = node.level and not node.module
            names = [(node.level, alias.name if of_package else node.module) for alias in node.names]
        else:
            continue
        for level, name in names:
            head, _, rest = name.partition(".")
            if level or head == package:
                own.add("." * (level - 1) + (name if level else rest).partition(".")[0])
            else:
                outside.add(head)
    return own, {name for name in outside if name != "__future__"}


@pytest.mark.parametrize("module", ARROWS)
def test_arrows_go_one_way(module):
    own, outside = imports(SOURCE / f"{module}.py", "densegrad")
    assert own <= ARROWS[module]
    foreign = outside - sys.stdlib_module_names
    assert foreign == {name for name in foreign if module in OUTSIDE.get(name, ())}


def reached(module):
    """All that a module imports, directly or not: others of the package by their paths, the rest by their names."""
    found, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            path = SOURCE / f"{name}.py" if not name.startswith("kernels/") else KERNELS.parent / f"{name}.py"
            own, outside = imports(path, "densegrad")
            found |= outside - sys.stdlib_module_names
            waiting += [other for one in own for other in _paths(name, one)]
    return found - {module}


def _paths(module, imported):
    """The modules that a name stands for which a module imports: a package's are its __init__ and what is beside."""
    folder = Path(module).parent
    for _ in range(len(imported) - len(imported.lstrip("."))):
        folder = folder.parent
    name = imported.lstrip(".")
    place = (folder / name).as_posix() if name else folder.as_posix()
    base = KERNELS.parent if place.startswith("kernels") else SOURCE
    if (base / place).is_dir():
        inside = [path.relative_to(base).with_suffix("").as_posix() for path in (base / place).glob("*.py")]
        return [one for one in inside if place != "kernels" or one == "kernels/__init__"]
    return [place] if (base / f"{place}.py").exists() else []


#: modules that say what is launched, and what that is made of
OF_VALUES = ["activations", "facts", "signatures", "launches", "plans",
             *(name for name in ARROWS if name.startswith("families/"))]


@pytest.mark.parametrize("module", OF_VALUES)
def test_what_is_launched_is_said_without_device_arrays_or_compiler(module):
    """Not in a roundabout way either."""
    assert reached(module) <= {"errors", "slips", *OF_VALUES}


def test_nothing_imports_itself_in_a_roundabout_way():
    for module in ARROWS:
        own, _ = imports(SOURCE / f"{module}.py", "densegrad")
        for other in {path for one in own for path in _paths(module, one)} - {"families/__init__"}:
            assert module not in reached(other), (module, other)


def test_launches_are_made_without_numba_cupy_and_device():
    """In a fresh process, with a package that stands for densegrad and imports nothing by itself."""
    program = (
        "import sys, types; package = types.ModuleType('densegrad'); package.__path__ = [sys.argv[1]]; "
        "sys.modules['densegrad'] = package; from importlib import import_module; "
        "from densegrad.families import FAMILIES; import densegrad.plans; "
        "made = [launch for family in FAMILIES for _, launch in import_module(family).variants()]; "
        "assert len(made) > 100 and all(map(str, made)); "
        "foreign = {'numba', 'cupy', 'cuda', 'llvmlite', 'numpy', 'ml_dtypes', 'torch', 'jax'} & set(sys.modules); "
        "own = {name for name in sys.modules if name.startswith('densegrad.')}; "
        "print(*sorted(foreign), *sorted(name for name in own if name.partition('.')[2] in sys.argv[2:]))")
    others = [module.replace("/", ".") for module in ARROWS if module not in {"errors", "slips", *OF_VALUES}]
    found = subprocess.run([sys.executable, "-c", program, str(SOURCE), *others], capture_output=True, text=True,
                           timeout=120)
    assert (found.returncode, found.stdout.strip(), found.stderr) == (0, "", "")


def test_every_module_has_its_arrows():
    paths = [path for folder in (".", "distributed", "families", "torch") for path in (SOURCE / folder).glob("*.py")]
    assert {path.relative_to(SOURCE).with_suffix("").as_posix() for path in paths} == ARROWS.keys()


@pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.py")), ids=lambda path: path.stem)
def test_kernels_are_leaves(path):
    own, outside = imports(path, "densegrad")
    own = {name.removeprefix(".").removeprefix(".") for name in own}
    assert own <= {other.stem for other in KERNELS.rglob("*.py")} | {"primitives", "activations", "facts", "signatures"}
    more = OF_PRIMITIVES.get(path.stem.rpartition("_")[2], set()) if path.parent.name == "primitives" else set()
    assert outside <= OF_KERNELS | more


@pytest.mark.parametrize("prefix", ["number_", "", "tile_", "warp_"])
def test_every_primitive_has_both_twins(prefix):
    """For the compiler and for the simulator; the simulator's warps have their barrier besides."""
    of_ptx, of_simulator = (
        {node.name for node in ast.parse((KERNELS / "primitives" / f"{prefix}{kind}.py").read_text()).body
         if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")} for kind in ("ptx", "simulator"))
    assert of_ptx == of_simulator - {"exchange"}


def test_kept_machine_code_follows_from_activations_too():
    """The name of its file has the text of every module that the kernel's reads."""
    assert {"densegrad.activations", "densegrad.kernels.primitives.number_ptx"} <= {
        source.module for source in sources("densegrad.kernels.upstream")}


def test_only_the_device_knows_of_the_simulator():
    """The other exception is the one line that chooses between the two kinds of primitives."""
    knowing = {path.relative_to(path.parents[1]).as_posix()
               for folder in (SOURCE, KERNELS) for path in folder.rglob("*.py")
               if "ENABLE_CUDASIM" in path.read_text() and path.parent != COMMANDS}
    assert knowing == {"densegrad/device.py", "primitives/__init__.py"}


def test_what_the_package_offers_is_loaded_when_it_is_asked_for():
    named = {node.asname or node.name: node for node in ast.walk(ast.parse((SOURCE / "__init__.py").read_text()))
             if isinstance(node, ast.alias)}
    offered = {name for name in named if not name.startswith(("_", "TYPE_CHECKING"))}
    assert offered | set(densegrad._WHERE) == {*densegrad.__all__, *densegrad._MODULES}
    assert all(getattr(densegrad, name) is not None for name in offered)
    assert offered <= set(dir(densegrad))
    with pytest.raises(AttributeError, match="module 'densegrad' has no attribute 'nonsense'"):
        densegrad.nonsense  # noqa: B018


def seconds(program):
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
    return time.perf_counter() - begun


def test_importing_takes_no_longer_than_importing_numpy():
    """The best of several processes each, one after the other, since a busy machine makes any of them slow."""
    ours, numpys = zip(*((seconds("import densegrad"), seconds("import numpy")) for _ in range(5)), strict=True)
    print(f"import densegrad {min(ours):.3f} s, import numpy {min(numpys):.3f} s")
    assert min(ours) <= 1.2 * min(numpys)


def test_importing_is_light_and_leaves_the_choice_of_device_open():
    program = ("import os, sys; before = dict(os.environ); import densegrad; "
               "assert not {'numba', 'cupy', 'torch', 'jax', 'llvmlite'} & set(sys.modules), 'imported too early'; "
               "assert dict(os.environ) == before; "
               "os.environ['NUMBA_ENABLE_CUDASIM'] = '1'; import numpy; "
               "print(densegrad.bias_grad(numpy.ones((2, 3), 'float32')))")
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (found.returncode, found.stdout, found.stderr) == (0, "[2. 2. 2.]\n", "")


def test_without_a_device_a_call_names_both_ways_out():
    program = "import densegrad, numpy; densegrad.bias_grad(numpy.ones((2, 3), 'float32'))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120,
                           env={"PATH": "", "CUDA_VISIBLE_DEVICES": "-1"})
    message = found.stderr.splitlines()[-1]
    assert message.startswith("densegrad.errors.DeviceError: densegrad found no GPU")
    assert "cupy-cuda13x" in message
    assert "NUMBA_ENABLE_CUDASIM=1" in message
