"""Every kernel as some layer launches it, by name: what the compile check and `densegrad ptx` compile."""
from __future__ import annotations

from importlib import import_module

from .compiler import key_of
from .families import FAMILIES
from .launches import Launch


def kernel_variants() -> dict[str, Launch]:
    """The variants of all families, by name; a kernel that several names would have is listed under the first."""
    found: dict[str, Launch] = {}
    seen = set()
    for family in FAMILIES:
        for name, launch in import_module(family).variants():
            if key_of(launch) not in seen:
                seen.add(key_of(launch))
                found[name] = launch
    return found
