"""Commands for kernels that are kept on disk: what there is, emptying it, compiling ahead."""
from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import device
from .terminal import progress, remark, results, table

_SIZES = "S,D,M for samples, in_features and out_features, such as 128,784,512"
#: names in the order in which help shows them
Dtype = Enum("Dtype", {name: name for name in ("float32", "bfloat16", "float16", "float64")}, type=str)  # type: ignore[misc]


def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove every kept kernel.")] = False,
) -> None:
    """Show the compiled kernels that are kept between processes, or remove them.

    They lie in the user's cache folder, or where DENSEGRAD_CACHE_DIR says; if that is empty, none are kept. What is
    removed is compiled again when a call needs it.

    Examples:

        densegrad cache
        densegrad cache --clear
    """
    from .. import cache as kernels

    if clear:
        removed = kernels.clear()
        remark(f"Removed {_counted(removed)}.")
        return
    directory, files = kernels.folder(), kernels.kept()
    made = table(None, ("", ""), ())
    made.show_header = False
    made.add_row("folder", str(directory) if directory else "none, as DENSEGRAD_CACHE_DIR is empty")
    made.add_row("kernels", str(len(files)))
    made.add_row("bytes", f"{sum(file.bytes for file in files):,} of at most {kernels.MOST_BYTES:,}")
    results().print(made)


def summary() -> str:
    """The cache in one line."""
    from .. import cache as kernels

    directory = kernels.folder()
    return f"{_counted(kernels.kept())} in {directory}" if directory else "none, as DENSEGRAD_CACHE_DIR is empty"


def _counted(files: list[Any]) -> str:
    return f"{len(files)} kernel{'s' * (len(files) != 1)}, {sum(file.bytes for file in files):,} bytes"


def warmup(
    sizes: Annotated[list[str] | None, typer.Argument(metavar="S,D,M ...", help="Layers, by their sizes.")] = None,
    layers: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A file of layers, S,D,M on each line.")] = None,
    dtype: Annotated[
        list[Dtype] | None, typer.Option(help="Of the arrays, else float32; may be given several times.")] = None,
    activation: Annotated[
        list[str] | None, typer.Option(help="Of the layers; may be given several times; or cross_entropy.")] = None,
    precision: Annotated[str | None, typer.Option(help="Of float32 products: tf32 or tf32x3.")] = None,
    batch_axis: Annotated[int, typer.Option(min=0, max=1, metavar="AXIS", help="As the functions take it.")] = 0,
    weight_layout: Annotated[str, typer.Option(help="As the functions take it: in_out or out_in.")] = "in_out",
    accumulate: Annotated[
        bool, typer.Option("--accumulate", help="Gradients are added to, in the type of the sums.")] = False,
    cc: Annotated[str | None, typer.Option(help="Compute capability, such as 9.0; else that of the GPU.")] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="How many compile at the same time.")] = None,
) -> None:
    """Compile ahead what the gradients of your layers launch, so that no call waits for it.

    Needs the compiler's libraries and, with --cc, no GPU. What is compiled is kept for all later processes.

    Examples:

        densegrad warmup 128,784,512 128,512,10
        densegrad warmup 8192,768,3072 --dtype bfloat16 --activation gelu --cc 9.0
        densegrad warmup --layers layers.txt --dtype float32 --dtype bfloat16 --accumulate
    """
    from ..warming import warmup as compile_ahead

    wanted = [layer_of(words) for words in [*(sizes or []), *(_lines(layers) if layers else [])]]
    if not wanted:
        raise ValueError(f"no layers: give {_SIZES}, or --layers with a file of such lines")
    if cc is None and device.gpu_missing():
        raise ValueError("--cc must say which GPU kernels are compiled for where there is none, such as --cc 9.0")
    with progress() as bar:
        task = bar.add_task("Compiling", total=None, visible=False)

        def watch(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, visible=total > 0)

        # What is misspelt, `warmup` says.
        names: dict[str, Any] = {"activations": activation or [], "precision": precision,
                                 "weight_layout": weight_layout}
        found = compile_ahead(wanted, [one.value for one in dtype or (Dtype("float32"),)], **names,
                              batch_axis=batch_axis, accumulate=accumulate,
                              capability=None if cc is None else capability_of(cc), processes=processes,
                              watch=watch)
    results().print(f"{found.kernels} kernels are ready, of which {found.compiled} had to be compiled.")


def _lines(path: Path) -> list[str]:
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return [line for line in lines if line]


def layer_of(words: str) -> tuple[int, int, int]:
    """The sizes of a layer.

    Raises
    ------
    ValueError
        If they are not three numbers.
    """
    parts = [part.strip() for part in words.split(",")]
    if len(parts) != 3 or not all(part.isascii() and part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"a layer must be {_SIZES}; got {words!r}")
    return int(parts[0]), int(parts[1]), int(parts[2])


def capability_of(cc: str) -> tuple[int, int]:
    """A compute capability as it is written.

    Raises
    ------
    ValueError
        If it is none.
    """
    major, _, minor = cc.partition(".")
    if not (major.isdecimal() and minor.isdecimal() and cc.isascii()):
        raise ValueError(f"--cc must be a compute capability such as 9.0; got {cc}")
    return int(major), int(minor)
