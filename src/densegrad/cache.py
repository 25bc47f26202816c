"""Machine code that is kept between processes: one file a kernel, in a folder of the user's own.

The folder is the platform's for caches; DENSEGRAD_CACHE_DIR names another one, and is empty to go without. A file is
written whole or not at all, and loaded only if it is what was written under this key. Whatever is wrong with the folder
or a file costs the cache, not the call; it is said on the log. Nothing but kernels is ever removed from the folder.
"""
from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.metadata
import logging
import os
import platform
import re
import stat
import sys
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import platformdirs

from .compiler import Code, architecture_of, compile_launch, key_of
from .launches import Launch

log = logging.getLogger("densegrad")

#: how much the folder may hold; what was not used for longest goes first
MOST_BYTES = 256 * 2 ** 20
_MAGIC = b"densegrad kernel 1\n"
#: the file of a kernel, or one that is being written
_NAME = re.compile(r"[0-9a-f]{64}\.kernel|\.kernel-\w+")
#: whose versions machine code depends on
_DISTRIBUTIONS = ("numba", "numba-cuda", "llvmlite", "cuda-core", "nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12")
#: the compiler's libraries, and the wheels that they come in
_LIBRARIES = {"nvvm": ("nvidia-nvvm", "nvidia-cuda-nvcc-cu12"),
              "nvJitLink": ("nvidia-nvjitlink", "nvidia-nvjitlink-cu12")}
#: what kernels import that is no source of theirs; of these the versions count
_TOOLS = {"cuda", "llvmlite", "ml_dtypes", "numba", "numpy"}
#: when the package was imported: before the modules that it loads as they are asked for
_IMPORTED: float = vars(sys.modules[__package__])["_IMPORTED"]


def folder() -> Path | None:
    """Where kernels are kept, or None if they are not."""
    named = os.environ.get("DENSEGRAD_CACHE_DIR")
    if named is None:
        return platformdirs.user_cache_path("densegrad") / "kernels"
    return Path(os.path.expanduser(named)) if named else None


def code_of(launch: Launch, capability: tuple[int, int]) -> Code:
    """The machine code of a launch's kernel: what is kept, or else compiled and kept from now on."""
    name = name_of(launch, capability)
    code = load(name)
    if code is None:
        code = compile_launch(launch, capability)
        if _as_imported(launch.module):
            keep(name, code)
    return code


def name_of(launch: Launch, capability: tuple[int, int]) -> str:
    """The name of the file of a launch's kernel, a digest of all that its machine code depends on."""
    texts = [(source.module, source.digest) for source in sources(launch.module)]
    parts = [*key_of(launch), architecture_of(capability), *texts, *_toolchain()]
    return hashlib.sha256("\0".join(map(repr, parts)).encode()).hexdigest() + ".kernel"


def load(name: str) -> Code | None:
    """What is kept under this name, or None."""
    directory = _usable()
    if directory is None:
        return None
    path = directory / name
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("a kept kernel could not be read, so it is compiled again: %s", error)
        return None
    body = content[len(_MAGIC) + 32:]
    if content != _sealed(name, body):
        log.warning("a kept kernel is damaged, so it is compiled again: %s", path)
        return None
    with contextlib.suppress(OSError):  # a folder that may only be read has no order in which files leave it
        os.utime(path)
    entry, _, cubin = body.partition(b"\0")
    return Code(cubin, entry.decode())


def keep(name: str, code: Code) -> None:
    """Keep the machine code under this name."""
    directory = _usable(make=True)
    if directory is None:
        return
    try:
        descriptor, temporary = tempfile.mkstemp(dir=directory, prefix=".kernel-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(_sealed(name, code.entry.encode() + b"\0" + code.cubin))
            os.replace(temporary, directory / name)
        except BaseException:
            os.unlink(temporary)
            raise
        _make_room(directory)
    except OSError as error:
        _say_once(f"compiled kernels cannot be kept in {directory}: {error.strerror}")


def usable() -> bool:
    """Whether there is a folder that kernels can be kept in; if not, the log says why."""
    return _usable(make=True) is not None


class Kept(NamedTuple):
    """A file of the cache."""

    used: float  # seconds since 1970
    bytes: int
    path: Path


def kept() -> list[Kept]:
    """The files of the cache, those used last at the end; what else lies in the folder is none of them."""
    directory = folder()
    if directory is None or not os.path.isdir(directory):
        return []
    _usable()  # says why, if it is not
    try:
        return sorted(_files(directory))
    except PermissionError:
        _say_once(f"{directory} cannot be listed")
        return []


def _files(directory: Path) -> Iterator[Kept]:
    for path in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):  # removed by another process
            found = path.lstat()
            if _NAME.fullmatch(path.name) and stat.S_ISREG(found.st_mode):
                yield Kept(found.st_mtime, found.st_size, path)


