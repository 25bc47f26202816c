"""The command that times plans on the GPU at hand, and writes those that beat the model's choice into a file."""
from __future__ import annotations

import shlex
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import __version__, device
from ..errors import DeviceError
from .files import is_standard_output, written
from .kept import Dtype, layer_of
from .terminal import notes, progress, remark, results, table

if TYPE_CHECKING:
    from .race import Outcome
    from .timing import Clock

#: the gradients that are tuned, and the functions that compute them
GRADIENTS = {"weight_grad": "dL/dW", "input_grad": "dL/dX", "bias_grad": "dL/db"}


def tune(
    sizes: Annotated[list[str], typer.Argument(metavar="S,D,M ...", help="Layers, by their sizes.")],
    dtype: Annotated[
        list[Dtype] | None, typer.Option(help="Of the arrays, else float32; may be given several times.")] = None,
    precision: Annotated[str | None, typer.Option(help="Of float32 products: tf32 or tf32x3.")] = None,
    batch_axis: Annotated[int, typer.Option(min=0, max=1, metavar="AXIS", help="As the functions take it.")] = 0,
    weight_layout: Annotated[str, typer.Option(help="As the functions take it: in_out or out_in.")] = "in_out",
    out: Annotated[Path, typer.Option("--out", metavar="FILE.json", help="Where to write.")] = Path("plans.json"),
    quick: Annotated[bool, typer.Option("--quick", help="Less time for each plan: a first look.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Time the plans for the gradients of your layers on this GPU, and write the faster ones into a file.

    For dL/dW, dL/dX and dL/db of each layer every plan is held to float64 first; the best of a first look and the
    model's choice then take turns until their medians repeat. The file has the plans that beat the model's choice by
    more than that. Nothing takes them by itself: densegrad.use_plans does. Bits of results may differ then.

    Examples:

        densegrad tune 8192,768,3072 64,1024,10
        densegrad tune 8192,768,3072 --dtype float32 --dtype bfloat16 --precision tf32 --out plans.json
    """
    layers, dtypes = [layer_of(words) for words in sizes], [one.value for one in dtype or (Dtype("float32"),)]
    if precision is not None and "float32" not in dtypes:
        raise ValueError(f"--precision is a choice that float32 has; got --dtype {', '.join(dtypes)} (leave it out)")
    from .. import tuned
    from ..families.common import check_choice
    from ..families.product import check_known

    check_known(precision)
    check_choice("--weight-layout", weight_layout, ("in_out", "out_in"))
    clock = gpu_clock()
    from . import race, timing
    from .checks import Case
    from .explain import count

    cases = [Case(function, *layer, kind, batch_axis, weight_layout,
                  precision=precision if function != "bias_grad" and kind == "float32" else None)
             for kind in dtypes for layer in layers for function in GRADIENTS]
    where, done = device.current(), []
    with written(out, force) as file:
        with progress() as bar:
            task = bar.add_task("Timing", total=len(cases))
            for outcome in race.outcomes(cases, clock, timing.QUICK if quick else timing.Effort()):
                if outcome is not None:
                    done.append(outcome)
                bar.advance(task)
        entries = tuple(outcome.entry for outcome in done if outcome.entry)
        made = tuned.Table(str(out), __version__, gpu=where.name_of(device.HOST),
                           compute_capability=where.capability(device.HOST), date=time.strftime("%Y-%m-%d"),
                           command=shlex.join(["densegrad", *sys.argv[1:]]), entries=entries)
        file.write(str(made).encode())
    console = notes() if is_standard_output(out) else results()
    console.print(_table_of(done, made.gpu))
    _show_remarks(done)
    remark(f"{out} has {count(len(entries), 'plan')} faster than the model's choice, for "
           f"{count(len(done), 'gradient')}. densegrad.use_plans({str(out)!r}) takes what is there.")
    if any(outcome.faults for outcome in done):
        raise typer.Exit(1)


def gpu_clock() -> Clock:
    """The clock of the GPU at hand.

    Raises
    ------
    DeviceError
        If there is none.
    """
    from .timing import GpuClock

    reason = device.gpu_missing()
    if not reason and device.current().kind != "gpu":
        reason = "Numba's CUDA simulator is on"
    if reason:
        raise DeviceError(f"plans are timed on a GPU, and there is none here: {reason} (the simulator's times say "
                          "nothing about one; run densegrad tune where calls will run)")
    return GpuClock(device.current().cupy)


def _table_of(outcomes: list[Outcome], gpu: str) -> Any:
    made = table(f"Plans on {gpu}, by what the model's choice has not", ("", "S, D, M", "dtype", "chosen"),
                 ("us", "model's us"))
    for outcome in outcomes:
        case = outcome.case
        made.add_row(GRADIENTS[case.function], f"{case.samples}, {case.in_features}, {case.out_features}",
                     case.precision or case.dtype, _difference(outcome.winner, outcome.model),
                     _microseconds(outcome.seconds), _microseconds(outcome.model_seconds))
    return made


def _microseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e6:.1f}"


def _difference(plan: Any, model: Any) -> str:
    """The fields of a plan that the model's choice has other values of."""
    if plan == model:
        return "the model's"
    if type(plan) is not type(model):
        return type(plan).__name__
    return ", ".join(f"{field.name} {getattr(plan, field.name)}" for field in fields(plan)
                     if getattr(plan, field.name) != getattr(model, field.name))


def _show_remarks(outcomes: list[Outcome]) -> None:
    """What was not taken, and why."""
    from .race import FAR, REPEATS

    for outcome in outcomes:
        for plan, fault in outcome.faults:
            remark(f"{outcome.case}: not taken: {fault}: {plan}", style="red")
        for plan, medians in outcome.doubtful:
            times = ", ".join(f"{seconds * 1e6:.1f}" for seconds in medians)
            remark(f"{outcome.case}: not taken: its medians differ by more than {REPEATS:.0%}: {times} us: {plan}",
                   style="yellow")
    remark(f"{sum(outcome.timed for outcome in outcomes)} plans were timed. Left out were "
           f"{sum(outcome.left_out for outcome in outcomes)} that cost over {FAR:g} times the least, by the model.",
           style="dim")
