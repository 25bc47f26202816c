"""The counted tables: one module each, with a function `rows()`. What a row is, `benchmarks.counting` says."""
import importlib
import pkgutil
from collections.abc import Iterable

from benchmarks.counting import Row, Shown


def names() -> list[str]:
    """The tables there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def rows(name: str) -> Iterable[Row]:
    """The rows of one table."""
    return importlib.import_module(f"{__name__}.{name}").rows()


def shown(name: str) -> list[Shown]:
    """What the README shows of one table."""
    return getattr(importlib.import_module(f"{__name__}.{name}"), "README", [])
