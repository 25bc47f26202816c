"""The race behind `densegrad tune`: the plans that a gradient could have, each held to float64 before it is timed.

A first look times every candidate alone. The best of it and the model's choice then take turns, in rounds of samples,
until the last two medians of each agree, or rounds have run out: a median that does not repeat is no time. The winner
is another plan than the model's only if it is faster by more than medians differ from round to round.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np

import densegrad

from .. import device, reference, tuned
from ..plans import BatchSumPlan, batch_sum_candidates, product_candidates
from ..testing import error_bound, host
from . import timing
from .checks import ARGUMENTS, Case, compare, problem

#: how far two medians of one plan may lie apart, as a share of the smaller: those further apart are no times
REPEATS = 0.03
#: rounds in turns, at most
ROUNDS = 4
#: how many of the first look take part in them, beside the model's choice
FINALISTS = 4
#: how many times the least modelled cost a candidate may cost; others are left out
FAR = 3.0


@dataclass(frozen=True)
class Outcome:
    """What a race of the plans for one gradient came to."""

    case: Case
    model: Any  # the plan that the model chooses
    order: Any
    winner: Any
    seconds: float | None  # of the winner; None if the model's choice has no time that is believed
    model_seconds: float | None
    timed: int
    left_out: int  # candidates whose modelled cost is far above the least
    faults: tuple[tuple[Any, str], ...]  # plans that are wrong or fail, and how
    doubtful: tuple[tuple[Any, list[float]], ...]  # finalists whose medians do not repeat, and those in seconds

    @property
    def entry(self) -> tuned.Entry | None:
        """What is written, if the winner is another plan than the model's."""
        if self.seconds is None or self.model_seconds is None or self.winner == self.model:
            return None
        return tuned.Entry(self.winner, self.order, self.seconds * 1e6, self.model_seconds * 1e6)


def candidates(model: Any, order: Any, precision: str | None, capability: tuple[int, int]) -> tuple[list[Any], int]:
    """Plans for what the model's choice is for, that one first, and how many were left out as far too slow."""
    if isinstance(model, BatchSumPlan):
        return batch_sum_candidates(model.samples, model.outputs, model.dtype, model.layout, model.compensated), 0
    listed = [plan for plan in product_candidates(model.rows, model.cols, model.depth, model.dtype, precision,
                                                  capability, order=order)
              if tuned.question_of(plan, order) == tuned.question_of(model, order)]
    costs = {plan: plan.cost(order) for plan in listed}
    totals = {plan: cost.total for plan, cost in costs.items() if cost}
    near = [plan for plan in listed if totals.get(plan, 0.0) <= FAR * min(totals.values(), default=0.0)]
    return list(dict.fromkeys([model, *near])), len(listed) - len(near)


