"""The verb `plan` on a made-up profile."""

import copy
import dataclasses
import itertools
import math
import re

import numpy as np
import pytest

from sft.core.budget import Budget
from sft.core.errors import BudgetError, InputError
from sft.core.records import Cost, Option, Plan
from sft.planning import plan


def row(plan_, name):
    return next(r for r in plan_.rows if r.name == name)


def with_layer(profile, index, **changes):
    layers = list(profile.layers)
    layers[index] = dataclasses.replace(layers[index], **changes)
    return dataclasses.replace(profile, layers=tuple(layers))


BUDGETS = [
    Budget(size=0.2),
    Budget(macs=0.4),
    Budget(size=0.1, macs=0.5),
    Budget(size_bytes=100_000, macs_count=9_000_000),
    Budget(size=0.5, size_bytes=60_000),
]


@pytest.mark.parametrize("budget", BUDGETS)
def test_whole_costs_add_up_and_limits_hold(profile, budget):
    found = plan(profile, budget)
    assert [r.name for r in found.rows] == [e.layer.name for e in profile.layers]
    assert found.cost.params == sum(r.cost.params for r in found.rows) + 321
    assert found.cost.macs == sum(r.cost.macs for r in found.rows) + 4567
    assert found.cost.size == sum(r.cost.size for r in found.rows) + 1284
    assert found.original == Cost(profile.params, profile.macs, profile.size)
    for name, most in budget.limits(profile.original).items():
        assert getattr(found.cost, name) <= most
    for r, entry in zip(found.rows, profile.layers, strict=True):
        menu = {c.option: c for c in entry.candidates}
        assert menu[r.option].cost == r.cost
        assert menu[r.option].damage == r.predicted_damage
    assert found.value == pytest.approx(sum(r.predicted_damage for r in found.rows))
    assert found.bound <= found.value
    assert found.gap <= 1e-8
    assert found.status == "optimal"
    assert found.budget == budget.asked()
    assert found.statistics is profile.statistics
    assert (found.model, found.target) == (profile.model, profile.target)
    assert found.input_shape == profile.input_shape


def test_keeping_all_costs_the_original(profile):
    found = plan(profile, Budget(size=1.0, macs=1.0), keep=["*"])
    assert found.cost == found.original


def test_a_looser_budget_never_has_more_damage(profile):
    for field in ("size", "macs"):
        values = [plan(profile, Budget(**{field: x})).value for x in (0.21, 0.25, 0.3, 0.5, 0.8, 1)]
        assert all(b <= a * (1 + 1e-8) for a, b in itertools.pairwise(values))
        assert values[0] > values[-1] > 0.0  # dense integers everywhere: the least there is
    both = plan(profile, Budget(size=0.2, macs=0.4)).value
    assert both >= plan(profile, Budget(size=0.2)).value
    assert both >= plan(profile, Budget(macs=0.4)).value


def test_without_limits_all_is_dense_in_integers(profile):
    for budget in (Budget(), Budget(max_drop=0.01, minimize="size")):
        found = plan(profile, budget, keep=("fc",))
        options = {r.name: str(r.option) for r in found.rows}
        assert options.pop("fc") == "keep"
        assert set(options.values()) == {"dense @8"}
        assert all("no limit" in r.reason for r in found.rows if r.name != "fc")
    assert found.budget == {"max_drop": 0.01}


def test_without_limits_a_layer_with_no_integers_is_kept(profile):
    floats = tuple(c for c in profile.layers[0].candidates if not c.option.weight_bits)
    found = plan(with_layer(profile, 0, candidates=floats), Budget())
    assert found.option("stem").scheme == "keep"
    assert "no integer option" in row(found, "stem").reason


def test_a_sensitive_layer_that_does_not_run_in_float_gets_its_mildest_integers(profile):
    """All roundings of the second layer do much damage; as it is, it fails in the runtime."""

    def changed(c, keep_runs):
        latency = math.inf if c.option.scheme == "keep" and not keep_runs else 1.0
        damage = {8: 0.4, 4: 0.3}.get(c.option.weight_bits, 0.0)
        damage = 0.2 if c.option.rank else damage
        return dataclasses.replace(
            c, damage=damage, cost=dataclasses.replace(c.cost, latency=latency)
        )

    for keep_runs, wanted in ((True, "keep"), (False, "dense @4")):
        layers = tuple(
            dataclasses.replace(
                e, candidates=tuple(changed(c, keep_runs or i != 1) for c in e.candidates)
            )
            for i, e in enumerate(profile.layers)
        )
        found = plan(dataclasses.replace(profile, layers=layers), Budget())
        assert str(found.rows[1].option) == wanted
        assert found.cost.latency == len(layers)
    floats = tuple(c for c in layers[1].candidates if c.option.scheme != "dense")
    found = plan(
        with_layer(dataclasses.replace(profile, layers=layers), 1, candidates=floats), Budget()
    )
    assert found.rows[1].option.rank


