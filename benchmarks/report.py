"""Writes the tables in README.md and benchmarks/README.md, between their markers, and the plots that they show.

Nothing is in them that is in no row of benchmarks/results: what was measured on a GPU (GPU.csv, written by
benchmarks.run, and beside it GPU-products.csv and GPU-cublas.csv), Python's and the simulator's time (host.csv and
simulator.csv), and counted and modelled figures (counted/). The README shows a few cases of the GPU that was measured
last; one that has no row is open. `--check` writes nothing and fails where a page or a plot differs from the rows.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean

from densegrad.commands.files import written

from . import plots, records, run, tables
from .counting import Shown
from .operations import OPERATIONS, SHAPES

Row = Mapping[str, str]
ROOT = Path(__file__).parents[1]
BEGIN = "<!-- Written by `python -m benchmarks.report` from the rows in benchmarks/results. -->"
END = "<!-- The end of what is written. -->"
OURS = "densegrad"
RESULTS = records.RESULTS.relative_to(ROOT).as_posix()
PICTURES = "https://raw.githubusercontent.com/densegrad/densegrad/main"  # the README is shown away from its files, too
SKIPPED = ("2", "5", "17")  # outputs that the plot of counted sectors leaves out, so that it is no longer than a page
NARROW = (1, 3, 10, 33)  # outputs of the narrow layers whose speed is drawn over S
#: operations in which D, the number of inputs, plays a part
WITH_FEATURES = {name for name, does in OPERATIONS.items() if {"x", "w"} & set(does.inputs)}
#: operation -> what the file of products calls it
PRODUCTS = {"weight_grad": "dw", "input_grad": "dx"}


@dataclass(frozen=True)
class Headline:
    """A case that the README shows: a row of benchmarks.run if there is one, else of the products."""

    words: str
    operation: str
    dtype: str
    sizes: tuple[int, int, int]  # S, D, M
    precision: str = ""
    orientation: str = "samples first"

    @property
    def label(self) -> str:
        """What it is, in one line."""
        shape = "x".join(str(size) for size in self.sizes if size > 1)
        return f"{self.words}, {shape}, {self.precision or self.dtype}"


_UP, _SQUARE = (8192, 768, 3072), (4096, 4096, 4096)
HEADLINES = {
    "bound by memory": (
        Headline("dL/db", "bias_grad", "float32", (8192, 1, 3072)),
        Headline("dL/db, features first", "bias_grad", "float32", (8192, 1, 3072), orientation="features first"),
        Headline("dL/dZ, dL/db below ReLU", "activation_grad", "float32", (8192, 1, 3072)),
        Headline("dL/dZ, dL/db below cross-entropy", "cross_entropy_grad", "float32", (8192, 1, 3072)),
    ),
    "multiplies on FMA units": (
        Headline("dL/dW", "weight_grad", "float32", _SQUARE),
        Headline("dL/dX", "input_grad", "float32", _SQUARE),
        Headline("dL/dW, dL/db", "weight_bias_grad", "float32", _UP),
        Headline("all three", "dense_grads", "float32", _UP),
    ),
    "multiplies on tensor cores": (
        Headline("dL/dW", "weight_grad", "bfloat16", _SQUARE),
        Headline("dL/dW", "weight_grad", "bfloat16", _UP),
        Headline("dL/dX", "input_grad", "bfloat16", _UP),
        Headline("dL/dW, dL/db", "weight_bias_grad", "float32", _UP, "tf32"),
    ),
}


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


# Counted and modelled


def counted_rows(folder: Path, name: str) -> dict[str, Row]:
    """The rows of one table by name; of executed PTX where a GPU's profiler has counted the same."""
    rows = records.read(folder / "counted" / f"{name}.csv")
    return {row["name"]: row for row in sorted(rows, key=lambda row: row["source"].startswith("executed"))}


