"""Machine code that is kept: what its key depends on, and that nothing wrong with the folder gives a wrong kernel."""
import builtins
import importlib.metadata
import json
import logging
import os
import pickle
import platform
import re
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cuda import pathfinder

import densegrad
from densegrad import cache, calls, catalogue, compiler, device
from densegrad.compiler import Code
from densegrad.facts import MAP_WORDS

HOPPER = 9, 0
NOBODY = 65534
HERE = Path(densegrad.__file__).parent
VARIANTS = catalogue.kernel_variants()
#: a variant of each kernel, and of each list of types that it is compiled for
OF_EACH_KIND = list({(launch.kernel, launch.types): launch for launch in VARIANTS.values()}.values())
SUM = next(launch for launch in OF_EACH_KIND if launch.kernel == "sum_strided" and launch.types[-2] == "float32")
OTHER = next(launch for launch in OF_EACH_KIND if launch.kernel == "sum_strided" and launch.types[-2] == "float64")


def python(program, *arguments, **environment):
    """What a process prints in which Numba compiles, with no device to be seen."""
    kept = {name: value for name, value in os.environ.items() if name not in ("NUMBA_ENABLE_CUDASIM", "PYTHONPATH")}
    found = subprocess.run([sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)], capture_output=True,
                           text=True, timeout=300, env={**kept, **environment})
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The cache's folder, empty."""
    place = tmp_path / "kernels"
    monkeypatch.setenv("DENSEGRAD_CACHE_DIR", str(place))
    cache._say_once.cache_clear()
    return place


@pytest.fixture
def compiled(monkeypatch):
    """The launches that are compiled, by a stand-in whose machine code says what it is of."""
    launches = []

    def compile_launch(launch, capability):
        launches.append(launch)
        return code_for(launch, capability)

    monkeypatch.setattr(cache, "compile_launch", compile_launch)
    return launches


def code_for(launch, capability=HOPPER):
    return Code(b"\x7fELF\0" + repr((compiler.key_of(launch), capability)).encode(), launch.kernel)


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# -- what is kept


def test_a_kernel_is_compiled_once(folder, compiled, caplog):
    assert [cache.code_of(SUM, HOPPER) for _ in range(3)] == 3 * [code_for(SUM)]
    assert [cache.code_of(OTHER, HOPPER) for _ in range(2)] == 2 * [code_for(OTHER)]
    assert compiled == [SUM, OTHER]
    assert {file.path.name for file in cache.kept()} == {cache.name_of(one, HOPPER) for one in (SUM, OTHER)}
    assert not warnings(caplog)


def test_the_folder_is_the_users_alone(folder, compiled):
    mask = os.umask(0)
    try:
        cache.code_of(SUM, HOPPER)
    finally:
        os.umask(mask)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.path.stat().st_mode) for file in cache.kept()} == {0o600}


def test_the_folder_is_the_platforms_unless_it_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv("DENSEGRAD_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "densegrad" / "kernels"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DENSEGRAD_CACHE_DIR", "~/mine")
    assert cache.folder() == tmp_path / "mine"


def test_a_name_that_no_folder_can_have_holds_nothing(monkeypatch):
    monkeypatch.setenv("DENSEGRAD_CACHE_DIR", "/tmp/" + 300 * "a")
    assert (cache.kept(), cache.clear()) == ([], [])


