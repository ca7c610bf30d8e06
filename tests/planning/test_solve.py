"""The knapsack against enumeration of every choice."""

import itertools
import math

import numpy as np
import pytest

from sft.core.errors import InputError
from sft.planning.solve import solve


def brute_force(damages, costs, limits):
    """Least damage over all choices; None when nothing fits. Whole costs are summed exactly."""
    choices = np.array(list(itertools.product(*(range(len(d)) for d in damages))))

    def total(rows):
        return sum(row[choices[:, layer]] for layer, row in enumerate(rows))

    damage, spent = total(damages), {name: total(cost) for name, cost in costs.items()}
    fits = np.isfinite(damage)
    for name, cost in spent.items():
        fits &= np.isfinite(cost) & (cost <= limits.get(name, math.inf))
    return damage[fits].min() if fits.any() else None


def instance(seed, layers=5, options=4):
    """Random numbers over many magnitudes, one or two limits, some of them impossible."""
    rng = np.random.default_rng(seed)
    damages = [10 ** rng.uniform(-6, 1, options) for _ in range(layers)]
    scale = {"size": 10 ** rng.uniform(0, 9), "macs": 10 ** rng.uniform(0, 12)}
    names = ("size", "macs")[: 1 + seed % 2]
    costs = {n: [np.ceil(scale[n] * rng.random(options)) for _ in range(layers)] for n in names}
    limits = {}
    for name, cost in costs.items():
        low, high = sum(c.min() for c in cost), sum(c.max() for c in cost)
        limits[name] = low + rng.uniform(-0.1, 0.6) * (high - low)
    if seed % 3 == 0:
        damages[seed % layers][rng.integers(options)] = (math.nan, math.inf)[seed % 2]
    return damages, costs, limits


@pytest.mark.parametrize("start", range(0, 240, 40))
def test_equals_brute_force(start):
    outcomes = set()
    for seed in range(start, start + 40):
        damages, costs, limits = instance(seed)
        best = brute_force(damages, costs, limits)
        found = solve(damages, costs, limits)
        outcomes.add(found.status)
        if best is None:
            assert (found.status, found.choice) == ("infeasible", ())
            assert found.value == math.inf
            continue
        assert found.status == "optimal", (seed, found.message)
        assert found.value == pytest.approx(best, rel=1e-8, abs=0)
        assert found.bound <= best * (1 + 1e-12)
        assert 0 <= found.gap <= 1e-8
        assert found.gap == pytest.approx((found.value - found.bound) / found.value)
        taken = [d[o] for d, o in zip(damages, found.choice, strict=True)]
        assert found.value == pytest.approx(math.fsum(taken))
        for name, most in limits.items():
            assert sum(c[o] for c, o in zip(costs[name], found.choice, strict=True)) <= most
    assert outcomes == {"optimal", "infeasible"}


def test_limits_hold_to_the_last_unit_of_large_integers():
    """One MAC in 10^9 is below the solver's tolerance, and still not to be had."""
    whole = 10**9
    damages = [np.array([0.0, 1.0]), np.array([0.0, 1.5])]
    costs = {"macs": [np.array([whole, whole - 1.0]), np.array([whole, whole - 2.0])]}
    for spare, choice in ((0, (0, 0)), (-1, (1, 0)), (-2, (0, 1)), (-3, (1, 1))):
        found = solve(damages, costs, {"macs": 2.0 * whole + spare})
        assert found.choice == choice
    assert solve(damages, costs, {"macs": 2.0 * whole - 4}).status == "infeasible"


def test_infeasible_says_the_lowest_total_of_each_cost():
    damages = [np.array([0.0, 1.0]), np.array([0.0, 1.0])]
    costs = {
        "size": [np.array([5.0, 2.0]), np.array([4.0, 3.0])],
        "macs": [np.array([10.0, 30.0]), np.array([10.0, 20.0])],
    }
    found = solve(damages, costs, {"size": 4.0, "macs": 100.0})
    assert found.status == "infeasible"
    assert found.feasible == {"size": 5.0, "macs": 20.0}
    assert "lowest total of 'size' is 5;" in found.message
    together = solve(damages, costs, {"size": 5.0, "macs": 20.0})
    assert together.status == "infeasible"
    assert "together" in together.message


