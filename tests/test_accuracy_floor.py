"""The search for an accuracy floor, with scores that are made up: only its steps are looked at."""

import dataclasses

import pytest

from sft.accuracy_floor import TRIALS, Trial, search
from sft.core.budget import Budget
from sft.core.errors import BudgetError
from sft.core.records import Cost, Plan, PlanRow, Profile

ORIGINAL = Cost(100, 1000, 400, 2.0, 50)


@pytest.fixture
def profile() -> Profile:
    return Profile(
        "m", "onnxruntime", "", 1, 100, 1000, 400, 0, (), 0, latency=2.0, memory=50
    )  # fmt: skip


def plan_of(fraction: float | None) -> Plan:
    """A plan whose only row tells the fraction that it was made for."""
    from sft.core.records import Option

    rank = max(1, round(1000 * (fraction or 0)))
    row = PlanRow("x", Option("channel_in", (rank,)), 0.0, ORIGINAL, "")
    return Plan("m", "t", {}, (row,), ORIGINAL, ORIGINAL, "optimal", 0.0, 0.0, 0.0)


def run(profile: Profile, budget: Budget, cost: str, worst: float, least: float = 0.0):
    """Scores are 0.9 where at least `worst` of the cost is allowed; below `least` nothing fits."""
    tried: list[float] = []

    def make(asked: Budget) -> Plan:
        fraction = getattr(asked, cost)
        if fraction is not None and fraction < least:
            raise BudgetError("nothing fits")
        return plan_of(fraction)

    def attempt(plan: Plan) -> Trial[None]:
        fraction = plan.rows[0].option.rank[0] / 1000
        tried.append(fraction)
        return Trial(plan, 0.9 if fraction >= worst else 0.5, None)

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
    with pytest.raises(Exception, match="latency"):
        run(blind, Budget(latency=0.5), "latency", worst=0.1)
