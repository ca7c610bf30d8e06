"""An accuracy floor is met by measuring: bisection on the budget with the real score.

Every trial is a whole one: planned, built, trained, exported, and scored on the exported file with
the validation split.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Generic, Self, TypeVar

from sft.core.budget import Budget
from sft.core.errors import BudgetError, InputError
from sft.core.progress import say
from sft.core.records import Plan, Profile

T = TypeVar("T")

TRIALS = 4
STEPS = 2 * TRIALS  # with those that lead to a plan that was tried before


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One step of the search: the fraction of the original's `cost` that was allowed (None: as the
    budget says), the validation score (None: no plan fits), and whether it keeps the floor.
    """

    cost: str | None
    fraction: float | None
    score: float | None
    kept: bool | None


@dataclasses.dataclass(frozen=True)
class Trial(Generic[T]):
    """A plan, the validation score of the file that came of it, and what was made.

    log : every evaluation of the search that delivers this trial.
    """

    plan: Plan
    score: float
    made: T
    log: tuple[Evaluation, ...] = ()


def search(
    profile: Profile,
    budget: Budget,
    score_before: float,
    attempt: Callable[[Plan], Trial[T]],
    make_plan: Callable[[Budget], Plan],
) -> Trial[T]:
    """The trial to deliver.

    With limits on a cost and nothing to minimise there is one trial: the plan of least
    damage within the limits. Otherwise (only `max_drop`, or `minimize=`) the minimised cost is
    bisected, in `TRIALS` trials, from what the budget allows of it down to the smallest whose score
    keeps the floor. A plan that comes up again is no new trial. Raises `BudgetError` if no plan
    fits, or if none of the trials keeps the floor, and `InputError` for a score that is not a
    number where there is a floor.
    """
    limited = budget.limits(profile.original)
    if budget.max_drop is None:
        trial = attempt(make_plan(budget))
        return dataclasses.replace(trial, log=(Evaluation(None, None, trial.score, None),))
    floor = _number(score_before, "of the original") - budget.max_drop - 1e-9
    if limited and budget.minimize is None:
        trial = attempt(make_plan(budget))
        kept = _number(trial.score, "of the compressed network") >= floor
        return dataclasses.replace(trial, log=(Evaluation(None, None, trial.score, kept),))
    found = _Bisection(profile, budget, floor, attempt, make_plan).run()
    if found.best is None:
        raise _none_kept(found, score_before)
    return dataclasses.replace(found.best, log=tuple(found.log))


def _number(score: float, whose: str) -> float:
    if math.isnan(score):
        raise InputError(
            f"The validation score {whose} is nan, so it cannot be held against max_drop. Give an "
            f"evaluate that returns a number for this network."
        )
    return score


class _Bisection(Generic[T]):
    """The minimised cost is bisected between nothing and the most that the budget allows of it."""

    def __init__(
        self,
        profile: Profile,
        budget: Budget,
        floor: float,
        attempt: Callable[[Plan], Trial[T]],
        make_plan: Callable[[Budget], Plan],
    ) -> None:
        self.budget, self.floor, self.attempt, self.make_plan = budget, floor, attempt, make_plan
        self.cost = budget.minimize or "size"
        self.limited = bool(budget.limits(profile.original))
        self.low, self.high = 0.0, _most(budget, self.cost, profile)
        self.best: Trial[T] | None = None
        self.done: dict[tuple[str, ...], Trial[T]] = {}
        self.log: list[Evaluation] = []

    def run(self) -> Self:
        """All trials; with a limit of the user's own the first is of that budget as it stands."""
        if self.limited:
            self._try(self.high, self.make_plan(self.budget))
        while self.low < self.high and self._used() < TRIALS and len(self.log) < STEPS:
            fraction = (self.low + self.high) / 2
            try:
                plan = self.make_plan(_limited(self.budget, self.cost, fraction))
            except BudgetError:
                say(f"  {self.cost} {fraction:.3f}: no plan fits")
                self.log.append(Evaluation(self.cost, fraction, None, None))
                self.low = fraction
                continue
            self._try(fraction, plan)
        return self

    def _used(self) -> int:
        return len(self.done) + sum(step.score is None for step in self.log)

    def _try(self, fraction: float, plan: Plan) -> None:
        key = tuple(str(row.option) for row in plan.rows)
        if key not in self.done:
            say(f"trial {self._used() + 1} of {TRIALS}: {self.cost} at most {fraction:.3f}")
            self.done[key] = self.attempt(plan)
        trial = self.done[key]
        kept = _number(trial.score, "of a compressed network") >= self.floor
        say(f"  {self.cost} {fraction:.3f}: score {trial.score:.4f}, floor {self.floor:.4f}")
        self.log.append(Evaluation(self.cost, fraction, trial.score, kept))
        if kept:
            self.best, self.high = trial, fraction
        else:
            self.low = fraction


def _limited(budget: Budget, cost: str, fraction: float) -> Budget:
    return dataclasses.replace(budget, **{cost: fraction})  # type: ignore[arg-type]


def _most(budget: Budget, cost: str, profile: Profile) -> float:
    """The fraction of the original's cost that the budget allows; its own number where it says one.

    Raises `InputError` for a cost that was not measured.
    """
    asked: float = getattr(budget, cost) or 1.0
    whole: float = getattr(profile.original, cost) or math.nan
    return min(asked, _limited(budget, cost, asked).limits(profile.original)[cost] / whole)


def _none_kept(found: _Bisection[T], score_before: float) -> BudgetError:
    budget, tried = found.budget, [step.fraction for step in found.log if step.fraction]
    if not found.done:
        return BudgetError(
            f"No plan takes at most {max(tried):.4g} of the original's {found.cost}, the most that "
            f"was tried. Fix fewer layers, or minimize another cost."
        )
    closest = max(trial.score for trial in found.done.values())
    return BudgetError(
        f"No trial kept the score within {budget.max_drop} of {score_before:.4f}; the best "
        f"reached {closest:.4f}. Allow a larger max_drop, or train longer."
    )