def counted_part(shown: Shown, rows: Mapping[str, Row]) -> list[str]:
    """What the README shows of a table. A figure that misses its limit says so."""
    def cell(row: Row, column: str, how: str) -> str:
        value = row.get(column, "")
        text = format(float(value), how) if how and value else value
        return f"{text} (missed)" if column in row["broken"].split() else text

    found = [rows[name] for name in shown.rows if name in rows]
    if not found:
        return []
    lines = table([heading for _, heading, _ in shown.columns],
                  [[cell(row, column, how) for column, _, how in shown.columns] for row in found])
    return ["", f"**{shown.title}**", "", *lines, *(["", shown.note] if shown.note else [])]


def holding(folder: Path) -> list[list[str]]:
    """For each table, how many rows hold what was asked of them, which do not, and which were not counted."""
    lines = []
    for name in tables.names():
        rows, names = counted_rows(folder, name), [row.name for row in tables.rows(name)]
        missed = [f"{row['name']}: {row['broken'].replace(' ', ', ')}" for row in rows.values() if row["broken"]]
        held, counted = sum(not row["broken"] for row in rows.values()), sum(row in rows for row in names)
        missed += [f"{len(names) - counted} not counted"] * (counted < len(names))
        lines.append([f"`benchmarks/tables/{name}.py`", f"{held} of {len(names)}", "; ".join(missed) or "-"])
    return lines


def sectors_plot(rows: Mapping[str, Row]) -> str:
    """What dL/db reads beyond the least possible, for one dtype."""
    limits = {row.name: next(limit.most for limit in row.limits if limit.column == "read")
              for row in tables.rows("batch_sum") if hasattr(row, "layout")}
    bars = []
    for name, row in rows.items():
        if name in limits and row["dtype"] == "float32" and row["shape"].partition("x")[2] not in SKIPPED:
            extra = 100 * (float(row["read"]) - 1)
            label = name.replace(" float32", "").replace("_", " ").replace("flat", "no gaps")
            bars.append(plots.Bar(label, "read", max(extra, 0.0), f"{extra:.1f} %", 100 * (limits[name] - 1)))
    return plots.bars("What dL/db reads beyond dZ itself", "Sectors of 32 bytes, float32, counted in executed PTX, not "
                      "timed. The marks are limits that must hold.", bars, 30, " %")


def ideas_plot(rows: Mapping[str, Row]) -> str:
    """What the machine code of the learner's kernels and of ours could reach at most, one idea more in every row."""
    shares = {name.removeprefix("idea: "): 100 * float(row["bound_modelled"])
              for name, row in rows.items() if name.startswith("idea: ")}
    bars = [plots.Bar(idea, "bound", share, f"{share:.0f} %") for idea, share in shares.items()]
    return plots.bars("What each idea of dL/dW buys", "Share of an H100's FP32 peak that the linked machine code "
                      "allows at most: modelled, not timed.", bars, 100, " %")


# Measured


@dataclass(frozen=True)
class Measured:
    """What was measured on a GPU: the name of its files, the rows of benchmarks.run, products and cuBLAS's times."""

    name: str
    rows: Sequence[Row]
    products: Sequence[Row]
    cublas: Mapping[tuple[str, ...], float]

    @property
    def gpu(self) -> str:
        """The GPU's name."""
        return self.rows[0]["gpu"]

    @property
    def when(self) -> str:
        """When, of which commit, and with what."""
        first = self.rows[0]
        return f"{first['date']}, commit {first['commit']}, CUDA {first['cuda']}, numba-cuda {first['numba_cuda']}"

    @property
    def command(self) -> str:
        """The command that made the rows."""
        quick = any(row.get("effort") == "quick" for row in self.rows)
        return f"`python -m benchmarks.run{' --quick' if quick else ''}`"

    def product(self, operation: str, kind: str, sizes: tuple[int, int, int]) -> tuple[Row, float] | None:
        """The row of a product that nothing disturbed, and cuBLAS's time."""
        for row in self.products:
            same = tuple(int(row[name]) for name in "SDM") == sizes
            what = row["operation"], row["kind"]
            if what == (PRODUCTS.get(operation), kind) and same and not int(row["disturbed"]):
                peer = self.cublas.get((row["operation"], kind, row["layer"]))
                return None if peer is None else (row, peer)
        return None


