"""Fits the model of what plans of matrix products take to measured plans, and says how good its choices are.

    python -m benchmarks.fit benchmarks/results/nvidia-h200-2026-11-27-05b0320-plans.csv [--leave-out] [--save]

A row is one plan of one layer: operation, kind, S, D, M, the tile, the parts, and the median of its GPU time in
microseconds. Rows whose last column, `disturbed`, is not 0 are left out, and no others. For every kind and order of
operands the coefficients of `densegrad.families.cost` are found that make the relative errors small and are not
negative; of how many blocks share a multiprocessor, what makes the choices best. Printed is the time of the plan that
the model would choose among the measured ones over that of the best one, by kind and operation: in sample and, with
--leave-out, of each layer by a model that has not seen it. --save writes src/densegrad/data/plan_costs.json.
"""
from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from densegrad.families.cost import SHARED_TERMS, TILE_TERMS, terms, tile_name

COSTS = Path(__file__).parents[1] / "src" / "densegrad" / "data" / "plan_costs.json"
ORDER = {"dw": "across", "dx": "along"}
DTYPE = {"float32": "float32", "bfloat16": "bfloat16", "tf32": "float32", "tf32x3": "float32"}
#: how many blocks may share a multiprocessor
RESIDENTS = (1, 2, 3, 4, 5, 6, 8, 12)
#: how strongly a tile's coefficients are drawn to those that follow from its size, where its rows do not say: of 0.3,
#: 0.6 and 1 that by which layers that are left out lose least
PRIOR = 1.0
#: relative errors above this count less: a plan that is off by much is none to choose
FAR = 0.06


@dataclass(frozen=True)
class Row:
    """A measured plan: what `terms` reads of a plan, the layer and the microseconds."""

    layer: str
    kind: str
    operation: str
    rows: int
    cols: int
    depth: int
    tile_rows: int
    tile_cols: int
    tile_depth: int
    unit: tuple[int, int]
    parts: int
    us: float

    @property
    def dtype(self) -> str:
        """Of the operands."""
        return DTYPE[self.kind]


def read(path: Path) -> list[Row]:
    """The rows of a file that nothing disturbed."""
    found = []
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["disturbed"] == "0":
                s, d, m = (int(row[name]) for name in "SDM")
                rows, cols, depth = (d, m, s) if row["operation"] == "dw" else (s, d, m)
                found.append(Row(row["layer"], row["kind"], row["operation"], rows, cols, depth,
                                 tile_rows=int(row["tile_rows"]), tile_cols=int(row["tile_cols"]),
                                 tile_depth=int(row["tile_depth"]), unit=(int(row["unit_rows"]), int(row["unit_cols"])),
                                 parts=int(row["parts"]), us=float(row["us"])))
    return found


@dataclass(frozen=True)
class Model:
    """Coefficients of one kind and operation: (blocks of a multiprocessor, the tile's), and the shared ones."""

    tiles: dict[str, tuple[int, tuple[float, ...]]]
    shared: tuple[float, ...]

    def predicted(self, row: Row) -> float:
        """Microseconds; infinite for a tile that it does not know."""
        if tile_name(row) not in self.tiles:
            return math.inf
        resident, own = self.tiles[tile_name(row)]
        of_tile, shared = terms(row, ORDER[row.operation], resident)
        return float(np.dot(of_tile, own) + np.dot(shared, self.shared))


def fit(rows: Sequence[Row]) -> Model:
    """The model whose choices among these rows, of one kind and operation, are best."""
    names = sorted({tile_name(row) for row in rows})
    residents = {name: _resident_alone([row for row in rows if tile_name(row) == name]) for name in names}
    model = _solve(rows, residents)
    best = _score(rows, model)
    for name in names:
        for resident in RESIDENTS:
            trial = residents | {name: resident}
            candidate = _solve(rows, trial)
            score = _score(rows, candidate)
            if score < best - 1e-4:
                best, model, residents = score, candidate, trial
    return model


def _resident_alone(rows: Sequence[Row]) -> int:
    """How many blocks of a tile share a multiprocessor, as its own rows say."""
    from scipy.optimize import nnls

    def error(resident: int) -> float:
        lines = np.array([sum(terms(row, ORDER[row.operation], resident), ()) for row in rows])
        us = np.array([row.us for row in rows])
        found, _ = nnls(lines / us[:, None], np.ones(len(rows)))
        errors = np.abs(lines @ found / us - 1)
        return float(np.median(errors) + 0.3 * errors.mean())

    return min(RESIDENTS, key=error)


def _score(rows: Sequence[Row], model: Model) -> float:
    """What is lost by its choices, layers where much is lost above all, and half of its errors."""
    lost = list(losses(rows, model).values())
    errors = [min(abs(model.predicted(row) / row.us - 1), 0.3) for row in rows]
    return math.log(statistics.geometric_mean(lost)) + max(0.0, max(lost) - 1.2) / 20 + statistics.mean(errors) / 2