def test_keep_by_name_and_by_pattern(profile):
    budget = Budget(size=0.2, macs=0.7)
    found = plan(profile, budget, keep=("fc", "stage1.*"))
    kept = {"fc", "stage1.conv1", "stage1.conv2"}
    assert {r.name for r in found.rows if r.option.scheme == "keep"} >= kept
    for name in kept:
        assert row(found, name).reason == "kept in float as asked"
    assert plan(profile, budget).option("stage1.conv2").scheme != "keep"
    tight = Budget(size=0.05)
    assert plan(profile, tight).option("fc").scheme == "dense"
    assert plan(profile, tight, keep="fc").option("fc").scheme == "keep"


def test_keep_that_matches_nothing_names_the_layers(profile):
    with pytest.raises(InputError, match=r"'layer9\.\*'.*stage2\.conv1"):
        plan(profile, Budget(size=0.2), keep=("layer9.*",))


def test_overrides_force_an_option(profile):
    wanted = Option("channel_in", (8,), 8)
    free = plan(profile, Budget(size=0.2))
    assert free.option("stage2.conv2") != wanted
    found = plan(profile, Budget(size=0.2), overrides={"stage2.conv2": wanted})
    assert found.option("stage2.conv2") == wanted
    assert "channel_in rank 8 of 64 at 8 bits as asked" in row(found, "stage2.conv2").reason
    assert found.value > free.value


def test_overrides_off_the_menu_name_the_nearest(profile):
    with pytest.raises(InputError) as error:
        plan(profile, Budget(), overrides={"stage2.conv2": Option("channel_in", (15,), 8)})
    message = str(error.value)
    assert "'stage2.conv2' with weight (64, 64, 3, 3)" in message
    assert message.index("channel_in rank 16 @8") < message.index("channel_in rank 8 @8")
    with pytest.raises(InputError, match="it is linear"):
        plan(profile, Budget(), overrides={"fc": Option("channel_in", (8,), 8)})
    with pytest.raises(InputError, match=r"'nowhere'.*stem"):
        plan(profile, Budget(), overrides={"nowhere": Option("dense")})
    with pytest.raises(InputError, match="fc"):
        plan(profile, Budget(), keep=("fc",), overrides={"fc": Option("dense")})


def test_failed_measurements_are_never_chosen(profile):
    free = plan(profile, Budget(size=0.2))
    entry = profile.layers[4]
    broken = tuple(
        dataclasses.replace(c, damage=math.nan) if c.option == free.rows[4].option else c
        for c in entry.candidates
    )
    found = plan(with_layer(profile, 4, candidates=broken), Budget(size=0.2))
    assert found.rows[4].option != free.rows[4].option
    nothing = tuple(dataclasses.replace(c, damage=math.inf) for c in entry.candidates)
    with pytest.raises(InputError, match=r"stage2\.conv2"):
        plan(with_layer(profile, 4, candidates=nothing), Budget(size=0.2))
    with pytest.raises(InputError, match="could not be measured"):
        plan(
            with_layer(profile, 4, candidates=broken),
            Budget(),
            (),
            {"stage2.conv2": free.rows[4].option},
        )


def test_a_profile_without_the_original_is_refused(profile):
    rest = profile.layers[2].candidates[1:]
    with pytest.raises(InputError, match=r"'keep' option for layer 'stage1\.conv2'"):
        plan(with_layer(profile, 2, candidates=rest), Budget(size=0.5))


def numbers(message, field):
    return [float(x) for x in re.findall(rf"\b{field}=([0-9.]+[0-9])", message)]


def test_infeasible_says_a_fraction_that_works(profile):
    with pytest.raises(BudgetError) as error:
        plan(profile, Budget(size=0.001))
    message = str(error.value)
    asked, least = numbers(message, "size")
    assert asked == 0.001
    found = plan(profile, Budget(size=least))
    assert f"{found.cost.size:,} bytes" in message
    with pytest.raises(BudgetError):
        plan(profile, Budget(size=least - 1e-4))


def test_infeasible_answers_in_the_absolute_number_that_was_asked(profile):
    with pytest.raises(BudgetError) as error:
        plan(profile, Budget(macs_count=1000))
    asked, least = numbers(str(error.value), "macs_count")
    assert asked == 1000
    assert plan(profile, Budget(macs_count=int(least))).cost.macs == least
    with pytest.raises(BudgetError):
        plan(profile, Budget(macs_count=int(least) - 1))