def measured_files(folder: Path) -> list[Measured]:
    """What was measured, oldest first."""
    found = []
    for path in sorted(folder.glob("*.csv")):
        rows = records.read(path)
        if rows and "gpu" in rows[0]:
            cublas: dict[tuple[str, ...], float]
            cublas = {(row["operation"], row["kind"], row["layer"]): float(row["us"])
                      for row in records.read(folder / f"{path.stem}-cublas.csv")}
            found.append(Measured(path.stem, rows, records.read(folder / f"{path.stem}-products.csv"), cublas))
    return sorted(found, key=lambda one: one.rows[0]["date"])


def timings(rows: Iterable[Row]) -> dict[str, Row]:
    """Peer -> row, of those that were timed, fastest first."""
    timed = sorted((row for row in rows if row["median_us"]), key=lambda row: float(row["median_us"]))
    return {row["implementation"]: row for row in timed}


@dataclass(frozen=True)
class Duel:
    """Our time of a headline and that of the fastest peer, in microseconds, and Python's time of both."""

    ours: float
    peer: str
    theirs: float
    python: str = "-"

    @property
    def ratio(self) -> float:
        """How many times as fast as the peer we are."""
        return self.theirs / self.ours


def duel(headline: Headline, measured: Measured) -> Duel | None:
    """What the rows say of a headline; None if they are silent."""
    wanted = (headline.operation, headline.dtype, *map(str, headline.sizes), headline.orientation)
    found = timings(row for row in measured.rows
                    if tuple(row[name] for name in ("operation", "dtype", *"SDM", "orientation")) == wanted)
    ours = found.get(f"{OURS} {headline.precision}".rstrip())
    others = [name for name in found if name.partition(" ")[0] != OURS and _precision(name) == headline.precision]
    if ours and others:
        theirs = found[others[0]]
        python = f"{float(ours['host_us']):.0f}/{float(theirs['host_us']):.0f}"
        return Duel(float(ours["median_us"]), others[0], float(theirs["median_us"]), python)
    product = measured.product(headline.operation, headline.precision or headline.dtype, headline.sizes)
    return Duel(float(product[0]["us"]), "torch.mm", product[1]) if product else None


def _precision(implementation: str) -> str:
    """What its products are rounded to, beyond their type: "tf32x3" has float32's accuracy."""
    return "tf32" if implementation.endswith(" tf32") else ""


def first_look(folder: Path, pictures: str) -> tuple[str, dict[str, str]]:
    """The README's table of a few cases, and its plot by file name; `pictures` is where the README finds it."""
    every = measured_files(folder)
    if not every:
        return "Nothing has been measured on a GPU.\n", {}
    last = every[-1]
    found = {headline: duel(headline, last) for group in HEADLINES.values() for headline in group}
    body = []
    for headline, result in found.items():
        if result:
            body.append([headline.label, f"{result.ours:.1f}", f"{result.theirs:.1f} ({result.peer})",
                         f"{result.ratio:.2f}", result.python])
        else:
            body.append([headline.label, "open", *"---"])
    bars = [plots.Bar(headline.label, group, result.ratio,
                      f"{result.ratio:.2f} x ({result.ours:.1f} us, {result.peer} {result.theirs:.1f} us)", 1.0)
            for group, headlines in HEADLINES.items() for headline in headlines if (result := found[headline])]
    file = f"{last.name}-first-look.svg"
    end = 1.9 * max(1.0, *(bar.value for bar in bars))  # room for the words beside the bars
    note = (f"Beyond the mark it is ahead. Medians of GPU time, cold L2; {last.rows[0]['date']}, commit "
            f"{last.rows[0]['commit']}.")
    plot = plots.bars(f"densegrad's speed over the fastest peer's on {last.gpu}", note, bars, end, " x")
    lines = [
        "", f"![densegrad's speed over the fastest peer's on {last.gpu}]({pictures}/{file})", "",
        *table(["what", "us", "fastest peer, us", "speed over it", "Python, us: ours/its"], body), "",
        f"**Measured** on one {last.gpu} ({last.when}) by {last.command}: medians of GPU time, cold L2; Python's time "
        "until the work is queued; open: not measured.",
    ]
    if last.products:
        lines += ["Beside torch.mm: the plans that densegrad chose then, from a sweep of all plans on the same day. "
                  f"Over the layers in `densegrad.layers` the speed over cuBLAS is, in geometric means, {means(last)}."]
    return "\n".join([*lines, ""]), {file: plot}


