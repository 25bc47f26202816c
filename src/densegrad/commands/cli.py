"""The command line: reads options, calls the package, prints. What is computed lives in the modules it calls."""
from __future__ import annotations

import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from difflib import get_close_matches
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import TextColumn
from rich.table import Table
from rich.text import Text

from .. import device, errors
from . import kept
from .files import is_standard_output, written
from .terminal import hear_the_log, notes, progress, remark, results, suit_encoding, table, verdict, waiting
from .tune import tune

if TYPE_CHECKING:
    import numpy as np

    from ..launches import Launch
    from .checks import Outcome

SIMULATOR = "NUMBA_ENABLE_CUDASIM"
#: the exit status of what Ctrl-C has stopped
INTERRUPTED = 130
_INSTALL = ('pip install "numba-cuda[cu13]" cupy-cuda13x   (with a driver of CUDA 13)',
            'pip install "numba-cuda[cu12]" cupy-cuda12x   (with a driver of CUDA 12)')


class Gradient(str, Enum):
    """What can be computed."""

    dx = "dx"
    dw = "dw"
    db = "db"


class WeightLayout(str, Enum):
    """The orders of the axes of weights."""

    in_out = "in_out"
    out_in = "out_in"


class _OneLineErrors(typer.core.TyperGroup):
    """Commands whose errors are one sentence on stderr and exit status 1; `--traceback` shows where they came from."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            remark("Interrupted.")
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            handled_by_typer = isinstance(error, (typer.Abort, BrokenPipeError)) or hasattr(error, "exit_code")
            if handled_by_typer or ctx.params.get("traceback"):
                raise
            remark(Text.assemble(("error: ", "bold red"), _sentence(error)))
            raise typer.Exit(1) from None


app = typer.Typer(cls=_OneLineErrors, rich_markup_mode="markdown", no_args_is_help=True, add_completion=False,
                  context_settings={"help_option_names": ["-h", "--help"]})


def main() -> None:
    """The entry point. Being asked to end is an end like others: what is half-written goes."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    suit_encoding()
    app()