def test_options_that_are_not_finite_are_forbidden():
    damages = [np.array([math.nan, 3.0, math.inf, 2.0])]
    costs = {"size": [np.array([1.0, 1.0, 1.0, math.nan])]}
    found = solve(damages, costs, {})
    assert (found.choice, found.value) == ((1,), 3.0)


def test_layer_without_an_allowed_option_is_named():
    damages = [np.array([1.0]), np.array([math.inf, math.nan]), np.array([1.0])]
    found = solve(damages, {"size": [np.ones(1), np.ones(2), np.ones(1)]}, {})
    assert found.status == "infeasible"
    assert "Layer 1 " in found.message


def test_ties_go_to_the_lower_cost_and_the_answer_is_the_same_every_time():
    rng = np.random.default_rng(0)
    damages = [np.array([0.5, 0.5, 0.5, 0.1])] * 6
    costs = {"size": [np.append(rng.permutation([3.0, 1.0, 2.0]), 9.0) for _ in range(6)]}
    limits = {"size": 8.0}
    found = solve(damages, costs, limits)
    assert [c[o] for c, o in zip(costs["size"], found.choice, strict=True)] == [1.0] * 6
    assert all(solve(damages, costs, limits) == found for _ in range(3))


def test_tie_between_layers_goes_to_the_lower_cost():
    """Either layer may be spared at equal damage; sparing the second costs less."""
    damages = [np.array([0.0, 1.0]), np.array([0.0, 1.0])]
    costs = {"size": [np.array([10.0, 4.0]), np.array([10.0, 5.0])]}
    assert solve(damages, costs, {"size": 15.0}).choice == (1, 0)


def test_large_instance_within_the_dual_bound():
    rng = np.random.default_rng(1)
    shape = (40, 30)
    size = 10 ** rng.uniform(3, 7, (shape[0], 1)) * rng.random(shape)
    damage = np.exp(-3 * size / size.max(1, keepdims=True)) * 10 ** rng.uniform(
        -5, 0, (shape[0], 1)
    )
    limit = {"size": 0.3 * size.max(1).sum()}
    found = solve(list(damage), {"size": list(size)}, limit)
    # The Lagrangian relaxation is a lower bound for every multiplier, and needs no solver.
    multipliers = np.geomspace(1e-14, 1e2, 400)
    relaxed = [(damage + m * size).min(1).sum() - m * limit["size"] for m in multipliers]
    assert max(relaxed) <= found.value <= max(relaxed) * 1.05
    assert max(relaxed) <= found.bound * (1 + 1e-9)
    assert found.gap <= 1e-8


def test_no_layers():
    assert solve([], {"size": []}, {"size": 1.0}).status == "optimal"
    assert solve([], {"size": []}, {"size": -1.0}).status == "infeasible"


def test_inputs_are_not_changed():
    damages, costs, limits = instance(3)
    copies = [d.copy() for d in damages]
    solve(damages, costs, limits)
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(damages, copies, strict=True))


def test_arrays_that_do_not_belong_together_are_refused():
    with pytest.raises(InputError, match="'size'"):
        solve([np.zeros(2)], {"size": [np.zeros(3)]}, {})
    with pytest.raises(InputError, match="'macs'"):
        solve([np.zeros(2)], {"size": [np.zeros(2)]}, {"macs": 1.0})
    with pytest.raises(InputError, match="nan"):
        solve([np.zeros(2)], {"size": [np.zeros(2)]}, {"size": math.nan})
    with pytest.raises(InputError, match="one row"):
        solve([np.zeros((2, 2))], {}, {})