def test_without_a_folder_nothing_is_kept(monkeypatch, tmp_path, compiled, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("DENSEGRAD_CACHE_DIR", "")
    assert [cache.code_of(SUM, HOPPER) for _ in range(2)] == 2 * [code_for(SUM)]
    assert (compiled, list(tmp_path.iterdir()), cache.kept()) == ([SUM, SUM], [], [])
    assert not warnings(caplog)


def test_what_was_not_used_for_longest_goes_first(folder, compiled, monkeypatch):
    first, second, third, fourth = list(VARIANTS.values())[:4]
    cache.code_of(first, HOPPER)
    monkeypatch.setattr(cache, "MOST_BYTES", int(3.5 * max(file.bytes for file in cache.kept())))
    (folder / "notes.txt").write_bytes(b"no kernel" * 1000)
    for seconds, launch in enumerate((first, second, third)):
        cache.code_of(launch, HOPPER)
        os.utime(folder / cache.name_of(launch, HOPPER), (1000 + seconds, 1000 + seconds))
    cache.code_of(first, HOPPER)  # used just now
    cache.code_of(fourth, HOPPER)
    assert {file.path.name for file in cache.kept()} == {cache.name_of(one, HOPPER) for one in (first, third, fourth)}
    assert sum(file.bytes for file in cache.kept()) <= cache.MOST_BYTES
    assert (folder / "notes.txt").exists()


def test_clearing_removes_kernels_and_nothing_else(folder, compiled):
    for launch in (SUM, OTHER):
        cache.code_of(launch, HOPPER)
    (folder / ".kernel-half_writt").write_bytes(b"a process was killed")
    (folder / "precious").write_text("mine")
    (folder / "folder").mkdir()
    assert len(cache.clear()) == 3
    assert sorted(path.name for path in folder.iterdir()) == ["folder", "precious"]
    assert cache.kept() == []
    cache.code_of(SUM, HOPPER)
    assert compiled == [SUM, OTHER, SUM]


# -- the key


def other_than(value):
    return not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else f"{value}0"


def test_the_key_is_of_each_constant():
    names = {cache.name_of(SUM, HOPPER)}
    for field, value in SUM.constants._asdict().items():
        names.add(cache.name_of(replace(SUM, constants=SUM.constants._replace(**{field: other_than(value)})), HOPPER))
    assert len(names) == 1 + len(SUM.constants)


def test_the_key_is_of_types_and_capability(monkeypatch):
    names = {cache.name_of(SUM, capability) for capability in ((8, 0), (8, 6), (9, 0), (12, 0))}
    monkeypatch.setattr(type(SUM), "types", ("int64", "float64"))
    assert len(names | {cache.name_of(SUM, HOPPER)}) == 5


def test_the_key_is_not_of_arguments_and_grids():
    """A Python int, a NumPy integer and a bool are all 64 bits to a kernel."""
    for value in (7, np.int32(7), True):
        other = replace(SUM, arguments=SUM.arguments._replace(samples=value), grid=(7, 7))
        assert cache.name_of(other, HOPPER) == cache.name_of(SUM, HOPPER)


@pytest.fixture
def tools():
    """What the toolchain was found to be is forgotten before and after the test."""
    cache._toolchain.cache_clear()
    yield
    cache._toolchain.cache_clear()


@pytest.mark.parametrize("distribution", ["numba", "numba-cuda", "llvmlite", "cuda-core", "nvidia-nvvm",
                                          "nvidia-nvjitlink"])
def test_the_key_is_of_the_versions_of_what_compiles(distribution, monkeypatch, tools):
    name, version = cache.name_of(SUM, HOPPER), importlib.metadata.version
    cache._toolchain.cache_clear()
    monkeypatch.setattr(importlib.metadata, "version", lambda of: version(of) + ".1" * (of == distribution))
    assert cache.name_of(SUM, HOPPER) != name


def test_the_key_is_of_pythons_version(monkeypatch, tools):
    name = cache.name_of(SUM, HOPPER)
    cache._toolchain.cache_clear()
    monkeypatch.setattr(platform, "python_version", lambda: "3.99.0")
    assert cache.name_of(SUM, HOPPER) != name


@pytest.mark.parametrize("library", ["nvvm", "nvJitLink"])
def test_the_key_is_of_the_very_library_where_that_comes_in_no_wheel(library, monkeypatch, tools, tmp_path):
    version, wheels = cache._version, cache._LIBRARIES[library]
    monkeypatch.setattr(cache, "_version", lambda of: "" if of in wheels else version(of))
    file = tmp_path / "library.so"
    monkeypatch.setattr(pathfinder, "load_nvidia_dynamic_lib", lambda name: SimpleNamespace(abs_path=str(file)))
    names = set()
    for content in (b"one", b"another"):
        file.write_bytes(content)
        cache._toolchain.cache_clear()
        names.add(cache.name_of(SUM, HOPPER))
    assert len(names) == 2


#: beside kernels' own files, what all keys are of, and some of what none is
READ_BY_ALL = ("signatures", "facts", "compiler")
READ_BY_NONE = ("calls", "device", "gradients", "cache", "families/batch_sum")
EDITED = """
    import json, pathlib, sys
    from densegrad import cache, catalogue

    root = pathlib.Path(sys.argv[1])
    assert pathlib.Path(cache.__file__).is_relative_to(root)
    launches = {}
    for launch in catalogue.kernel_variants().values():
        launches.setdefault(launch.kernel, launch)

    def names():
        cache.sources.cache_clear()
        cache._read.cache_clear()
        return {kernel: cache.name_of(launch, (9, 0)) for kernel, launch in launches.items()}

    before, changed = names(), {}
    beside = [root / "densegrad" / name for name in sys.argv[2:]]
    for path in [*sorted((root / "densegrad" / "kernels").rglob("*.py")), *beside]:
        text = path.read_bytes()
        path.write_bytes(text + b"\\n# another line\\n")
        after = names()
        changed[path.relative_to(root).as_posix()] = [kernel for kernel in before if before[kernel] != after[kernel]]
        path.write_bytes(text)
    assert names() == before and "numba" not in sys.modules
    print(json.dumps(changed))
"""
#: what each factory leads Python to read beside the standard library and what comes with a version: in a process that
#: has read nothing of the kind before
READ = """
    import json, multiprocessing, sys
    import numba.cuda
    from densegrad import catalogue, compiler
    launches = {launch.kernel: launch for launch in catalogue.kernel_variants().values()}
    before = {name for name in sys.modules if name.startswith("densegrad.")}

    def read(kernel):
        launch = launches[kernel]
        compiler.kernel_of(launch.module, launch.kernel, launch.constants)
        return [name for name in sys.modules if name.startswith("densegrad.") and name not in before]

    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as processes:
        print(json.dumps(dict(zip(launches, processes.map(read, launches, chunksize=1)))))
"""


@pytest.fixture(scope="module")
def changed_by(tmp_path_factory):
    """The kernels whose keys change with the text of a file in a copy of the package, by the file's path."""
    root = tmp_path_factory.mktemp("copy")
    shutil.copytree(HERE, root / "densegrad", ignore=shutil.ignore_patterns("__pycache__", "commands", "data"))
    kernels = Path(cache._spec_of("densegrad.kernels").origin).parent
    shutil.copytree(kernels, root / "densegrad" / "kernels", ignore=shutil.ignore_patterns("__pycache__"),
                    dirs_exist_ok=True)
    beside = [f"{name}.py" for name in (*READ_BY_ALL, *READ_BY_NONE, "activations", "errors", "launches")]
    return json.loads(python(EDITED, root, *beside, PYTHONPATH=str(root)))


KERNELS = {launch.kernel: launch for launch in VARIANTS.values()}


def test_the_key_is_of_every_file_that_the_factory_reads(changed_by):
    read = json.loads(python(READ))
    assert read.keys() == KERNELS.keys()
    for kernel, modules in read.items():
        assert KERNELS[kernel].module in modules
        files = [name.replace(".", "/") for name in modules] + [f"densegrad/{name}" for name in READ_BY_ALL]
        for file in files:
            path = f"{file}.py" if f"{file}.py" in changed_by else f"{file}/__init__.py"
            assert kernel in changed_by[path], f"{path} is read, but the key of {kernel} is not of its text"


def test_the_key_is_of_no_other_file(changed_by):
    for name in READ_BY_NONE:
        assert changed_by[f"densegrad/{name}.py"] == []
    assert set(changed_by["densegrad/kernels/add_parts.py"]) == {"add_parts"}
    assert set(changed_by["densegrad/signatures.py"]) == set(KERNELS)


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A launch whose kernel stands outside of this package, and the files that it is made of."""
    (tmp_path / "others" / "parts").mkdir(parents=True)
    files = {"others/__init__.py": "", "others/kernel.py": "from .parts import one\nimport beside\n",
             "others/parts/__init__.py": "", "others/parts/one.py": "def of():\n    from .. import two\n",
             "others/two.py": "import numpy, json\n", "beside.py": "", "others/unread.py": ""}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield replace(SUM, module="others.kernel"), tmp_path
    forget()


def forget():
    for memory in (cache.sources, cache._read, cache._spec_of):
        memory.cache_clear()


def test_the_key_of_a_kernel_outside_the_package_is_of_its_files(outside):
    launch, root = outside
    changed = set()
    for path in sorted(root.rglob("*.py")):
        forget()
        before = cache.name_of(launch, HOPPER)
        path.write_text(path.read_text() + "# another line\n")
        forget()
        if cache.name_of(launch, HOPPER) != before:
            changed.add(path.relative_to(root).as_posix())
    assert changed == {"others/kernel.py", "others/parts/__init__.py", "others/parts/one.py", "others/two.py",
                       "others/__init__.py", "beside.py"}
    assert "others" not in sys.modules


def test_nothing_is_kept_of_sources_that_have_changed_under_a_process(outside, folder, compiled, monkeypatch):
    """It may have imported them before: what it compiles belongs to a text that nobody knows any more."""
    launch, root = outside
    os.utime(root / "beside.py", (0, 0))  # as old as another file that has taken its place may be
    written = (root / "beside.py").stat().st_ctime
    monkeypatch.setattr(cache, "_IMPORTED", written - 1)
    assert [cache.code_of(launch, HOPPER) for _ in range(2)] == 2 * [code_for(launch)]
    assert (compiled, cache.kept()) == ([launch, launch], [])
    monkeypatch.setattr(cache, "_IMPORTED", written + 10)
    assert [cache.code_of(launch, HOPPER) for _ in range(2)] == 2 * [code_for(launch)]
    assert len(compiled) == 3


# -- under attack


def test_a_folder_that_cannot_be_listed_or_made_is_said(folder, monkeypatch, caplog):
    folder.mkdir(mode=0o700, exist_ok=True)
    with monkeypatch.context() as patched:
        patched.setattr(cache, "_files", lambda place: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
        assert cache.kept() == []
    assert f"{folder} cannot be listed" in caplog.text
    monkeypatch.setenv("DENSEGRAD_CACHE_DIR", "/proc/nowhere/kernels")
    assert not cache.usable()
    assert "kernels are not kept, since /proc/nowhere/kernels cannot be used" in caplog.text


def flip(position):
    def damage(path):
        content = bytearray(path.read_bytes())
        content[position] ^= 4
        path.write_bytes(content)
    damage.__name__ = f"flip_{position}"
    return damage


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def halve(path):
    content = path.read_bytes()
    path.write_bytes(content[:len(content) // 2])


def empty(path):
    path.write_bytes(b"")


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\0")


def foreign(path):
    path.write_bytes(b"\x7fELF" + bytes(1000))


def of_another_kernel(path):
    path.write_bytes((path.parent / cache.name_of(OTHER, HOPPER)).read_bytes())


DAMAGES = [flip(0), flip(20), flip(60), flip(-1), truncate, halve, empty, lengthen, foreign, of_another_kernel]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_file_is_compiled_again_and_replaced(damage, folder, compiled, caplog):
    for launch in (OTHER, SUM):
        cache.code_of(launch, HOPPER)
    path = folder / cache.name_of(SUM, HOPPER)
    damage(path)
    assert cache.code_of(SUM, HOPPER) == code_for(SUM)
    assert warnings(caplog) == [f"a kept kernel is damaged, so it is compiled again: {path}"]
    caplog.clear()
    assert cache.code_of(SUM, HOPPER) == code_for(SUM)
    assert compiled == [OTHER, SUM, SUM]
    assert not warnings(caplog)


def test_what_cannot_be_read_is_compiled_again(folder, compiled, caplog):
    path = folder / cache.name_of(SUM, HOPPER)
    path.mkdir(parents=True)
    folder.chmod(0o700)
    assert cache.code_of(SUM, HOPPER) == code_for(SUM)
    assert "a kept kernel could not be read" in warnings(caplog)[0]
    assert [found.name for found in folder.iterdir()] == [path.name]  # nothing half-written is left


WRITER = """
    import logging, pathlib, random, sys
    from densegrad import cache

    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    name, own, random = "0" * 64 + ".kernel", int(sys.argv[1]), random.Random(sys.argv[1])
    for _ in range(300):
        cache.keep(name, cache.Code(bytes([own]) * random.randrange(1, 200_000), f"entry{own}"))
        found = cache.load(name)
        assert found is not None and set(found.cubin) == {int(found.entry[5:])}, "a file that was not written whole"
"""


def test_processes_that_write_one_key_at_once_leave_a_whole_file(folder):
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    writers = [subprocess.Popen([sys.executable, "-c", textwrap.dedent(WRITER), str(number)], env=kept,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for number in (1, 2, 3)]
    for writer in writers:
        said, _ = writer.communicate(timeout=300)
        assert (writer.returncode, said) == (0, "")
    assert len(cache.kept()) == 1
    assert cache.load("0" * 64 + ".kernel") is not None


@pytest.fixture
def unprivileged(monkeypatch):
    """A folder of a user's own that permissions hold for: the superuser writes wherever there is space."""
    place = Path(tempfile.mkdtemp(dir="/tmp"))
    monkeypatch.setenv("DENSEGRAD_CACHE_DIR", str(place))
    cache._say_once.cache_clear()
    for launch in (SUM, OTHER):
        cache.name_of(launch, HOPPER)  # reads what another user may not be allowed to
    root = os.geteuid() == 0
    if root:
        os.chown(place, NOBODY, NOBODY)
        os.seteuid(NOBODY)
    try:
        yield place
    finally:
        place.chmod(0o700)
        if root:
            os.seteuid(0)
        shutil.rmtree(place)


def test_a_folder_that_may_only_be_read_serves_what_it_has(unprivileged, compiled, caplog):
    cache.code_of(SUM, HOPPER)
    unprivileged.chmod(0o500)
    assert cache.code_of(SUM, HOPPER) == code_for(SUM)
    assert not warnings(caplog)
    assert [cache.code_of(OTHER, HOPPER) for _ in range(2)] == 2 * [code_for(OTHER)]
    assert warnings(caplog) == [f"compiled kernels cannot be kept in {unprivileged}: Permission denied"]
    assert compiled == [SUM, OTHER, OTHER]


def test_a_folder_that_may_not_be_made_costs_the_cache(unprivileged, compiled, caplog, monkeypatch):
    monkeypatch.setenv("DENSEGRAD_CACHE_DIR", str(unprivileged / "inner"))
    unprivileged.chmod(0o500)
    assert [cache.code_of(SUM, HOPPER) for _ in range(2)] == 2 * [code_for(SUM)]
    assert len(warnings(caplog)) == 1
    assert f"kernels are not kept, since {unprivileged}/inner cannot be used" in warnings(caplog)[0]


def test_a_full_disk_costs_the_cache(folder, compiled, caplog):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        assert [cache.code_of(SUM, HOPPER) for _ in range(2)] == 2 * [code_for(SUM)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert warnings(caplog) == [f"compiled kernels cannot be kept in {folder}: File too large"]
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
def test_a_folder_that_others_may_write_to_is_refused(mode, folder, compiled, caplog):
    name = cache.name_of(SUM, HOPPER)
    cache.keep(name, Code(b"planted", "entry"))
    folder.chmod(mode)
    assert [cache.code_of(SUM, HOPPER) for _ in range(2)] == 2 * [code_for(SUM)]
    assert warnings(caplog) == [f"kernels are not kept, since others may write to {folder} (chmod 700 it, or set "
                                "DENSEGRAD_CACHE_DIR to a folder of your own)"]
    assert compiled == [SUM, SUM]


def test_a_folder_of_somebody_else_is_refused(folder, compiled, caplog, monkeypatch):
    cache.keep(cache.name_of(SUM, HOPPER), Code(b"planted", "entry"))
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    assert [cache.code_of(SUM, HOPPER) for _ in range(2)] == 2 * [code_for(SUM)]
    assert len(warnings(caplog)) == 1
    assert "others may write to" in warnings(caplog)[0]


def test_a_file_in_the_folders_place_costs_the_cache(folder, compiled, caplog):
    folder.write_text("mine")
    assert [cache.code_of(SUM, HOPPER) for _ in range(2)] == 2 * [code_for(SUM)]
    assert len(warnings(caplog)) == 1
    assert cache.kept() == []
    assert folder.read_text() == "mine"


# -- compiled kernels


COMPILED = """
    import json, sys
    from densegrad import cache, calls, catalogue, compiler, device

    counted = []
    library_of = compiler.library_of
    compiler.library_of = lambda *of: counted.append(of) or library_of(*of)
    launch = catalogue.kernel_variants()[sys.argv[1]]
    code = cache.code_of(launch, (9, 0))
    print(json.dumps([code.entry, code.cubin[:4].decode("latin1"), len(code.cubin), len(counted),
                      sorted({"numba", "llvmlite", "cuda.core"} & set(sys.modules))]))
"""


def test_a_second_process_compiles_nothing_and_imports_no_compiler(folder):
    name = next(name for name, launch in VARIANTS.items() if launch is SUM)
    first, second = (json.loads(python(COMPILED, name)) for _ in range(2))
    assert first[:3] == second[:3]
    assert first[1] == "\x7fELF"
    assert "numba" in first[4]
    assert (first[3], second[3], second[4]) == (1, 0, [])


@pytest.mark.parametrize(("spilling", "taken"), [((), 5), ((5,), 2), ((5, 2), 8), ((5, 2, 8), 5)])
def test_what_spills_is_linked_again(spilling, taken, monkeypatch):
    """And what spills however registers are taken stays as the linker gives it by itself."""

    class Linker:
        def __init__(self, code, options):
            self.use = int(options["ptxas_options"][1].rpartition("=")[2])

        def link(self, kind):
            return kind, self.use

        def get_info_log(self):
            return "ptxas warning : Registers are spilled to local memory" if self.use in spilling else ""

    library = SimpleNamespace(get_ltoir=lambda cc: b"")
    monkeypatch.setitem(sys.modules, "cuda.core", SimpleNamespace(
        Linker=Linker, LinkerOptions=dict, ObjectCode=SimpleNamespace(from_ltoir=bytes)))
    assert compiler.link(library, (12, 0, "a")) == ("cubin", taken)


def steps(xp):
    """Bits of what some calls give, whose kernels are those of every family but one."""
    x, w, dz = (xp.asarray((np.arange(size).reshape(shape) % 7 - 3).astype("float32")) for size, shape in (
        (40 * 24, (40, 24)), (24 * 16, (24, 16)), (40 * 16, (40, 16))))
    results = [*densegrad.dense_grads(x, w, dz), *densegrad.activation_grad(dz, dz, "gelu"),
               densegrad.bias_grad(dz, compensated=True),
               densegrad.weight_grad(x.astype("float16"), dz.astype("float16"))]
    return [result.get().tobytes() for result in results]


@pytest.mark.only("gpu")
def test_with_kept_kernels_calls_neither_compile_nor_import_numba(folder, xp, monkeypatch):
    """As in a second process: nothing is loaded, and Numba, which the first one has imported, is not asked for."""
    where, plain_import, asked = device.current(), builtins.__import__, []

    def watched_import(name, globals=None, *rest):
        if name.partition(".")[0] in ("numba", "llvmlite") and (globals or {}).get("__name__", "").startswith(
                "densegrad"):
            asked.append((globals["__name__"], name))
        return plain_import(name, globals, *rest)

    def forgotten():
        monkeypatch.setattr(where, "_functions", type(where._functions)())
        monkeypatch.setattr(calls, "_kept", type(calls._kept)())
        monkeypatch.setattr(builtins, "__import__", watched_import)
        asked.clear()

    forgotten()
    first = steps(xp)
    assert asked  # the watch sees what compiling imports
    assert len(cache.kept()) >= 5
    forgotten()
    for name in ("library_of", "kernel_of"):
        monkeypatch.setattr(compiler, name, lambda *of: pytest.fail("compiled in spite of what is kept"))
    assert (steps(xp), asked) == (first, [])


@pytest.mark.only("gpu")
@pytest.mark.parametrize("damage", [flip(-1), truncate, foreign], ids=lambda damage: damage.__name__)
def test_a_damaged_file_never_reaches_the_device(damage, folder, xp, monkeypatch, caplog):
    where, dz = device.current(), xp.ones((5, 3), "float32")
    for attacked in (False, True, False):
        monkeypatch.setattr(where, "_functions", type(where._functions)())
        monkeypatch.setattr(calls, "_kept", type(calls._kept)())
        if attacked:
            damage(cache.kept()[0].path)
        caplog.clear()
        assert densegrad.bias_grad(dz).tolist() == [5, 5, 5]
        assert len(warnings(caplog)) == attacked


PARAMETERS = """
    import json, pickle, sys
    from densegrad import compiler

    found = []
    for launch in pickle.load(sys.stdin.buffer):
        ptx = compiler.ptx_of(launch, max(launch.capability, (8, 0)))
        kernel = compiler.kernel_of(launch.module, launch.kernel, launch.constants).py_func
        code = kernel.__code__
        found.append([ptx[ptx.index(".entry"):].partition(")")[0], code.co_varnames[:code.co_argcount]])
    print(json.dumps(found))
"""


def test_what_is_packed_is_what_the_compiled_kernel_takes():
    """In its order, by the names in the kernel's source, and in its sizes, by the parameters of the linked PTX."""
    kept = {name: value for name, value in os.environ.items() if name != "NUMBA_ENABLE_CUDASIM"}
    found = subprocess.run([sys.executable, "-c", textwrap.dedent(PARAMETERS)], input=pickle.dumps(OF_EACH_KIND),
                           capture_output=True, timeout=600, env=kept)
    assert found.returncode == 0, found.stderr.decode()
    for launch, (entry, names) in zip(OF_EACH_KIND, json.loads(found.stdout), strict=True):
        types = [{"u64": "int64", "b64": "int64", "f64": "float64", "f32": "float32"}[kind]
                 for kind in re.findall(r"\.param \.(\w+)", entry)]
        expected = [one for kind in launch.types
                    for one in (["int64"] * MAP_WORDS if kind == "tensor_map" else [kind])]
        assert (tuple(names), types) == (launch.parameters, expected), launch.kernel
        assert len(launch.values) == len(names)
