"""The search for an accuracy floor, with scores that are made up: only its steps are looked at."""

import dataclasses
import math

import pytest

from sft.accuracy_floor import TRIALS, Trial, search
from sft.core.budget import Budget
from sft.core.errors import BudgetError, InputError
from sft.core.records import Cost, Option, Plan, PlanRow, Profile
from sft.planning import plan as real_plan

ORIGINAL = Cost(100, 1000, 400, 2.0, 50)


@pytest.fixture
def profile() -> Profile:
    return Profile(
        "m", "onnxruntime", "", 1, 100, 1000, 400, 0, (), 0, latency=2.0, memory=50
    )  # fmt: skip


def plan_of(fraction: float | None) -> Plan:
    """A plan whose only row tells the fraction that it was made for."""
    rank = max(1, round(1000 * (fraction or 0)))
    row = PlanRow("x", Option("channel_in", (rank,)), 0.0, ORIGINAL, "")
    return Plan("m", "t", {}, (row,), ORIGINAL, ORIGINAL, "optimal", 0.0, 0.0, 0.0)


def run(
    profile: Profile,
    budget: Budget,
    cost: str,
    worst: float,
    least: float = 0.0,
    widest: float = 1.0,
    bad: float = 0.5,
):
    """Scores are 0.9 where at least `worst` of the cost is allowed, else `bad`; below `least`
    nothing fits, and above `widest` the plan stays the same.
    """
    tried: list[float] = []

    def make(asked: Budget) -> Plan:
        limits = asked.limits(profile.original)
        fraction = limits[cost] / getattr(profile, cost) if cost in limits else None
        if fraction is not None and fraction < least:
            raise BudgetError("nothing fits")
        return plan_of(None if fraction is None else min(fraction, widest))

    def attempt(plan: Plan) -> Trial[None]:
        fraction = plan.rows[0].option.rank[0] / 1000
        tried.append(fraction)
        return Trial(plan, 0.9 if fraction >= worst else bad, None)

    return search(profile, budget, 0.9, attempt, make), tried


@pytest.mark.parametrize("cost", ["size", "macs", "latency"])
def test_the_minimised_cost_is_bisected(profile, cost) -> None:
    found, tried = run(profile, Budget(max_drop=0.01, minimize=cost), cost, worst=0.3)
    assert tried == [0.5, 0.25, 0.375, 0.312]
    assert found.plan.rows[0].option.rank[0] / 1000 == min(t for t in tried if t >= 0.3)


def test_every_evaluation_is_in_the_log(profile) -> None:
    budget = Budget(max_drop=0.01, minimize="latency")
    found, _ = run(profile, budget, "latency", worst=0.6, least=0.55)
    steps = [(e.cost, e.fraction, e.score, e.kept) for e in found.log]
    assert steps[0] == ("latency", 0.5, None, None)
    assert steps[1] == ("latency", 0.75, 0.9, True)
    assert len(steps) == TRIALS
    assert [e.kept for e in found.log[2:]] == [e.score == 0.9 for e in found.log[2:]]


def test_one_trial_is_logged_too_with_its_verdict(profile) -> None:
    for budget, kept in (
        (Budget(latency=0.4), None),
        (Budget(latency=0.4, max_drop=0.01), False),
        (Budget(latency=0.7, max_drop=0.01), True),
    ):
        found, tried = run(profile, budget, "latency", worst=0.6)
        assert len(tried) == len(found.log) == 1
        assert found.log[0].kept is kept


def test_no_trial_that_keeps_the_floor_is_an_error_with_the_best_score(profile) -> None:
    with pytest.raises(BudgetError, match=r"0\.5000"):
        run(profile, Budget(max_drop=0.01, minimize="latency"), "latency", worst=2.0)


def test_a_latency_that_was_not_measured_cannot_be_limited(profile) -> None:
    blind = dataclasses.replace(profile, latency=None)
    words = r"Budget latency=0\.5: the profile holds no latency of the original\."
    with pytest.raises(InputError, match=words):
        run(blind, Budget(latency=0.5), "latency", worst=0.1)
    with pytest.raises(InputError, match=r"Budget latency=1\.0: the profile holds no latency"):
        run(blind, Budget(latency_ms=1, max_drop=0.1, minimize="latency"), "latency", worst=0.1)