def means(measured: Measured) -> str:
    """The geometric means of cuBLAS's time over ours, of rows that nothing disturbed."""
    ratios: dict[tuple[str, str], list[float]] = {}
    for row in measured.products:
        key = (row["operation"], row["kind"])
        if not int(row["disturbed"]) and (*key, row["layer"]) in measured.cublas:
            ratios.setdefault(key, []).append(measured.cublas[(*key, row["layer"])] / float(row["us"]))
    kinds = sorted(dict.fromkeys(kind for _, kind in ratios), key=lambda kind: kind != "float32")
    names = {"dw": "dL/dW", "dx": "dL/dX"}
    return "; ".join(f"{kind} " + ", ".join(f"{geometric_mean(ratios[operation, kind]):.2f} {names[operation]}"
                                            for operation in names if (operation, kind) in ratios) for kind in kinds)


def products_part(measured: Measured) -> list[str]:
    """The plans that were chosen for products, beside cuBLAS."""
    if not measured.products:
        return []
    body = []
    for row in measured.products:
        us, peer = float(row["us"]), measured.cublas.get((row["operation"], row["kind"], row["layer"]))
        unit = "x".join(row[name] for name in ("tile_rows", "tile_cols", "tile_depth"))
        flops = 2 * int(row["S"]) * int(row["D"]) * int(row["M"])
        body.append([f"dL/d{row['operation'][1:].upper()}", row["kind"], row["layer"],
                     " x ".join(row[name] for name in "SDM"), f"{unit}, {row['parts']}",
                     f"{us:.1f}{' (disturbed)' if int(row['disturbed']) else ''}", f"{flops / us / 1e6:.1f}",
                     *((f"{peer:.1f}", f"{peer / us:.2f} x") if peer else ("-", "-"))])
    return ["", f"**Products on {measured.gpu}, the plan that densegrad chose then** ({measured.when}). Plans were "
            "timed by CUDA events behind queued work, with cold L2; the sweep is not a command of this repository. "
            "cuBLAS is torch.mm on the same layers, for tf32 with TF32 on. Disturbed: another process used the GPU "
            "meanwhile; these rows are left out of means. Geometric means of the speed over cuBLAS: "
            f"{means(measured)}.", "",
            *table(["gradient", "kind", "layer", "S x D x M", "tile, parts", "us", "TFLOP/s", "cuBLAS, us",
                    "speed over it"], body)]


def shape(row: Row) -> str:
    """S x D x M of a row, or S x M where D plays no part."""
    sizes = [row["S"], row["D"], row["M"]] if row["operation"] in WITH_FEATURES else [row["S"], row["M"]]
    sides = ", features first" if row["orientation"] == "features first" else ""
    return " x ".join(sizes) + sides


def cases(rows: Sequence[Row]) -> dict[tuple[str, ...], dict[str, Row]]:
    """case -> implementation -> row, of everything that is no roof."""
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        if row["operation"] != run.ROOF:
            key = tuple(row[column] for column in run.KEY if column != "implementation")
            found.setdefault(key, {})[row["implementation"]] = row
    return found


