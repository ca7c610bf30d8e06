"""The enumeration near the bound, against a list of all choices and against HiGHS."""

import itertools
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft.planning import enumeration, solve
from sft.planning.enumeration import enumerate_best
from sft.planning.lagrangian import relax
from sft.planning.table import Table, affordable, flatten

NAMES = ("size", "macs", "latency")


def knapsack(seed, layers, options, limited, distinct):
    """A table with its limits, which some choice obeys; few distinct damages mean ties."""
    rng = np.random.default_rng(seed)
    damages = [np.sort(rng.integers(0, distinct, options)) / distinct for _ in range(layers)]
    costs = {
        name: [np.sort(rng.integers(1, 50, options))[::-1] * 1.0 for _ in range(layers)]
        for name in NAMES
    }
    anyone = rng.integers(0, options, layers)
    spent = {n: sum(c[o] for c, o in zip(costs[n], anyone, strict=True)) for n in NAMES}
    limits = {n: spent[n] + float(rng.integers(0, 9)) for n in NAMES[:limited]}
    return affordable(flatten(damages, costs), limits), limits


def every_choice(table: Table, limits):
    own = [np.flatnonzero(table.layer == each) for each in range(table.layers)]
    for choice in itertools.product(*own):
        positions = np.array(choice, dtype=np.intp)
        if all(table.costs[n][positions].sum() <= most for n, most in limits.items()):
            yield positions


@given(
    seed=st.integers(0, 10**6),
    layers=st.integers(1, 5),
    options=st.integers(1, 4),
    limited=st.integers(0, 3),
    distinct=st.sampled_from([2, 7, 1000]),
    refuse=st.booleans(),
)
def test_no_choice_that_is_allowed_is_better(seed, layers, options, limited, distinct, refuse):
    """From the worst choice as the known one; with `refuse` a third of all are not allowed."""
    table, limits = knapsack(seed, layers, options, limited, distinct)
    relaxed = relax(table, limits)
    ties = 1e-6 * table.burden()
    objective = relaxed.damage + ties
    fitting = list(every_choice(table, limits))
    worst = max(fitting, key=lambda c: objective[c].sum())

    def keeps(choice):
        allowed = all(table.costs[n][choice].sum() <= most for n, most in limits.items())
        return allowed and not (refuse and choice.sum() % 3 == 0)

    found = enumerate_best(relaxed, worst, ties, keeps)
    least = min(objective[c].sum() for c in [worst, *filter(keeps, fitting)])
    assert found is not None
    assert objective[found].sum() == pytest.approx(least, abs=1e-12)
    assert keeps(found) or found.tolist() == worst.tolist()


@pytest.mark.parametrize("seed", range(3))
def test_where_too_many_choices_are_near_the_bound_highs_finds_the_same(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    level = np.sort(rng.uniform(0.02, 1, (12, 10)))
    damages = list(10 ** rng.uniform(-4, -1, (12, 1)) / level)
    costs = {n: list(level * rng.uniform(0.8, 1.2, level.shape)) for n in NAMES}
    limits = {n: 0.4 * sum(c.max() for c in costs[n]) for n in NAMES}
    asked = []
    module = sys.modules["sft.planning.solve"]
    highs = module.choose
    monkeypatch.setattr(module, "choose", lambda *args: asked.append(args) or highs(*args))
    enumerated = solve(damages, costs, limits)
    assert not asked
    monkeypatch.setattr(enumeration, "MOST", 2)
    searched = solve(damages, costs, limits)
    assert asked
    assert searched.choice == enumerated.choice
    assert (searched.status, enumerated.status) == ("optimal", "optimal")
    assert enumerated.gap <= 1e-8
