"""Latency, memory, patterns, fronts and both methods, against enumeration of every choice."""

import dataclasses
import itertools
import math
import re

import numpy as np
import pytest

from sft.core.budget import Budget
from sft.core.errors import BudgetError, InputError
from sft.core.records import Front, Option
from sft.planning import plan, solve
from sft.planning.front import front


def small(profile, seed, layers=(2, 3, 4), slow=1.0):
    """Three layers with short menus, drawn latencies and memories.

    With low rank `slow` times as slow, damages are much alike, so that it may be done without.
    """
    rng = np.random.default_rng(seed)
    entries = []
    for index in layers:
        entry = profile.layers[index]
        some = [0, 1, *rng.choice(np.arange(2, len(entry.candidates)), 4, replace=False)]
        menu = []
        for place in some:
            c = entry.candidates[place]
            latency = c.cost.macs * 1e-6 * rng.uniform(0.5, 2) * (slow if c.option.rank else 1)
            cost = dataclasses.replace(
                c.cost, latency=latency, memory=int(rng.integers(1000, 5000))
            )
            alike = rng.uniform(0.009, 0.011) if slow > 1 and c.option.weight_bits else c.damage
            menu.append(dataclasses.replace(c, cost=cost, damage=alike))
        entries.append(dataclasses.replace(entry, candidates=tuple(menu)))
    kept = [e.candidates[0].cost for e in entries]
    return dataclasses.replace(
        profile,
        layers=tuple(entries),
        params=sum(c.params for c in kept),
        macs=sum(c.macs for c in kept),
        overhead_macs=0,
        size=sum(c.size for c in kept),
        latency=sum(c.latency for c in kept) + 0.25,
        overhead_latency=0.25,
        memory=max(c.memory for c in kept),
    )


def networks(profile):
    """(size, macs, latency, memory, damage, whole layers) of every choice that `plan` may make."""
    menus = []
    for entry in profile.layers:
        sensitive = all(c.damage > 0.02 for c in entry.candidates if c.option.scheme == "dense")
        menus.append([c for c in entry.candidates if sensitive or c.option.scheme != "keep"])
    for choice in itertools.product(*menus):
        costs = [c.cost for c in choice]
        yield (
            sum(c.size for c in costs),
            sum(c.macs for c in costs),
            math.fsum(c.latency for c in costs) + profile.overhead_latency,
            max(c.memory for c in costs),
            math.fsum(c.damage for c in choice),
            {
                e.layer.name
                for e, c in zip(profile.layers, choice, strict=True)
                if not c.option.rank
            },
        )


@pytest.mark.parametrize("seed", range(30))
def test_all_limits_equal_brute_force_and_errors_are_true(profile, seed):
    made, rng = small(profile, seed, slow=1 + 3 * (seed % 2)), np.random.default_rng(seed)
    names = ("size", "macs", "latency", "memory")
    whole = {n: getattr(made, n) for n in names}
    asked = {n: round(float(rng.uniform(0.15, 1.0)), 3) for n in names if rng.random() < 0.7}
    asked = asked or {"latency": 0.5}
    every = list(networks(made))

    def within(limits):
        return [
            row
            for row in every
            if all(row[names.index(n)] <= limits[n] * whole[n] * (1 + 1e-12) for n in limits)
        ]

    fits = [row[4] for row in within(asked)]
    if fits:
        found = plan(made, Budget(**asked))
        assert all(getattr(found.cost, n) <= asked[n] * whole[n] * (1 + 1e-9) for n in asked)
        vain = {e.layer.name for e in made.layers if splits_in_vain(e)}
        spared = {r.name for r in found.rows if r.name in vain and not r.option.rank}
        like_it = [row[4] for row in within(asked) if spared <= row[5]]
        assert found.value == pytest.approx(min(like_it), rel=1e-8)
        assert found.value <= 1.1 * min(fits) * (1 + 1e-9)
        assert found.bound == pytest.approx(min(fits), rel=1e-6)
        assert found.bound <= min(fits) * (1 + 1e-12)
        assert found.gap == pytest.approx(1 - found.bound / found.value, abs=1e-12)
        assert found.status == ("optimal" if found.gap <= 1e-7 else "feasible")
        assert (found.status == "optimal") == (found.value <= min(fits) * (1 + 1e-6))
        quick = plan(made, Budget(**asked), method="lagrangian")
        assert quick.bound <= min(fits) * (1 + 1e-12)
        assert min(fits) * (1 - 1e-9) <= quick.value
        return
    with pytest.raises(BudgetError) as error:
        plan(made, Budget(**asked))
    is_true(str(error.value), asked, whole, names, within)


def splits_in_vain(entry):
    """By the definition: no low rank beats the fastest dense kernel in time."""
    low, dense = (
        [c.cost.latency for c in entry.candidates if test(c.option)]
        for test in (lambda o: o.rank, lambda o: o.scheme == "dense")
    )
    return bool(low) and min(low) >= min(dense)