def measured_part(measured: Measured) -> list[str]:
    """The tables of one GPU: what its roofs are, and each case against its best peer."""
    rows = measured.rows
    roofs = [row for row in rows if row["operation"] == run.ROOF and row["median_us"]]
    said = [f"{float(row['gb_per_s']):.0f} GB/s copied" if row["implementation"] == "device copy"
            else f"{float(row['tflop_per_s']):.1f} TFLOP/s by {row['implementation']} in {row['dtype']}"
            for row in roofs]
    lines = ["", f"**Measured on {measured.gpu}** ({measured.when}, by {measured.command}). Roofs, measured in the "
             f"same run: {'; '.join(said)}. Medians of GPU time, cold L2.", ""]
    body, failed = [], []
    for found in cases(rows).values():
        failed += [f"- {shape(row)} {row['operation']} {row['dtype']}, {name}: {row['remark']}"
                   for name, row in found.items() if not row["median_us"]]
        own = {name: row for name, row in found.items() if name.partition(" ")[0] == OURS and row["median_us"]}
        for name, ours in own.items():
            others = {other: float(row["median_us"]) for other, row in found.items()
                      if other not in own and row["median_us"] and _precision(other) == _precision(name)}
            best = min(others, key=others.__getitem__, default=None)
            peer = f"{best} {others[best]:.1f} ({others[best] / float(ours['median_us']):.2f} x)" if best else "none"
            body.append([ours["operation"], shape(ours), f"{ours['dtype']}{name.removeprefix(OURS)}",
                         f"{float(ours['median_us']):.1f} ({float(ours['p20_us']):.1f} to {float(ours['p80_us']):.1f})",
                         f"{float(ours['roof']):.0%}" if ours["roof"] else "-", ours["host_us"], peer])
    lines += table(["operation", "S x D x M", "dtype", "us (20 to 80 %)", "of the roof", "Python, us",
                    "fastest peer, us"], body)
    return [*lines, *(["", "Not timed:", "", *failed] if failed else [])]


def race_part(measured: Measured) -> list[str]:
    """What the race on tensor cores came to, if the rows have all of its shapes."""
    raced: dict[tuple[str, str, str], dict[tuple[int, ...], float]] = {}
    for key, found in cases(measured.rows).items():
        timed = timings(found.values())
        for name in (name for name in timed if name.partition(" ")[0] == OURS):
            others = [other for other in timed if other.partition(" ")[0] != OURS and
                      _precision(other) == _precision(name)]
            sizes = tuple(int(timed[name][size]) for size in "SDM")
            if others and sizes in SHAPES["hopper"]:
                ratio = float(timed[others[0]]["median_us"]) / float(timed[name]["median_us"])
                raced.setdefault((key[0], timed[name]["dtype"], name.removeprefix(OURS)), {})[sizes] = ratio
    soon, rest = SHAPES["hopper"][:2], SHAPES["hopper"][2:]
    body = [[operation, f"{dtype}{how}", f"{geometric_mean(ratios[one] for one in rest):.2f}",
             f"{min(ratios.values()):.2f}", *(f"{ratios[one]:.2f}" for one in soon)]
            for (operation, dtype, how), ratios in raced.items() if len(ratios) == len(SHAPES["hopper"])]
    if not body:
        return []
    return ["", f"**The race on tensor cores** ({measured.when}, `python -m benchmarks.run --shapes hopper`): speed "
            "over the fastest peer. The mean is a geometric one, of all shapes but the last two columns'.", "",
            *table(["operation", "dtype", "mean", "least", *(" x ".join(map(str, one)) for one in soon)], body)]