def _sentence(error: Exception) -> str:
    """An error as one line. Errors that are not meant for users also say their type."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    words = " ".join(str(error).split())
    meant = isinstance(error, (ValueError, TypeError, RuntimeError, OSError)) and words
    return words if meant else f"{type(error).__name__}: {words} (densegrad --traceback ... shows where)"


def _use_device() -> None:
    """Use the GPU if there is one, else turn the simulator on for this process; say which."""
    if _simulator_is_on():
        why = f"{SIMULATOR} is set"
    elif device.gpu_missing():
        os.environ[SIMULATOR] = "1"
        why = "No GPU (densegrad info says why)"
    else:
        remark(f"Running on {device.current().name}.", style="dim")
        return
    remark(f"{why}: running in Numba's CUDA simulator, on the CPU.", style="dim")


def _simulator_is_on() -> bool:
    return os.environ.get(SIMULATOR, "0") not in ("", "0")


def _version(wanted: bool) -> None:
    if wanted:
        results().print(f"densegrad {metadata.version('densegrad')}")
        raise typer.Exit


@app.callback()
def _options(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Show the version.")] = False,
) -> None:
    """Gradients of a dense layer Z = X W + b, computed by Numba CUDA kernels.

    On a machine without a GPU the commands run the same kernels in Numba's CUDA simulator.
    """
    hear_the_log()


@app.command()
def demo(steps: Annotated[int, typer.Option(min=1, help="Steps of training, of 128 images each.")] = 20) -> None:
    """Check the gradients on real handwritten digits, then train with them.

    The gradients of a softmax layer on 128 of the 1,797 UCI digits are compared with float64 and with finite
    differences of the loss; then the layer is trained. Forward pass and softmax are NumPy, dX, dW and db come from the
    kernels.

    Examples:

        densegrad demo
        densegrad demo --steps 100
    """
    _use_device()
    from ..calls import recorded
    from . import demo as digits_demo
    from .explain import count

    started, out = time.perf_counter(), results()
    digits = digits_demo.load_digits()
    with waiting("Comparing the gradients of 128 images with float64 and finite differences"):
        comparisons = digits_demo.compare_gradients(digits)
    out.print(_comparison_table(comparisons))
    out.print("Worst errors, and their bounds there, which are derived and not tuned. The\n"
              "differences are central, in float64; their own error is part of the bound.\n", style="dim")
    step, interrupted = None, False
    with recorded() as launches, progress(TextColumn("{task.fields[figures]}")) as bar:
        task = bar.add_task("Training", total=steps, figures="")
        try:
            for step in digits_demo.train(digits, steps):
                bar.update(task, completed=step.number,
                           figures=f"loss {step.loss:.3f} test accuracy {step.accuracy:.1%}")
        except KeyboardInterrupt:
            interrupted = True
    if step is None:
        raise KeyboardInterrupt
    out.print(f"{'Interrupted. ' * interrupted}After {count(step.number, 'step')}: loss [bold]{step.loss:.3f}[/bold], "
              f"[bold]{step.accuracy:.1%}[/bold] of the {len(digits.test_y)} held-out digits read right.\n")
    _show_digits(out, digits, digits_demo.predict(digits.test_x, step.w, step.b))
    _show_launches(out, launches)
    out.print(f"{len(launches)} launches on {device.current().name}; the demonstration took "
              f"{time.perf_counter() - started:.1f} s.\n\n"
              "Digits: E. Alpaydin, C. Kaynak, UCI Machine Learning Repository, CC BY 4.0.", style="dim")
    if not all(comparison.passed for comparison in comparisons):
        raise typer.Exit(1)
    if interrupted:
        raise typer.Exit(INTERRUPTED)


def _comparison_table(comparisons: list[Any]) -> Table:
    made = table("Gradients of one batch of 128 digits, float32", ("", "shape"),
                 ("error to float64", "bound", "error to differences", "bound"), ("",))
    for c in comparisons:
        made.add_row(c.name, str(c.shape), f"{c.error:.1e}", f"{c.bound:.1e}", f"{c.difference_error:.1e}",
                     f"{c.difference_bound:.1e}", verdict(c.passed))
    return made


def _show_digits(out: Console, digits: Any, predictions: np.ndarray) -> None:
    from .demo import sketch

    shown = range(8)
    for line in zip(*(sketch(digits.test_x[i]) for i in shown), strict=True):
        out.print("  ".join(line), markup=False)
    marks = []
    for i in shown:
        right = predictions[i] == digits.test_y[i]
        marks.append((f"{f'{predictions[i]}' if right else f'{predictions[i]} not {digits.test_y[i]}':^8}  ",
                      "green" if right else "bold red"))
    out.print(Text.assemble(*marks), end="\n\n")


def _show_launches(out: Console, launches: list[Launch]) -> None:
    out.print("What ran in training", style="bold")
    counted = Counter((one.kernel, one.grid, one.block, one.plan.explain().partition("\n")[0]) for one in launches)
    for (kernel, grid, block, plan), times in counted.items():
        blocks = " x ".join(map(str, grid))
        out.print(f"{times:4d} x {kernel}, grid {blocks}, block {block}\n       {plan}", soft_wrap=True)


@app.command()
def grads(
    x: Annotated[Path, typer.Option("--x", metavar="X.npy", help="The layer's input, (samples, in_features).")],
    dz: Annotated[Path, typer.Option("--dz", metavar="DZ.npy", help="dL/dZ, (samples, outputs), or transposed.")],
    out: Annotated[Path, typer.Option("--out", metavar="GRADS.npz", help="Where to write dw, db (and dx).")],
    w: Annotated[Path | None, typer.Option("--w", metavar="W.npy", help="The weights, for dx too.")] = None,
    need: Annotated[
        list[Gradient] | None, typer.Option(help="Which to compute, by default all; may be repeated.")] = None,
    batch_axis: Annotated[
        int, typer.Option(min=0, max=1, metavar="AXIS", help="Which axis of dz counts samples.")] = 0,
    weight_layout: Annotated[
        WeightLayout, typer.Option(help="Of w and dw; out_in is PyTorch's.")] = WeightLayout.in_out,
    compensated: Annotated[
        bool, typer.Option("--compensated", help="Make up in db for what its additions round away.")] = False,
    memory: Annotated[
        str | None, typer.Option("--memory", metavar="SIZE", help="Read the arrays block by block, in so much memory.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Compute the gradients of your own arrays.

    The arrays are NumPy files of one floating dtype; the result is a NumPy archive with dw, db and, if the weights are
    given, dx, or one array alone if it is named .npy and one is needed. A file is written whole or not at all; into
    pipes and devices it is written directly.

    With --memory, say 300MB, arrays may be larger than memory: they are mapped and read in blocks, whose gradients are
    added up in float32 or float64, which dw and db then are. Bits are those of densegrad.GradientAccumulator, whatever
    the limit.

    Examples:

        densegrad grads --x x.npy --dz dz.npy --out grads.npz
        densegrad grads --x x.npy --w w.npy --dz dz.npy --out grads.npz --force
        densegrad grads --x x.npy --dz dz_t.npy --batch-axis 1 --out grads.npz
        densegrad grads --x x.npy --dz dz.npy --compensated --out grads.npz
        densegrad grads --x x.npy --dz dz.npy --need dw --out dw.npy --memory 300MB
    """
    from .streamed import Results, bytes_of, write_gradients

    if any(path is not None and out.resolve() == path.resolve() for path in (x, w, dz)):
        raise ValueError(f"--out {out} is one of the inputs (choose another name)")
    limit = None if memory is None else bytes_of(memory)
    names = tuple(one.value for one in need or ()) or (("dw", "db") if w is None else ("dx", "dw", "db"))
    alone = out.suffix == ".npy"
    if alone and len(set(names)) > 1:
        raise ValueError(f"--out {out} can hold one array; {', '.join(names)} are computed (choose one with --need, or "
                         "name an archive, .npz)")
    arrays = {name: None if path is None else _load(name, path, mapped=limit is not None)
              for name, path in (("x", x), ("w", w), ("dz", dz))}
    options = {"need": names, "batch_axis": batch_axis, "weight_layout": weight_layout.value,
               "compensated": compensated}
    with written(out, force) as file, closing(Results(file, alone)) as found:
        _use_device()
        with _speaking_of_options():
            if limit is None:
                with waiting("Computing the gradients"):
                    computed = _gradients(arrays, options)
                for name, array in computed.items():
                    found.write(name, array)
            else:
                with progress(transient=True) as bar:
                    task = bar.add_task("Samples", total=None)
                    write_gradients(found, arrays, options, limit,
                                    lambda done, of: bar.update(task, completed=done, total=of))
    made = table(None, ("", "shape", "dtype"), ("largest magnitude",))
    for name, entry in found.entries.items():
        made.add_row(name, str(entry.shape), str(entry.dtype), f"{entry.largest:.6g}")
    console = notes() if is_standard_output(out) else results()
    console.print(str(out), style="bold", markup=False, soft_wrap=True)
    console.print(made)