class Race:
    """The plans for one gradient of one layer against one another, on the device in use."""

    def __init__(self, case: Case, clock: timing.Clock, effort: timing.Effort):
        self.case, self.clock, self.effort = case, clock, effort
        arrays, orientation = problem(case)
        given = [arrays[name] for name in ARGUMENTS[case.function]]
        if case.function == "bias_grad":
            orientation = {"batch_axis": case.batch_axis}
        self.options = orientation | ({"precision": case.precision} if case.precision else {})
        meaning = getattr(reference, case.function)
        self.exact, self.magnitude = (meaning(*operands, **orientation) for operands in (given, [*map(np.abs, given)]))
        self.placed, self.blank = device.current().placed, np.full(self.exact.shape, np.nan, given[0].dtype)
        count = timing.sets_of_buffers(clock, effort.calls, sum(array.nbytes for array in (*given, self.blank)))
        self.sets = [([self.placed(array, False) for array in given], self._result()) for _ in range(count)]
        with tuned.asked() as questions:
            self._call(self.sets[0])
        self.model, self.order = questions[0]

    def _result(self) -> Any:
        """A result full of NaN, which a plan has to replace."""
        return self.placed(self.blank.copy(), False)

    def _call(self, buffers: tuple[list[Any], Any], **plan: Any) -> Callable[[], Any]:
        """A call with these operands and this result, prepared, so that Python takes the least time that it can."""
        given, out = buffers
        return densegrad.prepare(getattr(densegrad, self.case.function), *given, out=out, **plan, **self.options)

    def run(self) -> Outcome:
        """All of it."""
        plans, left_out = candidates(self.model, self.order, self.case.precision,
                                     device.current().capability(device.HOST))
        medians: dict[Any, list[float]] = {}
        faults = []
        for plan in plans:
            try:
                fault = self._fault(plan)
                if not fault:
                    medians[plan] = [*self._round([plan]).values()]
            except Exception as error:  # a plan that fails is one that is not taken; those after it still count
                fault = f"{type(error).__name__}: {' '.join(str(error).split())}"
            if fault:
                faults.append((plan, fault))
        finalists = sorted(medians, key=lambda plan: medians[plan][0])[:FINALISTS]
        if self.model in medians and self.model not in finalists:
            finalists.append(self.model)
        for _ in range(ROUNDS):
            if all(map(repeats, map(medians.__getitem__, finalists))):
                break
            for plan, seconds in self._round(finalists).items():
                medians[plan].append(seconds)
        believed = {plan: medians[plan][-1] for plan in finalists if repeats(medians[plan])}
        model_seconds = believed.get(self.model)
        winner = min(believed, key=believed.__getitem__, default=self.model)
        if model_seconds is None or believed[winner] * (1 + REPEATS) >= model_seconds:
            winner = self.model
        return Outcome(self.case, self.model, self.order, winner=winner, seconds=believed.get(winner),
                       model_seconds=model_seconds, timed=len(medians), left_out=left_out, faults=tuple(faults),
                       doubtful=tuple((plan, medians[plan]) for plan in finalists if plan not in believed))

    def _fault(self, plan: Any) -> str:
        """How a plan's result is wrong, if it is."""
        given, _ = self.sets[0]
        result = host(self._call((given, self._result()), plan=plan)())
        terms = self.case.out_features if self.case.function == "input_grad" else self.case.samples
        bound = error_bound(self.magnitude, self.exact, plan.chain, terms, self.case.dtype,
                            product_error=getattr(plan, "product_error", 0.0))
        error, _, share = compare(result, self.exact, bound)
        return "" if share <= 1 else f"wrong: an error of {error:.3g}, {share:.3g} times its bound"

    def _round(self, plans: list[Any]) -> dict[Any, float]:
        """The median of each in samples that take turns; infinite where the GPU may have waited for Python."""
        calls = {plan: [self._call(buffers, plan=plan) for buffers in self.sets] for plan in plans}
        timed = {}
        for plan in plans:
            for call in calls[plan]:  # what is made on first use is made now
                call()
            seconds = timing.warm_up(self.clock, calls[plan][0], self.effort)
            timed[plan] = timing.Timed(timing.calls_of_a_sample(seconds, self.effort))
        for plan in timing.interleaved(plans, self.effort.samples):
            timing.sample(self.clock, timed[plan], calls[plan])
        return {plan: inf if one.waited else one.quantile(0.5) for plan, one in timed.items()}


def repeats(medians: list[float]) -> bool:
    """Whether the last two medians of a plan are near enough for the last to be believed."""
    return len(medians) > 1 and abs(medians[-1] - medians[-2]) <= REPEATS * min(medians[-2:])


def outcomes(cases: Iterable[Case], clock: timing.Clock, effort: timing.Effort) -> Iterator[Outcome | None]:
    """What each race comes to; None where the plans have run for a case before, as for one sum in two layers."""
    seen = set()
    for case in cases:
        race = Race(case, clock, effort)
        question = tuned.question_of(race.model, race.order)
        yield None if question in seen else race.run()
        seen.add(question)