@pytest.mark.parametrize(
    ("cost", "limit", "first"),
    [
        ("size", {"size_bytes": 40}, 0.1),
        ("latency", {"latency_ms": 0.2}, 0.1),
        ("macs", {"macs_count": 300, "macs": 0.2}, 0.2),
        ("size", {"size_bytes": 4000}, 1.0),
    ],
)
def test_the_search_begins_at_the_limit_that_was_asked(profile, cost, limit, first) -> None:
    budget = Budget(**limit, max_drop=0.01, minimize=cost)
    found, tried = run(profile, budget, cost, worst=0.2 * first)
    steps = [first * share for share in (1, 0.5, 0.25, 0.125)]
    assert [e.fraction for e in found.log] == pytest.approx(steps)
    assert tried == pytest.approx([min(step, 1) for step in steps], abs=6e-4)
    assert found.plan.rows[0].option.rank[0] == pytest.approx(250 * first, abs=1)


def test_a_plan_that_comes_up_again_is_no_new_trial(profile) -> None:
    budget = Budget(max_drop=0.01, minimize="size")
    found, tried = run(profile, budget, "size", worst=0.15, widest=0.2)
    assert [e.fraction for e in found.log] == [0.5, 0.25, 0.125, 0.1875, 0.15625]
    assert tried == [0.2, 0.125, 0.188, 0.156]
    found, tried = run(profile, budget, "size", worst=0.0, widest=0.001)
    assert tried == [0.001]
    assert len(found.log) == 2 * TRIALS


def test_a_limit_that_does_not_keep_the_floor_is_not_tightened(profile) -> None:
    asked: list[Budget] = []

    def make(budget: Budget) -> Plan:
        asked.append(budget)
        return plan_of(0.1)

    budget = Budget(size_bytes=40, max_drop=0.01, minimize="size")
    with pytest.raises(BudgetError, match=r"within 0\.01 of 0\.9000; the best reached 0\.5000"):
        search(profile, budget, 0.9, lambda plan: Trial(plan, 0.5, None), make)
    assert asked == [budget]


def unreachable(plan: Plan) -> Trial[None]:
    raise AssertionError("no plan is to be tried")


def test_an_error_of_the_budget_names_only_what_was_asked(profiled) -> None:
    budget = Budget(macs=0.001, max_drop=0.01, minimize="size")
    with pytest.raises(BudgetError) as own:
        real_plan(profiled, budget)
    with pytest.raises(BudgetError) as error:
        search(profiled, budget, 0.9, unreachable, lambda b: real_plan(profiled, b))
    assert str(error.value) == str(own.value)
    assert "macs=0.001" in str(error.value)
    assert "size" not in str(error.value)
    free = Budget(max_drop=0.01, minimize="size")
    with pytest.raises(BudgetError, match=r"at most 0\.9375 of the original's size") as error:
        search(profiled, free, 0.9, unreachable, lambda b: real_plan(profiled, b, keep="*"))
    assert "asked" not in str(error.value)


@pytest.mark.parametrize(
    "budget",
    [
        Budget(max_drop=0.01),
        Budget(size=0.2, max_drop=0.01),
        Budget(max_drop=0.01, minimize="macs"),
    ],
)
def test_a_score_that_is_not_a_number_is_refused_by_name(profile, budget) -> None:
    with pytest.raises(InputError, match=r"score of (a|the) compressed network is nan"):
        run(profile, budget, budget.minimize or "size", worst=2.0, bad=math.nan)
    with pytest.raises(InputError, match="score of the original is nan"):
        search(profile, budget, math.nan, unreachable, lambda b: plan_of(0.5))
    found, _ = run(profile, Budget(size=0.2), "size", worst=2.0, bad=math.nan)
    assert math.isnan(found.score)
