"""Layers in which low rank gains no time: which of them stay whole, against every choice."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft.core.budget import Budget
from sft.core.errors import BudgetError
from sft.core.records import Candidate, Cost, Layer, LayerProfile, Option, Profile
from sft.planning import plan, sparing
from sft.planning.menus import Problem


def layer(
    name: str, options: list[tuple[Option, float, int, int]], vain: bool, memory: int = 1
) -> LayerProfile:
    """A menu of (option, damage, size, MACs); low rank is twice as slow, or twice as fast."""
    split = 2.0 if vain else 0.5
    menu = [Candidate(Option("keep"), 0.0, 0.0, Cost(100, 100, 400, 3.0, memory))]
    for option, damage, size, macs in options:
        cost = Cost(100, macs, size, split if option.rank else 1.0, memory)
        menu.append(Candidate(option, damage, damage, cost))
    about = Layer(name, "Conv2d", (10, 10, 1, 1), True, (10, 1, 1), (10, 1, 1), 100)
    return LayerProfile(about, {}, tuple(menu))


def profile_of(layers: list[LayerProfile]) -> Profile:
    n = len(layers)
    return Profile(
        "m", "t", "", 1, 100 * n, 100 * n, 400 * n, 0, tuple(layers), 0, latency=3.0 * n, memory=9
    )  # fmt: skip


DENSE, SPLIT = Option("dense"), Option("channel_in", (2,))


def ten(damages: list[float]) -> Profile:
    """Ten layers of 100 bytes whole and 40 split, where splitting gains no time."""
    menus = [[(DENSE, 0.001, 100, 100), (SPLIT, damage, 40, 40)] for damage in damages]
    return profile_of([layer(f"x{i}", menu, True) for i, menu in enumerate(menus)])


def split_in(found) -> list[str]:
    return [row.name for row in found.rows if row.option.rank]


@pytest.mark.parametrize("splits", [0, 1, 2, 3, 10])
def test_no_more_layers_are_split_than_the_limit_needs(splits) -> None:
    """Splits do less damage than rounding here, so the plain knapsack splits all ten."""
    found = plan(ten([0.00095] * 10), Budget(size_bytes=1000 - 60 * splits))
    assert split_in(found) == [f"x{i}" for i in range(splits)]
    assert found.bound == pytest.approx(0.0095)
    assert found.gap == pytest.approx(1 - 0.0095 / found.value)
    assert found.status == ("optimal" if splits == 10 else "feasible")
    assert all("low rank gains no time here" in row.reason for row in found.rows)


def test_one_layer_that_saves_much_is_split_before_many_that_save_little() -> None:
    sizes = [90, 90, 90, 90, 90, 90, 90, 40, 90, 90]
    menus = [[(DENSE, 0.001, 100, 100), (SPLIT, 0.00095, size, 40)] for size in sizes]
    made = profile_of([layer(f"x{i}", menu, True) for i, menu in enumerate(menus)])
    assert split_in(plan(made, Budget(size_bytes=940))) == ["x7"]


def test_layers_that_would_do_much_damage_whole_are_split() -> None:
    """Whole, all ten have a tenth more damage than split; only so many may be spared."""
    found = plan(ten([0.0008] * 10), Budget(size=1.0))
    assert len(split_in(found)) == 6
    assert 0.008 < found.value <= 1.1 * 0.008


def test_a_layer_that_fits_the_memory_only_when_split_does_not_bring_others_with_it() -> None:
    """The last layer has to be split; the nine before it need not."""
    made = ten([0.00095] * 10)
    last = tuple(
        dataclasses.replace(c, cost=dataclasses.replace(c.cost, memory=1 if c.option.rank else 8))
        for c in made.layers[9].candidates
    )
    layers = (*made.layers[:9], dataclasses.replace(made.layers[9], candidates=last))
    made = dataclasses.replace(made, layers=layers)
    assert split_in(plan(made, Budget(size=1.0, memory_bytes=4))) == ["x9"]


@pytest.mark.parametrize("needed", [1, 20, 53])
def test_few_problems_are_solved_for_many_layers(needed, monkeypatch) -> None:
    rng = np.random.default_rng(needed)
    menus = [
        [(DENSE, 0.001, 100, 100), (SPLIT, float(rng.uniform(0.0009, 0.001)), 40, 40)]
        for _ in range(54)
    ]
    made = profile_of([layer(f"x{i}", menu, True) for i, menu in enumerate(menus)])
    solves, plain = [0], Problem.solve

    def counted(self, *args, **named):
        solves[0] += 1
        return plain(self, *args, **named)

    monkeypatch.setattr(Problem, "solve", counted)
    found = plan(made, Budget(size_bytes=5400 - 60 * needed))
    assert solves[0] <= 1 + sparing.SOLVES
    assert len(split_in(found)) == needed


def test_layers_that_were_asked_for_are_not_spared() -> None:
    found = plan(ten([0.00095] * 10), Budget(size=1.0), overrides={"x[34]": SPLIT})
    assert split_in(found) == ["x3", "x4"]


options = st.tuples(
    st.sampled_from([DENSE, Option("dense", (), 4), SPLIT, Option("channel_out", (3,))]),
    st.floats(0.009, 0.0115), st.integers(10, 100), st.integers(10, 100),
)  # fmt: skip
menus = st.lists(options, min_size=2, max_size=4, unique_by=lambda o: o[0]).filter(
    lambda menu: any(not o[0].rank for o in menu)
)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(menus, min_size=2, max_size=4),
    st.integers(1, 3),
    st.floats(0.1, 0.6),
    st.floats(0.3, 1.0),
)
def test_none_that_is_split_could_be_left_whole(drawn, fast, size, macs) -> None:
    """By every choice: the plan is the best with the whole layers it has, and each one that is
    split must be.
    """
    menus = [layer(f"x{i}", menu, i >= fast) for i, menu in enumerate(drawn)]
    made = profile_of(menus)
    most = {"size": size * made.size / 4, "macs": macs * made.macs}
    vain = {i for i, menu in enumerate(drawn) if i >= fast and any(o[0].rank for o in menu)}

    def best(whole: set[int]) -> float:
        choices = itertools.product(
            *([o for o in menu if not (i in whole and o[0].rank)] for i, menu in enumerate(drawn))
        )
        return min(
            (
                math.fsum(o[1] for o in choice)
                for choice in choices
                if sum(o[2] for o in choice) <= most["size"]
                and sum(o[3] for o in choice) <= most["macs"]
            ),
            default=math.inf,
        )

    budget = Budget(size_bytes=math.floor(most["size"]), macs_count=math.floor(most["macs"]))
    least = best(set())
    if math.isinf(least):
        with pytest.raises(BudgetError):
            plan(made, budget)
        return
    found = plan(made, budget)
    given_back = {i for i in vain if found.rows[i].option.rank}
    assert found.value == pytest.approx(best(vain - given_back), rel=1e-7)
    assert found.value <= 1.1 * least * (1 + 1e-9)
    assert found.bound == pytest.approx(least, rel=1e-6)
    assert (found.status == "optimal") == (found.value <= least * (1 + 1e-6))
    for i in given_back:
        assert best(vain - given_back | {i}) > 1.1 * least * (1 - 1e-9)