def is_true(message, asked, whole, names, within):
    """Each number that the error names is the least there is, rounded up in its last digit."""
    said = r"(\w+)=[0-9.]+ \([^)]*\) was asked; (?:alone .*? to|the least is) (\w+)=([0-9.]*[0-9])"
    alone = [(name, {}, *number) for name, *number in re.findall(said, message)]
    assert sorted(name for name, *_ in alone) == sorted(asked)
    trades = [
        (None, {n: asked[n] for n in re.findall(r"(\w+)=", held)}, *number)
        for held, *number in re.findall(r"With (.*?) the least is (\w+)=([0-9.]*[0-9])", message)
    ]
    possible = [n for n in asked if within({n: asked[n]})]
    assert bool(trades) == (len(asked) > 1 and bool(possible))
    for _, held, field, number in alone + trades:
        cost = {"size_bytes": "size", "macs_count": "macs", "latency_ms": "latency"}.get(
            field, field.removesuffix("_bytes")
        )
        least = min(row[names.index(cost)] for row in within(held))
        told = float(number) * (whole[cost] if field == cost else 1)
        step = whole[cost] * 1e-4 if field == cost else 1e-4 if cost == "latency" else 1
        assert least * (1 - 1e-9) <= told <= least * (1 + 1e-9) + step


@pytest.mark.parametrize("seed", range(60))
def test_lagrangian_bound_and_answer_hold(seed):
    rng = np.random.default_rng(seed)
    damages = [rng.random(5) for _ in range(5)]
    costs = {n: [rng.random(5) + 1 - d for d in damages] for n in ("size", "macs", "latency")}
    limits = {n: 5 * rng.uniform(0.7, 1.1) for n in costs}
    exact, quick = (solve(damages, costs, limits, m) for m in ("exact", "lagrangian"))
    assert (exact.status == "infeasible") == (quick.status == "infeasible")
    if exact.status != "infeasible":
        assert quick.bound <= exact.value * (1 + 1e-9) <= quick.value * (1 + 2e-9)
        for name, most in limits.items():
            spent = sum(c[o] for c, o in zip(costs[name], quick.choice, strict=True))
            assert spent <= most * (1 + 1e-9)
    with pytest.raises(InputError, match="'lagrangian'"):
        solve(damages, costs, limits, "guess")


@pytest.mark.parametrize("cost", ["size", "latency"])
@pytest.mark.parametrize("seed", range(8))
def test_a_front_is_the_front(profile, seed, cost, tmp_path):
    made = small(profile, seed)
    found = front(made, cost)
    column = 0 if cost == "size" else 2
    every = list(networks(made))
    for point in found.points:
        at = getattr(point.cost, cost)
        least = min(row[4] for row in every if row[column] <= at * (1 + 1e-12))
        assert point.damage == pytest.approx(least, rel=1e-8)
        assert point.bound <= least * (1 + 1e-9)
    pairs = [(getattr(p.cost, cost), p.damage) for p in found.points]
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(pairs))
    assert pairs[0][0] == pytest.approx(min(row[column] for row in every))
    assert pairs[-1][1] == pytest.approx(min(row[4] for row in every))
    found.save(tmp_path / "front.json")
    assert Front.load(tmp_path / "front.json") == found


def test_a_front_refuses_what_it_cannot_show(profile):
    with pytest.raises(InputError, match="latency"):
        front(profile, "latency")
    with pytest.raises(InputError, match="'size' or 'latency'"):
        front(profile, "macs")
    assert len(front(profile, points=5).points) < len(front(profile, points=24).points)


def test_a_name_wins_over_a_pattern(profile):
    wishes = {"stage2.*": Option("dense", (), 4), "stage2.conv1": Option("dense", (), 8)}
    found = plan(profile, Budget(size=1.0), keep=("stage2.*",), overrides={"fc": Option("dense")})
    assert found.option("stage2.conv1").scheme == "keep"
    found = plan(profile, Budget(size=0.6), overrides=wishes)
    assert found.option("stage2.conv1").weight_bits == 8
    assert found.option("stage2.conv2").weight_bits == 4
    with pytest.raises(InputError, match=r"stage2\.conv1.*keep='stage2\.\*'"):
        plan(profile, Budget(), keep=("stage2.*",), overrides={"stage2.c*": Option("dense")})


def test_a_layer_that_gains_no_time_is_left_whole_and_says_so(profile):
    """In one layer low rank is slower by a hair; in the others it gains."""

    def timed(c, slow):
        latency = (0.031 if c.option.rank else 0.029) if slow else c.cost.macs * 1e-6
        return dataclasses.replace(c, cost=dataclasses.replace(c.cost, latency=latency))

    layers = tuple(
        dataclasses.replace(e, candidates=tuple(timed(c, i == 3) for c in e.candidates))
        for i, e in enumerate(profile.layers)
    )
    original = sum(e.candidates[0].cost.latency for e in layers)
    made = dataclasses.replace(profile, layers=layers, latency=original)
    found = plan(made, Budget(latency=0.6))
    assert found.rows[3].option.scheme == "dense"
    assert "low rank gains no time here: the fastest, channel_" in found.rows[3].reason
    assert "takes 0.031 ms, dense 0.029 ms" in found.rows[3].reason
    faster = next(r for r in found.rows if r.option.rank)
    assert "x faster for damage" in faster.reason


def test_memory_that_nothing_fits_names_the_layer(profile):
    made = small(profile, 0)
    with pytest.raises(BudgetError, match=r"No option of layer 'stage"):
        plan(made, Budget(memory_bytes=10))


def test_options_without_a_latency_are_out_under_a_limit(profile):
    with pytest.raises(InputError, match="stem"):
        plan(profile, Budget(latency_ms=1.0))