def measured_plots(rows: Sequence[Row]) -> dict[str, str]:
    """File name -> plot, for what there are rows for."""
    made, by_case = {}, cases(rows)
    gpu = rows[0]["gpu"]
    timed = [(found, row) for found in by_case.values() for row in found.values() if row["median_us"] and row["roof"]]
    bars = [plots.Bar(f"{row['operation']} {shape(row)} {row['dtype']}" if row is next(iter(found.values())) else "",
                      row["implementation"], 100 * float(row["roof"]), f"{float(row['roof']):.0%}")
            for found, row in timed if len(found) > 1]
    if bars:
        made["peers"] = plots.bars(
            f"Share of the roof on {gpu}", "Longer is faster. Medians, cold L2; the roof is a device copy or cuBLAS, "
            "whichever takes longer.", bars, max(100.0, *(bar.value for bar in bars)), " %")
    roofline = _roofline(rows, timed)
    if roofline:
        made["roofline"] = plots.plane(f"Roofline of {gpu}, float32", "Roofs are measured: device copy, cuBLAS.",
                                       roofline, "flops for each byte that must move", "TFLOP/s")
    narrow = [plots.Curve(f"M = {outputs}", points) for outputs in NARROW
              if len(points := sorted((float(row["S"]), float(row["gb_per_s"])) for _, row in timed
                                      if _is_narrow(row, outputs))) > 1]
    if narrow:
        made["narrow"] = plots.plane(f"dL/db of narrow layers on {gpu}, float32", "Bytes of dZ a second, cold L2.",
                                     narrow, "samples S", "GB/s")
    return made


def _is_narrow(row: Row, outputs: int) -> bool:
    return (row["operation"], row["implementation"], row["dtype"], row["M"], row["orientation"]) == (
        "bias_grad", OURS, "float32", str(outputs), "samples first")


def _roofline(rows: Sequence[Row], timed: Sequence[tuple[Mapping[str, Row], Row]]) -> list[plots.Curve]:
    copy = next((float(row["gb_per_s"]) for row in rows if row["implementation"] == "device copy"), None)
    peak = next((float(row["tflop_per_s"]) for row in rows
                 if (row["implementation"], row["dtype"]) == ("cuBLAS", "float32") and row["median_us"]), None)
    points: dict[str, list[tuple[float, float]]] = {}
    for _, row in timed:
        if row["dtype"] == "float32" and "tf32" not in row["implementation"]:
            intensity = 1000 * float(row["tflop_per_s"]) / float(row["gb_per_s"])
            points.setdefault(row["implementation"], []).append((intensity, float(row["tflop_per_s"])))
    if copy is None or peak is None or not points:
        return []
    ridge = 1000 * peak / copy
    lowest = min(x for series in points.values() for x, _ in series)
    highest = max(x for series in points.values() for x, _ in series)
    first = min(lowest, ridge) / 2
    roof = [(first, first * copy / 1000), (ridge, peak), (2 * max(highest, ridge), peak)]
    return [plots.Curve("roof", roof), *(plots.Curve(name, series, joined=False) for name, series in points.items())]


# Host


def host_part(rows: Sequence[Row]) -> list[str]:
    """Python's time, of every device and processor that it was measured with."""
    lines = []
    for place in dict.fromkeys((row["device"], row["processor"]) for row in rows):
        ours = [row for row in rows if (row["device"], row["processor"]) == place]
        where = f"{place[0]}; {place[1]}, Python {ours[0]['python']}"
        lines += ["", f"**Python's time a call** in microseconds ({where})", "",
                  *table(["call", "microseconds"], [[f"`{row['call']}`", row["median_us"]] for row in ours])]
    return lines


def simulator_part(rows: Sequence[Row]) -> list[str]:
    """How fast the simulator runs our kernels."""
    if not rows:
        return []
    ratios = [float(row["plain_s"]) / float(row["densegrad_s"]) for row in rows]
    return ["", f"**The simulator's time for `weight_grad`** in seconds ({rows[0]['processor']}), beside a plain "
            "kernel of 16 x 16 tiles with one element a thread", "",
            *table(["S x D x M", "plain", "densegrad", "faster"],
                   [[f"{row['S']} x {row['D']} x {row['M']}", f"{float(row['plain_s']):.2f}",
                     f"{float(row['densegrad_s']):.2f}", f"{ratio:.0f} x"]
                    for row, ratio in zip(rows, ratios, strict=True)])]