def test_limits_that_clash_are_answered_with_combinations_that_work(profile):
    """Here low rank, the only way to few MACs, takes sixteen times the bytes."""

    def dear(c):
        size = c.cost.size * (16 if c.option.rank else 1)
        return dataclasses.replace(c, cost=dataclasses.replace(c.cost, size=size))

    for index, e in enumerate(profile.layers):
        profile = with_layer(profile, index, candidates=tuple(dear(c) for c in e.candidates))
    plan(profile, Budget(size=0.15)), plan(profile, Budget(macs=0.25))
    with pytest.raises(BudgetError) as error:
        plan(profile, Budget(size=0.15, macs=0.25))
    message = str(error.value)
    assert message.count("alone that is feasible") == 2
    macs = float(re.search(r"With size=0\.15 .*? least is macs=([0-9.]+) ", message)[1])
    size = float(re.search(r"With macs=0\.25 .*? least is size=([0-9.]+) ", message)[1])
    plan(profile, Budget(size=0.15, macs=macs)), plan(profile, Budget(size=size, macs=0.25))
    for asked in (Budget(size=0.15, macs=macs - 1e-4), Budget(size=size - 1e-4, macs=0.25)):
        with pytest.raises(BudgetError):
            plan(profile, asked)


def test_infeasible_names_what_the_user_fixed(profile):
    with pytest.raises(BudgetError, match=r"Fixed by you: stage3\.conv"):
        plan(profile, Budget(size=0.1), keep=("stage3.*",))


@pytest.mark.parametrize("budget", [*BUDGETS, Budget(), Budget(size=0.9)])
def test_every_row_has_a_reason(profile, budget):
    found = plan(profile, budget, keep=("stem",))
    assert all(r.reason for r in found.rows)
    for r in found.rows:
        if r.option.scheme == "keep":
            assert "kept in float" in r.reason
        elif r.option.scheme == "dense":
            assert f"dense at {r.option.weight_bits} bits: damage" in r.reason
        else:
            entry = next(e for e in profile.layers if e.layer.name == r.name)
            side = {"channel_out": 0, "channel_in": 1}[r.option.scheme]
            kernel = np.moveaxis(np.ones(entry.layer.weight_shape), side, 0)
            full = min(kernel.reshape(len(kernel), -1).shape)
            assert f"{r.option.scheme} rank {r.option.rank[0]} of {full} at" in r.reason
            assert "fewer MACs for damage" in r.reason


def test_reasons_state_the_facts_of_the_menu(profile):
    found = plan(profile, Budget(size=0.2, macs=0.5))
    fc = row(plan(profile, Budget(size=0.05)), "fc")
    assert "dense at" in fc.reason
    assert "no low rank (channel_in: it is linear" in fc.reason
    kept = {e.layer.name: e.candidates[0].cost for e in profile.layers}
    low = next(r for r in found.rows if r.option.rank)
    assert f"{kept[low.name].macs / low.cost.macs:.1f}x fewer MACs" in low.reason
    assert f"dense would cost {kept[low.name].macs / 1e6:.1f} M MACs" in low.reason
    dense = next(r for r in plan(profile, Budget(size=0.26)).rows if r.option.scheme == "dense")
    assert f"{kept[dense.name].size / dense.cost.size:.1f}x smaller" in dense.reason


def test_reason_when_low_rank_saves_nothing(profile):
    entry = profile.layers[5]
    costly = tuple(
        dataclasses.replace(c, cost=Cost(10**9, 10**9, 10**9)) if c.option.rank else c
        for c in entry.candidates
    )
    found = plan(with_layer(profile, 5, candidates=costly), Budget(size=0.2))
    assert "low rank saves nothing here" in row(found, "stage3.conv").reason


def test_inputs_are_not_changed(profile):
    before = profile.to_json()
    overrides = {"fc": Option("dense")}
    keep = ["stem"]
    kept = copy.deepcopy((overrides, keep))
    plan(profile, Budget(size=0.3), keep, overrides)
    assert profile.to_json() == before
    assert (overrides, keep) == kept


def test_same_profile_same_plan_and_json_round_trip(profile, tmp_path):
    found = plan(profile, Budget(size=0.15, macs=0.5, max_drop=0.01))
    assert plan(profile, Budget(size=0.15, macs=0.5, max_drop=0.01)).to_json() == found.to_json()
    assert Plan.from_json(found.to_json()) == found
    found.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == found
