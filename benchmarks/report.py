"""Writes the README's benchmark section, between its markers, and the plots in it, from the rows in benchmarks/results.

Nothing is in it that is in no row: counted and modelled figures from benchmarks/results/counted, Python's and the
simulator's time from host.csv and simulator.csv, and what was measured on GPUs from their files, one each. `--check`
writes nothing and fails where the README or a plot differs from the rows.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from densegrad.commands.files import written

from . import plots, records, run, tables
from .counting import Shown

Row = Mapping[str, str]
ROOT = Path(__file__).parents[1]
BEGIN = "<!-- Written by `python -m benchmarks.report` from the rows in benchmarks/results. -->"
END = "<!-- The end of what is written. -->"
OURS = "densegrad"
SKIPPED = ("2", "5", "17")  # outputs that the plot of counted sectors leaves out, so that it is no longer than a page
NARROW = (1, 3, 10, 33)  # outputs of the narrow layers whose speed is drawn over S


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


def gpu_files(folder: Path) -> dict[str, list[dict[str, str]]]:
    """The rows of each GPU that was measured, by its name."""
    found = {}
    for path in sorted(folder.glob("*.csv")):
        rows = records.read(path)
        if rows and "gpu" in rows[0]:
            found[rows[0]["gpu"]] = rows
    return found


def shape(row: Row) -> str:
    """S x D x M of a row, or S x M where D plays no part."""
    sizes = [row["S"], row["M"]] if row["operation"] == "bias_grad" else [row["S"], row["D"], row["M"]]
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


def measured_part(gpu: str, rows: Sequence[Row]) -> list[str]:
    """The tables of one GPU: what its roofs are, and each case against its best peer."""
    first = rows[0]
    roofs = [row for row in rows if row["operation"] == run.ROOF and row["median_us"]]
    said = [f"{float(row['gb_per_s']):.0f} GB/s copied" if row["implementation"] == "device copy"
            else f"{float(row['tflop_per_s']):.1f} TFLOP/s by {row['implementation']} in {row['dtype']}"
            for row in roofs]
    quick = "; some rows are from --quick runs" if any(row["effort"] == "quick" for row in rows) else ""
    lines = ["", f"**Measured on {gpu}** ({first['date']}, CUDA {first['cuda']}, numba-cuda {first['numba_cuda']}, "
             f"commit {first['commit']}{quick}). Roofs, measured in the same run: {'; '.join(said)}. L2 is cold.", ""]
    body, failed = [], []
    for found in cases(rows).values():
        failed += [f"- {shape(row)} {row['operation']} {row['dtype']}, {name}: {row['remark']}"
                   for name, row in found.items() if not row["median_us"]]
        own = {name: row for name, row in found.items() if name.partition(" ")[0] == OURS and row["median_us"]}
        others = {name: float(row["median_us"]) for name, row in found.items() if name not in own and row["median_us"]}
        best = min(others, key=others.__getitem__, default=None)
        for name, ours in own.items():
            peer = f"{best} {others[best]:.1f} ({others[best] / float(ours['median_us']):.2f} x)" if best else "none"
            body.append([ours["operation"], shape(ours), f"{ours['dtype']}{name.removeprefix(OURS)}",
                         f"{float(ours['median_us']):.1f} ({float(ours['p20_us']):.1f} to {float(ours['p80_us']):.1f})",
                         f"{float(ours['roof']):.0%}" if ours["roof"] else "-", ours["host_us"], peer])
    lines += table(["operation", "S x D x M", "dtype", "us (20 to 80 %)", "of the roof", "Python, us",
                    "fastest peer, us"], body)
    return [*lines, *(["", "Not timed:", "", *failed] if failed else [])]


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
        if row["dtype"] == "float32":
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
                  *table([f"`{row['call']}`" for row in ours], [[row["median_us"] for row in ours]])]
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
    """The README's section and its plots by file name; `pictures` is where the README finds them."""
    gpus = gpu_files(folder)
    by_table = {name: counted_rows(folder, name) for name in tables.names()}
    sources = sorted({row["source"] for rows in by_table.values() for row in rows.values()})
    timed_on = ", ".join(gpus) or "nothing yet: no GPU was at hand"
    python_rows, simulator_rows = (records.read(folder / name) for name in ("host.csv", "simulator.csv"))
    processors = ["; ".join(dict.fromkeys(row["processor"] for row in rows)) or "-"
                  for rows in (python_rows, simulator_rows)]
    overview = [
        ["times against peers and roofs", "measured", timed_on, "`python -m benchmarks.run`, on a GPU"],
        ["sectors, lanes, conflicts, instructions", "counted", "; ".join(sources),
         "`python -m rehearsal -m benchmarks.counted`; on a GPU `python -m benchmarks.counted --ncu`"],
        ["registers, spills, shares of the main loop", "read from the linked machine code", "the same kernels",
         "`python -m rehearsal -m benchmarks.counted`"],
        ["shares of a peak or of DRAM's rate", "modelled from the machine code", "the same kernels", "the same"],
        ["Python's time a call", "measured", processors[0], "`python -m benchmarks.host`"],
        ["the simulator's time", "measured", processors[1], "`python -m benchmarks.simulator`"],
    ]
    lines = ["", *table(["figures", "are", "on", "again with"], overview), "",
             "One command measures the rest and writes it here, on a machine with a GPU: `python -m benchmarks.run && "
             "python -m benchmarks.report`."]
    made: dict[str, str] = {}
    for gpu, rows in gpus.items():
        lines += measured_part(gpu, rows)
        for name, plot in measured_plots(rows).items():
            file = f"{run.file_of(gpu, folder).stem}-{name}.svg"
            made[file] = plot
            lines += ["", f"![{gpu}: {name}]({pictures}/{file})"]
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
    lines += host_part(python_rows) + simulator_part(simulator_rows)
    return "\n".join([*lines, ""]), made


def placed(readme: str, text: str) -> str:
    """The README with this text between its markers.

    Raises
    ------
    ValueError
        If a marker is missing.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md lacks the markers {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write, or check."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if something differs")
    options = parser.parse_args(arguments)
    pictures = records.RESULTS.relative_to(ROOT).as_posix()
    text, made = section(records.RESULTS, pictures)
    readme = ROOT / "README.md"
    wanted = {readme: placed(readme.read_text(encoding="utf-8"), text)}
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
    print(f"README.md and {len(made)} plots say what the rows say; {len(different) + len(stale)} files have changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