def section(folder: Path, pictures: str) -> tuple[str, dict[str, str]]:
    """The tables of benchmarks/README.md and its plots by file name; `pictures` is where it finds them."""
    gpus = measured_files(folder)
    by_table = {name: counted_rows(folder, name) for name in tables.names()}
    sources = sorted({row["source"] for rows in by_table.values() for row in rows.values()})
    timed_on = ", ".join(dict.fromkeys(one.gpu for one in gpus)) or "nothing yet: no GPU was at hand"
    python_rows, simulator_rows = (records.read(folder / name) for name in ("host.csv", "simulator.csv"))
    processors = ["; ".join(dict.fromkeys(row["processor"] for row in rows)) or "-"
                  for rows in (python_rows, simulator_rows)]
    overview = [
        ["times against peers and roofs", "measured", timed_on, "`python -m benchmarks.run`, on a GPU"],
        ["Python's time a call", "measured", processors[0], "`python -m benchmarks.host`"],
        ["the simulator's time", "measured", processors[1], "`python -m benchmarks.simulator`"],
        ["sectors, lanes, conflicts, instructions", "counted", "; ".join(sources),
         "`python -m benchmarks.counted --ncu`, on a GPU"],
        ["registers, spills, shares of the main loop", "read from the linked machine code", "the same kernels", "-"],
        ["shares of a peak or of DRAM's rate", "modelled from the machine code", "the same kernels", "-"],
    ]
    lines = ["", *table(["figures", "are", "on", "again with"], overview), "", "## Measured"]
    made: dict[str, str] = {}
    for one in gpus:
        lines += measured_part(one)
        for name, plot in measured_plots(one.rows).items():
            file = f"{one.name}-{name}.svg"
            made[file] = plot
            lines += ["", f"![{one.gpu}: {name}]({pictures}/{file})"]
        lines += race_part(one) + products_part(one)
    lines += host_part(python_rows) + simulator_part(simulator_rows)
    lines += ["", "## Counted and modelled: no times"]
    if by_table.get("batch_sum"):
        made["sectors.svg"] = sectors_plot(by_table["batch_sum"])
        lines += ["", f"![What dL/db reads beyond dZ, counted]({pictures}/sectors.svg)"]
    if any(name.startswith("idea: ") for name in by_table.get("matmul", ())):
        made["ideas.svg"] = ideas_plot(by_table["matmul"])
        lines += ["", f"![What each idea of dL/dW buys, modelled]({pictures}/ideas.svg)"]
    for name in by_table:
        for shown in tables.shown(name):
            lines += counted_part(shown, by_table[name])
    lines += ["", "Every counted row states what must hold of it:", "", *table(["table", "rows that hold", "missed"],
                                                                             holding(folder))]
    return "\n".join([*lines, ""]), made


def placed(readme: str, text: str) -> str:
    """A page with this text between its markers.

    Raises
    ------
    ValueError
        If a marker is missing.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"a page lacks the markers {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write, or check."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if something differs")
    options = parser.parse_args(arguments)
    wanted: dict[Path, str] = {}
    made: dict[str, str] = {}
    for page, said, pictures in ((ROOT / "README.md", first_look, f"{PICTURES}/{RESULTS}"),
                                 (ROOT / "benchmarks" / "README.md", section, "results")):
        text, drawn = said(records.RESULTS, pictures)
        wanted[page] = placed(page.read_text(encoding="utf-8"), text)
        made |= drawn
    wanted |= {records.RESULTS / name: plot for name, plot in made.items()}
    stale = [path for path in records.RESULTS.glob("*.svg") if path not in wanted]
    different = [path for path, content in wanted.items()
                 if not path.exists() or path.read_text(encoding="utf-8") != content]
    if options.check:
        for path in (*different, *stale):
            print(f"{path.relative_to(ROOT)} is not what the rows say: python -m benchmarks.report writes it")
        return 1 if different or stale else 0
    for path in different:
        with written(path, force=True) as file:
            file.write(wanted[path].encode())
    for path in stale:
        path.unlink()
    print(f"Both pages and {len(made)} plots say what the rows say; {len(different) + len(stale)} files have changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
