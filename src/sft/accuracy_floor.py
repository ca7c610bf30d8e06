"""An accuracy floor is met by measuring: bisection on the budget with the real score.

Every trial is a whole one: planned, built, trained, exported, and scored on the exported file with
the validation split.
"""

import dataclasses
from collections.abc import Callable
from typing import Generic, TypeVar

from sft.core.budget import Budget
from sft.core.errors import BudgetError
from sft.core.progress import say
from sft.core.records import Plan, Profile

T = TypeVar("T")

TRIALS = 4


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
    bisected, in `TRIALS` trials, down to the smallest whose score keeps the floor. Raises
    `BudgetError` if no plan fits, or if none of the trials keeps the floor.
    """
    limited = budget.limits(profile.original)
    if budget.max_drop is None or (limited and budget.minimize is None):
        trial = attempt(make_plan(budget))
        kept = None if budget.max_drop is None else trial.score >= _floor(budget, score_before)
        return dataclasses.replace(trial, log=(Evaluation(None, None, trial.score, kept),))
    return _bisect(budget, score_before, attempt, make_plan, budget.minimize or "size", limited)


def _floor(budget: Budget, score_before: float) -> float:
    assert budget.max_drop is not None
    return score_before - budget.max_drop - 1e-9


def _limited(budget: Budget, cost: str, fraction: float) -> Budget:
    return dataclasses.replace(budget, **{cost: fraction})  # type: ignore[arg-type]


def _bisect(
    budget: Budget,
    score_before: float,
    attempt: Callable[[Plan], Trial[T]],
    make_plan: Callable[[Budget], Plan],
    cost: str,
    limited: dict[str, float],
) -> Trial[T]:
    floor = _floor(budget, score_before)
    low, high = 0.0, getattr(budget, cost) or 1.0
    best: Trial[T] | None = None
    done: dict[tuple[str, ...], Trial[T]] = {}
    log: list[Evaluation] = []
    closest = float("-inf")
    for number in range(TRIALS):
        fraction = high if number == 0 and limited else (low + high) / 2
        try:
            plan = make_plan(_limited(budget, cost, fraction))
        except BudgetError:
            if number == TRIALS - 1 and best is None and closest == float("-inf"):
                raise
            say(f"  {cost} {fraction:.3f}: no plan fits")
            log.append(Evaluation(cost, fraction, None, None))
            low = fraction
            continue
        key = tuple(str(row.option) for row in plan.rows)
        if key not in done:
            say(f"trial {number + 1} of {TRIALS}: {cost} at most {fraction:.3f}")
            done[key] = attempt(plan)
        trial = done[key]
        closest = max(closest, trial.score)
        say(f"  {cost} {fraction:.3f}: score {trial.score:.4f}, floor {floor:.4f}")
        log.append(Evaluation(cost, fraction, trial.score, trial.score >= floor))
        if trial.score >= floor:
            best, high = trial, fraction
        else:
            low = fraction
    if best is None:
        raise BudgetError(
            f"No trial kept the score within {budget.max_drop} of {score_before:.4f}; the best "
            f"reached {closest:.4f}. Allow a larger max_drop, or train longer."
        )
    return dataclasses.replace(best, log=tuple(log))