def clear() -> list[Kept]:
    """Remove every kept kernel; what there was."""
    files = kept()
    for file in files:
        file.path.unlink(missing_ok=True)
    return files


def _sealed(name: str, body: bytes) -> bytes:
    return _MAGIC + hashlib.sha256(name.encode() + body).digest() + body


def _make_room(directory: Path) -> None:
    files = sorted(_files(directory))
    size = sum(file.bytes for file in files)
    for file in files:
        if size <= MOST_BYTES:
            return
        size -= file.bytes
        file.path.unlink(missing_ok=True)


def _usable(make: bool = False) -> Path | None:
    """The folder, if there is one that nobody else may write to."""
    directory = folder()
    if directory is None:
        return None
    try:
        if make and not directory.exists():
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.stat()
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not make:
            return None
        _say_once(f"kernels are not kept, since {directory} cannot be used: {error}")
        return None
    if not stat.S_ISDIR(found.st_mode):
        _say_once(f"kernels are not kept, since {directory} is no folder (set DENSEGRAD_CACHE_DIR to one of your own)")
        return None
    if os.name == "posix" and (found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
        _say_once(f"kernels are not kept, since others may write to {directory} (chmod 700 it, or set "
                  "DENSEGRAD_CACHE_DIR to a folder of your own)")
        return None
    return directory


@lru_cache(maxsize=64)
def _say_once(sentence: str) -> None:
    log.warning("%s", sentence)


@lru_cache(maxsize=1)
def _toolchain() -> tuple[str, ...]:
    """The versions of Python and of all that compiles and links."""
    return (platform.python_version(), *(f"{name} {_version(name)}" for name in _DISTRIBUTIONS),
            *(f"{name} {_library(name, wheels)}" for name, wheels in _LIBRARIES.items()))


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _library(name: str, wheels: tuple[str, ...]) -> str:
    """The version of a library of the compiler; of one that comes in no wheel the file, which it loads to find it."""
    versions = "".join(filter(None, map(_version, wheels)))
    if versions:
        return versions
    from cuda.pathfinder import DynamicLibNotFoundError, load_nvidia_dynamic_lib

    try:
        path = load_nvidia_dynamic_lib(name).abs_path
        found = os.stat(path or "")
    except (DynamicLibNotFoundError, RuntimeError, OSError):
        return ""
    return f"{path} {found.st_size} {found.st_mtime_ns}"


class Source(NamedTuple):
    """The text of a module, as it was when it was first looked at."""

    module: str
    digest: str
    written: float  # seconds since 1970


@lru_cache(maxsize=256)
def sources(module: str) -> tuple[Source, ...]:
    """The text of every module that a kernel's module reads, in any way, and of the one that compiles it.

    Found without importing any of them, so that Numba is not imported either. Numba's own and the standard library's
    are told apart by their versions.
    """
    found: dict[str, Source] = {}
    waiting = [module, f"{__package__}.compiler"]
    while waiting:
        name = waiting.pop()
        if name in found or name.partition(".")[0] in _TOOLS | sys.stdlib_module_names:
            continue
        source, imported = _read(name)
        if source is not None:
            found[name] = source
            waiting += imported
    return tuple(sorted(found.values()))


def _as_imported(module: str) -> bool:
    """Whether no source of a kernel has been written since this process began, which may have imported it before."""
    changed = [source.module for source in sources(module) if source.written >= _IMPORTED]
    if changed:
        log.debug("a kernel is not kept, since %s has changed while this process runs", changed[0])
    return not changed


@lru_cache(maxsize=1024)
def _read(name: str) -> tuple[Source | None, tuple[str, ...]]:
    """A module's text, and what it imports; None of what is no file."""
    spec = _spec_of(name)
    if spec is None or not spec.has_location:
        return None, ()
    path = Path(spec.origin)
    text = path.read_bytes()
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    imported = tuple(_imported(text, package)) if path.suffix == ".py" else ()
    # A file that takes another's place may be older than it, but not its place in the folder.
    found = path.stat()
    return Source(name, hashlib.sha256(text).hexdigest(), max(found.st_mtime, found.st_ctime)), imported


def _imported(text: bytes, package: str) -> Iterator[str]:
    """What a module of the package imports: modules, and names that may be modules."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[:len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


@lru_cache(maxsize=1024)
def _spec_of(name: str) -> Any:
    """What the import system knows of a module, which it does not import."""
    parent = name.rpartition(".")[0]
    path = getattr(_spec_of(parent), "submodule_search_locations", None) if parent else None
    if parent and path is None:
        return None
    for finder in sys.meta_path:
        spec = finder.find_spec(name, path)
        if spec is not None:
            return spec
    return None
