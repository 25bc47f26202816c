"""The terminal: where results and remarks go, as wide as it is and in signs that it has."""
from __future__ import annotations

import codecs
import logging
import sys
from io import TextIOWrapper
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.status import Status
from rich.table import Table
from rich.text import Text

#: what stands for a sign that the terminal's encoding has not; pictures need one sign for one
_INSTEAD = {"·": "*", "ᵀ": "^T", "∂": "d", "→": ">", "↓": "v", "│": "|", "─": "-", **dict.fromkeys("┌┐└┘", "+"),
            "▀": "'", "▄": ".", "█": "#", "…": "."}
_HANDLER = "densegrad.instead"


def _instead(error: UnicodeError) -> tuple[str, int]:
    """Replace what cannot be encoded, by an escape if nothing better is known."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    signs = error.object[error.start:error.end]
    return "".join(_INSTEAD.get(sign) or sign.encode("ascii", "backslashreplace").decode() for sign in signs), error.end


codecs.register_error(_HANDLER, _instead)


def suit_encoding() -> None:
    """Let stdout and stderr replace the signs that their encodings have not, unless the user chose what happens."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and stream.errors in ("strict", "surrogateescape", "backslashreplace"):
            stream.reconfigure(errors=_HANDLER)


def results() -> Console:
    """Where results go."""
    return Console(highlight=False)


def notes() -> Console:
    """Where progress and remarks go."""
    return Console(stderr=True, highlight=False)


def remark(words: str | Text, style: str = "") -> None:
    """Say something on stderr: in lines as wide as the terminal, or in one line if it goes elsewhere."""
    console = notes()
    console.print(words, style=style, markup=False, soft_wrap=not console.is_terminal)


class _Remarks(logging.Handler):
    """What the package says of its work, as remarks."""

    def emit(self, record: logging.LogRecord) -> None:
        remark(self.format(record), style="yellow")


def hear_the_log() -> None:
    """Show what the package warns of, once, however many commands run in this process."""
    log = logging.getLogger("densegrad")
    if not any(isinstance(handler, _Remarks) for handler in log.handlers):
        log.addHandler(_Remarks(logging.WARNING))


def waiting(what: str) -> Status:
    """A sign of life while something is done."""
    console = notes()
    return console.status(what, spinner="dots" if console.encoding.startswith("utf") else "line")


def progress(*columns: Any, transient: bool = False) -> Progress:
    """A bar, and columns of one's own; if transient it goes in the end, and where it could not is not shown."""
    console = notes()
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *columns, TimeElapsedColumn(),
                    console=console, transient=transient, disable=transient and not console.is_terminal)


def table(title: str | None, left: tuple[str, ...], right: tuple[str, ...], last: tuple[str, ...] = ()) -> Table:
    """A table whose columns are words, then numbers, then words."""
    made = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for heading in left:
        made.add_column(heading, overflow="fold")
    for heading in right:
        made.add_column(heading, justify="right")
    for heading in last:
        made.add_column(heading)
    return made


def verdict(passed: bool) -> str:
    """A word for the last column."""
    return "[green]pass[/green]" if passed else "[bold red]FAIL[/bold red]"
