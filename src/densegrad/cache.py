"""Machine code that is kept between processes: one file a kernel, in a folder of the user's own.

The folder is the platform's for caches; DENSEGRAD_CACHE_DIR names another one, and is empty to go without. A file is
written whole or not at all, and loaded only if it is what was written under this key. Whatever is wrong with the folder
or a file costs the cache, not the call; it is said on the log.
"""
from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import logging
import os
import platform
import stat
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import platformdirs

from .compiler import Code, architecture_of, key_of
from .launches import Launch

log = logging.getLogger("densegrad")

#: how much the folder may hold; what was not used for longest goes first
MOST_BYTES = 256 * 2 ** 20
_MAGIC = b"densegrad kernel 1\n"
#: whose versions machine code depends on; of the compiler's libraries there may be several, or others than wheels
_DISTRIBUTIONS = ("numba", "numba-cuda", "llvmlite", "cuda-core", "nvidia-nvvm", "nvidia-nvjitlink",
                  "nvidia-cuda-nvrtc", "nvidia-nvjitlink-cu12", "nvidia-cuda-nvcc-cu12", "nvidia-cuda-nvrtc-cu12")


def folder() -> Path | None:
    """Where kernels are kept, or None if they are not."""
    named = os.environ.get("DENSEGRAD_CACHE_DIR")
    if named is None:
        return Path(platformdirs.user_cache_path("densegrad")) / "kernels"
    return Path(named) if named else None


def name_of(launch: Launch, capability: tuple[int, int]) -> str:
    """The name of the file of a launch's kernel, a digest of all that its machine code depends on."""
    parts = [*key_of(launch), architecture_of(capability), *sources(launch.module), *_toolchain()]
    return hashlib.sha256("\0".join(map(repr, parts)).encode()).hexdigest()


def load(name: str) -> Code | None:
    """What is kept under this name, or None."""
    place = _usable()
    if place is None:
        return None
    path = place / name
    try:
        content = path.read_bytes()
        os.utime(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("a kept kernel could not be read, so it is compiled again: %s", error)
        return None
    body = content[len(_MAGIC) + 32:]
    if content != _sealed(name, body):
        log.warning("a kept kernel is damaged, so it is compiled again: %s", path)
        return None
    entry, _, cubin = body.partition(b"\0")
    return Code(cubin, entry.decode())


def keep(name: str, code: Code) -> None:
    """Keep the machine code under this name."""
    place = _usable(make=True)
    if place is None:
        return
    try:
        descriptor, temporary = tempfile.mkstemp(dir=place, prefix=".new-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(_sealed(name, code.entry.encode() + b"\0" + code.cubin))
            os.replace(temporary, place / name)
        except BaseException:
            os.unlink(temporary)
            raise
        _make_room(place)
    except OSError as error:
        log.warning("a compiled kernel could not be kept in %s: %s", place, error)


def kept() -> list[Path]:
    """The files of the cache, those used last at the end."""
    place = folder()
    if place is None or not place.is_dir():
        return []
    found = [(path.stat().st_mtime, path) for path in place.iterdir() if path.is_file()]
    return [path for _, path in sorted(found)]


def clear() -> int:
    """Remove every kept kernel; how many there were."""
    files = kept()
    for path in files:
        path.unlink(missing_ok=True)
    return len(files)


def _sealed(name: str, body: bytes) -> bytes:
    return _MAGIC + hashlib.sha256(name.encode() + body).digest() + body


def _make_room(place: Path) -> None:
    files = kept()
    size = sum(path.stat().st_size for path in files)
    for path in files:
        if size <= MOST_BYTES:
            return
        size -= path.stat().st_size
        path.unlink(missing_ok=True)


def _usable(make: bool = False) -> Path | None:
    """The folder, if there is one that nobody else may write to."""
    place = folder()
    if place is None:
        return None
    try:
        if make:
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = place.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        _say_once(f"kernels are not kept, since {place} cannot be used: {error}")
        return None
    if os.name == "posix" and (found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
        _say_once(f"kernels are not kept, since others may write to {place} (chmod 700 it, or set DENSEGRAD_CACHE_DIR "
                  "to a folder of your own)")
        return None
    return place


@lru_cache(maxsize=64)
def _say_once(sentence: str) -> None:
    log.warning("%s", sentence)


@lru_cache(maxsize=1)
def _toolchain() -> tuple[str, ...]:
    """The versions of Python and of all that compiles and links."""
    found = [platform.python_version()]
    for name in _DISTRIBUTIONS:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return (*found, *(os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")))


@lru_cache(maxsize=64)
def sources(module: str) -> tuple[tuple[str, str], ...]:
    """(module, digest of its text) of every module of its package and of densegrad that this one reads, in any way.

    Found without importing any of them, so that Numba is not imported either.
    """
    found: dict[str, str] = {}
    waiting = [module]
    own = {"densegrad", module.partition(".")[0]}
    while waiting:
        name = waiting.pop()
        path = None if name in found else _file_of(name)
        if path is not None:
            text = path.read_bytes()
            found[name] = hashlib.sha256(text).hexdigest()
            package = name if path.name == "__init__.py" else name.rpartition(".")[0]
            waiting += [other for other in _imported(text, package) if other.partition(".")[0] in own]
    return tuple(sorted(found.items()))


def _imported(text: bytes, package: str) -> list[str]:
    """What a module of the package imports: modules, and names that may be modules."""
    names = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[:len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return names


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


def _file_of(name: str) -> Path | None:
    spec = _spec_of(name)
    return Path(spec.origin) if spec is not None and spec.has_location else None