def _solve(rows: Sequence[Row], residents: dict[str, int]) -> Model:
    from scipy.optimize import nnls

    names, own, shared = list(residents), len(TILE_TERMS), len(SHARED_TERMS)
    places = {name: own * number for number, name in enumerate(names)}
    matrix, us = np.zeros((len(rows), own * len(names) + shared)), np.array([row.us for row in rows])
    pooled = np.zeros((len(rows), 4 + shared))
    for line, pool, row in zip(matrix, pooled, rows, strict=True):
        resident, place = residents[tile_name(row)], places[tile_name(row)]
        of_tile, others = terms(row, ORDER[row.operation], resident)
        line[place:place + own], line[own * len(names):] = of_tile, others
        work = row.tile_rows * row.tile_cols * row.tile_depth / 1e6
        pool[:4], pool[4:] = (of_tile[0] * work * resident, of_tile[1] * work, of_tile[0], of_tile[2]), others
    # What follows from a tile's size alone, for all tiles together.
    common, _ = nnls(pooled / us[:, None], np.ones(len(rows)))
    prior = np.zeros(matrix.shape[1])
    prior[own * len(names):] = common[4:]
    for row in rows:
        work, place = row.tile_rows * row.tile_cols * row.tile_depth / 1e6, places[tile_name(row)]
        prior[place:place + own] = (common[0] * work * residents[tile_name(row)] + common[2], common[1] * work,
                                    common[3])
    typical = np.maximum(np.abs(matrix / us[:, None]).mean(axis=0), 1e-9)
    pull = np.diag(PRIOR * typical * math.sqrt(len(rows) / matrix.shape[1]))
    fastest = _fastest(rows)
    near = np.array([fastest[row.layer] / row.us for row in rows])
    weight = near
    for _ in range(6):
        found, _ = nnls(np.vstack([matrix * (weight / us)[:, None], pull]), np.concatenate([weight, pull @ prior]),
                        maxiter=20 * matrix.shape[1])
        errors = np.abs(matrix @ found / us - 1)
        weight = near / np.sqrt(np.maximum(errors / FAR, 1))
    return Model({name: (residents[name], tuple(found[place:place + own])) for name, place in places.items()},
                 tuple(found[own * len(names):]))


def _fastest(rows: Iterable[Row]) -> dict[str, float]:
    found: dict[str, float] = {}
    for row in rows:
        found[row.layer] = min(row.us, found.get(row.layer, math.inf))
    return found


def losses(rows: Sequence[Row], model: Model) -> dict[str, float]:
    """The chosen plan's time over the best one's, of each layer."""
    chosen: dict[str, Row] = {}
    for row in rows:
        if row.layer not in chosen or model.predicted(row) < model.predicted(chosen[row.layer]):
            chosen[row.layer] = row
    return {layer: chosen[layer].us / us for layer, us in _fastest(rows).items()}


def left_out(rows: Sequence[Row]) -> dict[str, float]:
    """The same, each layer by a model that was fitted without it."""
    found: dict[str, float] = {}
    for layer in _fastest(rows):
        model = fit([row for row in rows if row.layer != layer])
        found |= losses([row for row in rows if row.layer == layer], model)
    return found


def as_json(groups: dict[tuple[str, str], tuple[Sequence[Row], Model]], source: str) -> dict[str, Any]:
    """What is kept of the models."""
    kept: dict[str, Any] = {"source": source, "tile terms": TILE_TERMS, "shared terms": SHARED_TERMS, "groups": {}}
    for (kind, operation), (rows, model) in groups.items():
        kept["groups"][f"{kind}, {ORDER[operation]}"] = {
            "kind": kind, "rows": len(rows), "coefficients": [_rounded(number) for number in model.shared],
            "most parts": max(row.parts for row in rows),
            "most workspace": max(row.parts * row.rows * row.cols * 4 * (row.parts > 1) for row in rows),
            "tiles": {name: {"rows": sum(tile_name(row) == name for row in rows), "resident": resident,
                             "coefficients": [_rounded(number) for number in own]}
                      for name, (resident, own) in model.tiles.items()}}
    return kept


def _rounded(number: float) -> float:
    return float(f"{number:.4g}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Fit, print and, if asked, save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fit", description=f"{__doc__}\nNeeds scipy.",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="a file of measured plans")
    parser.add_argument("--leave-out", action="store_true", help="fit without each layer in turn, too (some minutes)")
    parser.add_argument("--save", action="store_true", help=f"write {COSTS.name}, which plans are chosen by")
    options = parser.parse_args(arguments)
    rows = read(options.rows)
    table = Table("kind", "operation", "rows", "chosen over best", "worst layer", "left out", "worst layer",
                  title="Time of the chosen plan over that of the best, geometric means", title_justify="left")
    groups: dict[tuple[str, str], tuple[Sequence[Row], Model]] = {}
    for kind, operation in dict.fromkeys((row.kind, row.operation) for row in rows):
        group = [row for row in rows if (row.kind, row.operation) == (kind, operation)]
        model = fit(group)
        groups[kind, operation] = group, model
        cells = _cells(losses(group, model)) + (_cells(left_out(group)) if options.leave_out else ["", ""])
        table.add_row(kind, operation, str(len(group)), *cells)
    Console().print(table)
    if options.save:
        COSTS.write_text(json.dumps(as_json(groups, options.rows.stem), indent=1) + "\n")
    return 0


def _cells(lost: dict[str, float]) -> list[str]:
    worst = max(lost, key=lambda layer: lost[layer])
    return [f"{statistics.geometric_mean(lost.values()):.3f}", f"{lost[worst]:.2f} {worst}"]


if __name__ == "__main__":
    sys.exit(main())
