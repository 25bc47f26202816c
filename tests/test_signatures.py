"""What records say and what kernels take is the same: a direct launch knows no names.

And how much a reader has to count: nothing of the host takes more than six arguments in a row.
"""
import ast
import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest

import densegrad
from densegrad import compiler, device
from densegrad.catalogue import kernel_variants
from densegrad.facts import number_of
from densegrad.families import FAMILIES
from densegrad.launches import flattened
from tests.example_family import family as example

ROOT = Path(__file__).parents[1]
SOURCE = Path(densegrad.__file__).parent
LAUNCHES = {**kernel_variants(), **dict(example.variants())}
#: one launch of each kernel, by its name
KERNELS = {launch.kernel: launch for launch in reversed(LAUNCHES.values())}
#: what a factory calls a field whose own name is that of one of the kernel's parameters
RENAMED = {"left": "left_side", "right": "right_side", "result": "epilogue", "sums": "sums_epilogue"}


def function_of(kernel):
    """A kernel's Python function: Numba's compiler and its simulator keep it under different names."""
    return kernel.fn if device.simulated() else kernel.py_func


def test_every_kernel_is_looked_at():
    """Every factory of the folder has a variant in the list."""
    factories = {node.name for path in (ROOT / "kernels").glob("*.py") for node in ast.parse(path.read_text()).body
                 if isinstance(node, ast.FunctionDef) and node.name.startswith("make_")}
    assert factories == {f"make_{kernel}" for kernel in KERNELS} - {"make_square_norms"}
    assert len(FAMILIES) == len(set(FAMILIES))


@pytest.mark.parametrize("kernel", KERNELS)
def test_arguments_are_the_kernels_parameters(kernel):
    launch = KERNELS[kernel]
    found = function_of(compiler.kernel_of(launch.module, kernel, launch.constants))
    assert found.__name__ == kernel
    assert tuple(inspect.signature(found).parameters) == launch.parameters
    assert len(launch.values) == len(launch.types) == len(launch.parameters)


@pytest.mark.parametrize("kernel", KERNELS)
def test_constants_are_unpacked_in_their_order(kernel):
    """The factory names each as its record does, what one record holds within another likewise; _ is one that it does
    not read itself.
    """
    launch = KERNELS[kernel]
    factory = getattr(import_module(launch.module), f"make_{kernel}")
    tree = ast.parse(inspect.getsource(inspect.unwrap(factory)))
    (target,) = [node.targets[0] for node in ast.walk(tree)
                 if isinstance(node, ast.Assign) and ast.unparse(node.value) == "constants"]
    wanted = expected_names(launch.constants, target)
    found = names_of(target)
    assert tuple(own if name == "_" else name for name, own in zip(found, wanted, strict=True)) == wanted


def names_of(target):
    """The names that are assigned to, tuples of them within."""
    return tuple(names_of(part) if isinstance(part, ast.Tuple) else part.id for part in target.elts)


def expected_names(record, target):
    """The names that a record's fields have where they are unpacked as the target does it."""
    names = []
    for position, (field, value) in enumerate(record._asdict().items()):
        if position < len(target.elts) and isinstance(target.elts[position], ast.Tuple):
            names.append((field, *value._fields[1:]))
        else:
            names.append(RENAMED[field] if field in RENAMED and not isinstance(value, str) else field)
    return tuple(names)


@pytest.mark.parametrize("kernel", KERNELS)
def test_each_argument_has_its_type(kernel):
    """Addresses and integers have 64 bits; a number has the type that results are scaled in, a tensor map its own."""
    launch = KERNELS[kernel]
    kinds = [kind for _, _, kind in flattened(launch.arguments)]
    assert set(kinds) <= {"Address", "Integer", "Number", "TensorMap"}
    types = {"Number": number_of(launch.constants), "TensorMap": "tensor_map"}
    assert launch.types == tuple(types.get(kind, "int64") for kind in kinds)
    assert set(launch.types) <= {"int64", "float32", "float64", "tensor_map"}


def test_each_field_is_explained_where_its_name_comes_first():
    explained = {}
    for name, line in re.findall(r"(?m)^    (\w+): (.+)$", (SOURCE / "signatures.py").read_text()):
        explained.setdefault(name, "  # " in line)
    assert len(explained) > 100
    assert not [name for name, told in explained.items() if not told]


# -- how many arguments in a row

MOST = 6
#: functions of other libraries that take more, and the commands, whose parameters are options of the command line
OTHERS = {"Table", "add_row", "cuLibraryLoadData", "cuTensorMapEncodeTiled", "partial"}
COMMANDS = SOURCE / "commands"
FILES = sorted(path for folder in (SOURCE, ROOT / "benchmarks", ROOT / "tests" / "example_family")
               for path in folder.rglob("*.py") if path.name not in ("kernel.py", "arrivals.py"))  # device code


def records():
    """The names of all records, whose fields are as many as a kernel needs, and of no other class."""
    trees = [ast.parse(path.read_text()) for path in FILES]
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    others = {node.name for node in classes if "NamedTuple" not in map(ast.unparse, node.bases)}
    return {node.name for node in classes} - others


def in_a_row(node, exempt):
    """How many positional parameters a function has, or arguments a call."""
    if isinstance(node, ast.Call):
        return 0 if ast.unparse(node.func).rpartition(".")[2] in exempt else len(node.args)
    names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def too_many(text, exempt, *, commands=False):
    """(line, how many) of all functions and calls with more than MOST in a row."""
    kinds = (ast.Call,) if commands else (ast.Call, ast.FunctionDef, ast.Lambda)
    found = [(node.lineno, in_a_row(node, exempt)) for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
    return [(line, count) for line, count in found if count > MOST]


def test_nobody_counts_arguments():
    exempt = records() | OTHERS
    found = {path.relative_to(path.parents[2]).as_posix(): too_many(
        path.read_text(), exempt, commands=path.parent == COMMANDS) for path in FILES}
    assert not {path: lines for path, lines in found.items() if lines}


def test_the_count_finds_what_it_looks_for():
    text = "def of(a, b, c, d, e, f, g): pass\nof(1, 2, 3, 4, 5, 6, 7)\nRecord(1, 2, 3, 4, 5, 6, 7)\nof(1, 2, 3, d=4)\n"
    assert too_many(text, {"Record"}) == [(1, 7), (2, 7)]
    assert not too_many("class A:\n    def of(self, a, b, c, d, e, f, *, g): pass\n", set())