def _gradients(arrays: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """The gradients that are needed of x, w and dz, by their names."""
    from .. import dense_grads

    return {name: array for name, array in dense_grads(*arrays.values(), **options)._asdict().items()
            if array is not None}


@contextmanager
def _speaking_of_options() -> Iterator[None]:
    """Errors of arrays, said of the options that these come from."""
    try:
        yield
    except (errors.ShapeError, errors.DTypeError) as error:
        raise type(error)(_of_options(str(error))) from error


def _of_options(words: str) -> str:
    """What an error says of arguments, said of the options that they come from."""
    for argument in ("batch_axis", "weight_layout"):
        option = f"--{argument.replace('_', '-')}"
        words = words.replace(f"{argument}=", f"{option} ").replace(argument, option)
    return words


def _load(name: str, path: Path, mapped: bool) -> np.ndarray:
    import numpy as np

    try:
        array = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except (ValueError, EOFError) as error:
        why = "" if "pickle" in str(error) else f" ({' '.join(str(error).split())})"
        raise ValueError(f"--{name} {path}: not a NumPy array file of numbers, as numpy.save writes it{why}") from None
    if not isinstance(array, np.ndarray):
        array.close()
        raise ValueError(f"--{name} {path}: an archive of several arrays; save the one that is meant with numpy.save")
    if array.dtype == "V2":
        raise ValueError(f"--{name} {path}: elements of |V2, which is how numpy.save writes bfloat16: save "
                         "array.astype('float32') instead, or call densegrad from Python")
    return array


@app.command()
def explain(
    samples: Annotated[int, typer.Option(min=1, max=8, help="S, the batch size.")] = 2,
    features: Annotated[int, typer.Option(min=1, max=8, help="D, the inputs of the layer.")] = 4,
    outputs: Annotated[int, typer.Option(min=1, max=8, help="M, the outputs of the layer.")] = 3,
    svg: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the picture instead of printing text.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Show which axis is summed for dL/db, and why.

    A layer with small integer entries, worked through: the bias gradient as a matrix product, as a sum over axis 0, and
    as a sum over axis 1 of the transposed upstream gradient; the weight gradient likewise. The numbers come from the
    kernels.

    Examples:

        densegrad explain
        densegrad explain --samples 3 --outputs 2
        densegrad explain --svg which-axis.svg
    """
    _use_device()
    from . import explain as worked

    def work_out() -> worked.Example:
        with waiting("Computing the gradients"):
            return worked.work_out(samples, features, outputs)

    if svg is not None:
        from .picture import draw

        with written(svg, force) as file:
            example = work_out()
            file.write(draw(example).encode())
        remark(f"Wrote {svg}")
    else:
        out, example = results(), work_out()
        for title, body in worked.pages(example):
            out.rule(Text(title, "bold"), align="left", style="dim")
            out.print(_axes_coloured(f"\n{body}\n"), soft_wrap=True)
    if not example.agrees:
        raise typer.Exit(1)


def _axes_coloured(body: str) -> Text:
    text = Text(body)
    for words, style in ((r"\bsamples?\b", "yellow"), (r"\bfeatures\b", "magenta"), (r"\boutputs?\b|\bdb\b", "cyan"),
                         (r"densegrad\.\w+\(.*?\)(\.T)?|np\.sum\(.*?\)", "bold"), (r"All equal.*", "green"),
                         (r"NOT ALL.*", "bold red")):
        text.highlight_regex(words, style)
    return text


@app.command()
def info() -> None:
    """Show versions, the device, and what is missing with the command that installs it.

    It runs no kernel, and works whatever is missing.

    Examples:

        densegrad info
    """
    reason, out = device.gpu_missing(), results()
    made = Table.grid(padding=(0, 2))
    for package in ("densegrad", "numpy", "numba", "numba-cuda", "ml_dtypes"):
        made.add_row(package, _installed(package) or "[red]missing[/red]")
    cupy = next((name for name in ("cupy-cuda13x", "cupy-cuda12x", "cupy") if _installed(name)), "")
    made.add_row("CuPy", f"{_installed(cupy)} ({cupy})" if cupy else "not installed")
    made.add_row("Python", sys.version.split()[0])
    compiler = _missing_libraries()
    made.add_row("compiler", "NVVM and nvJitLink found" if not compiler else f"not found: {', '.join(compiler)}")
    runs = "simulator" if reason or _simulator_is_on() else device.current().name
    made.add_row("kernels kept", kept.summary())
    made.add_row("runs on", "Numba's CUDA simulator, on the CPU" if runs == "simulator" else runs)
    out.print(made)
    for what, cures in _cures(reason, cupy, compiler):
        out.print(f"\n{what}", style="yellow", markup=False)
        for cure in cures:
            out.print(f"  {cure}", markup=False, soft_wrap=True)


def _installed(package: str) -> str:
    try:
        return metadata.version(package) if package else ""
    except metadata.PackageNotFoundError:
        return ""


def _missing_libraries() -> list[str]:
    """Which of the libraries that compile and link kernels cannot be loaded."""
    from cuda.pathfinder import DynamicLibNotFoundError, load_nvidia_dynamic_lib

    missing = []
    for name in ("nvvm", "nvJitLink"):
        try:
            load_nvidia_dynamic_lib(name)
        except (DynamicLibNotFoundError, RuntimeError):
            missing.append(name)
    return missing


def _cures(reason: str, cupy: str, compiler: list[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    if not cupy:
        yield "CuPy is missing, which kernels need to run on a GPU:", _INSTALL
    elif reason:
        yield f"No GPU: {reason}", ("nvidia-smi shows whether there is a driver; without one the simulator is used",)
    if compiler and cupy:
        yield "The compiler's libraries are missing, which kernels need to be compiled:", _INSTALL


@app.command()
def check(
    quick: Annotated[bool, typer.Option("--quick", help="One size, one dtype for each orientation.")] = False,
) -> None:
    """Test every function on this device against float64, within derived error bounds.

    Each row is run twice into arrays full of NaN: the error must lie within its bound and both runs must give the same
    bits. Rows of tf32 and tf32x3 are float32 that is multiplied so, where there are tensor cores. The exit status is 1
    if a row fails.

    Examples:

        densegrad check --quick
        densegrad check
    """
    _use_device()
    from ..plans import TENSOR_CORE_CAPABILITY
    from . import checks

    where = device.current()
    cases = checks.cases(where.kind, quick, where.capability(device.HOST) >= TENSOR_CORE_CAPABILITY)
    outcomes: list[Outcome] = []
    with progress(transient=True) as bar:
        task = bar.add_task("Checking", total=len(cases))
        try:
            for case in cases:
                outcomes.append(checks.run(case))
                bar.advance(task)
        except KeyboardInterrupt:
            bar.stop()
    out, failures = results(), [outcome for outcome in outcomes if not outcome.passed]
    out.print(_check_table(outcomes))
    for failure in failures:
        out.print(f"\n{failure.case}: {failure.why}", style="red", markup=False)
    stopped = f"Interrupted after {len(outcomes)} of {len(cases)} cases. " * (len(outcomes) < len(cases))
    out.print(f"{stopped}{len(outcomes) - len(failures)} of {len(outcomes)} pass on {where.name}",
              style="bold red" if failures else "yellow" if stopped else "green")
    if failures or stopped:
        raise typer.Exit(1 if failures else INTERRUPTED)


def _check_table(outcomes: list[Outcome]) -> Table:
    """A row for each outcome, below the name of its function."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.case.function, []).append(outcome)
    made = table(None, ("S, D, M", "dtype", "axis", "options"), ("worst error", "bound"), ("",))
    for function, group in groups.items():
        made.add_row(f"[bold]{function}[/bold]")
        for outcome in group:
            case = outcome.case
            made.add_row(f"  {case.samples}, {case.in_features}, {case.out_features}", case.dtype, str(case.batch_axis),
                         case.options, f"{outcome.error:.1e}", f"{outcome.bound:.1e}", verdict(outcome.passed))
    return made


@app.command()
def ptx(
    kernel: Annotated[str | None, typer.Argument(help="A kernel, or one of its variants, from the list.")] = None,
    cc: Annotated[str, typer.Option(help="Compute capability, such as 8.0, 9.0 or 12.0.")] = "9.0",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Where to write instead of stdout.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """List the kernels, or compile one to PTX. Needs no GPU.

    Without a name every kernel is listed, with the name of a kernel its variants, which are compiled by their names.
    The PTX is that after linking, which the machine code is assembled from. Only compiling needs the compiler's
    libraries.

    Examples:

        densegrad ptx
        densegrad ptx matmul_simt
        densegrad ptx NAME --cc 8.0 -o kernel.ptx
    """
    capability = kept.capability_of(cc)
    if _simulator_is_on():
        remark(f"{SIMULATOR} is left aside: the simulator compiles nothing.", style="dim")
        del os.environ[SIMULATOR]
    from ..catalogue import kernel_variants

    variants = kernel_variants()
    if kernel is None or any(launch.kernel == kernel for launch in variants.values()):
        if output is not None:
            raise ValueError("--output takes one variant's PTX; name it (densegrad ptx KERNEL lists them)")
        _show_variants(variants, kernel)
        return
    if kernel not in variants:
        close = [name for name in variants if kernel in name] or get_close_matches(kernel, variants)
        cure = f"did you mean {close[0]}?" if close else "densegrad ptx lists them"
        raise ValueError(f"no kernel {kernel}: {cure}")
    missing = _missing_libraries()
    if missing:
        raise RuntimeError(f"{' and '.join(missing)} not found, which kernels are compiled with: {_INSTALL[0]}")
    if output is None:
        sys.stdout.write(_compiled(variants[kernel], capability))
        return
    with written(output, force) as file:
        file.write(_compiled(variants[kernel], capability).encode())
    remark(f"Wrote {output}")


def _show_variants(variants: dict[str, Launch], kernel: str | None) -> None:
    """The kernels with the number of their variants, or the variants of one."""
    out = results()
    if kernel is not None:
        out.print(*(name for name, launch in variants.items() if launch.kernel == kernel), sep="\n", markup=False,
                  highlight=False, soft_wrap=True)
        return
    made = Table.grid(padding=(0, 2))
    for name, count in Counter(launch.kernel for launch in variants.values()).items():
        first = next(launch for launch in variants.values() if launch.kernel == name)
        made.add_row(Text(name, "cyan"), str(count), (first.constants.__doc__ or "").partition("\n")[0])
    out.print(made)
    remark("densegrad ptx KERNEL lists its variants, which are compiled by their names.")


def _compiled(launch: Launch, capability: tuple[int, int]) -> str:
    from ..compiler import ptx_of

    if not launch.runs_on(capability):
        newer = "" if launch.alone else " or newer"
        raise ValueError("this kernel needs compute capability {}.{}{}; got {}.{}".format(
            *launch.capability, newer, *capability))
    with waiting("Compiling"):
        return ptx_of(launch, capability)


for command in (kept.cache, kept.warmup, tune):
    app.command()(command)
