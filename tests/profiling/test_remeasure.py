"""A profile corrected with a chosen network in place."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from sft.core.budget import Budget
from sft.core.copies import copy_module
from sft.core.data import Batches, Data
from sft.core.errors import InputError
from sft.core.records import DENSE, KEEP, Option, Plan, Profile
from sft.decompositions import factorize
from sft.planning.allocate import plan as make_plan
from sft.profiling import remeasure as room
from sft.profiling.damage import divergence
from sft.profiling.remeasure import FURTHEST, NEGLIGIBLE, _scales, remeasure
from sft.surgery.modules import fold_batch_norm, get_module, replace_module

SAMPLES = 96
SPLIT = {
    "stem": Option(DENSE, (), 4), "body": Option("channel_in", (2,), 4),
    "down": Option("channel_out", (2,), 2), "fc": Option(KEEP),
}  # fmt: skip


def planned(profile: Profile, options: dict[str, Option]) -> Plan:
    return make_plan(profile, Budget(), overrides=options)


def of_splits(profile: Profile, plan: Plan) -> dict[str, float]:
    """What a profile predicts for the split alone of each layer of a plan."""
    return {
        e.layer.name: next(
            c.damage - c.rounding for c in e.candidates if c.option == plan.option(e.layer.name)
        )
        for e in profile.layers
    }


def rounding_of(profile: Profile, plan: Plan) -> float:
    options = {row.name: row.option for row in plan.rows}
    return sum(
        c.rounding
        for e in profile.layers
        for c in e.candidates
        if c.option == options[e.layer.name]
    )


@torch.no_grad()
def by_hand(net: nn.Module, data: Data, profile: Profile) -> tuple[float, dict[str, float]]:
    """Damage of all splits of `SPLIT`, and its fall when one is put back, by whole networks."""
    x = data.calibration.inputs[:SAMPLES]
    original = fold_batch_norm(net, x[:1])
    splits = {name: o for name, o in SPLIT.items() if o.rank}

    def damage(back: str) -> float:
        network = copy_module(original)
        for name, option in splits.items():
            if name != back:
                layer, known = get_module(original, name), profile.statistics[name]
                replace_module(network, name, factorize(layer, option.scheme, option.rank, known))
        return divergence(original(x), network(x))

    whole = damage("")
    return whole, {name: whole - damage(name) for name in splits}


def test_predictions_become_what_was_measured(profiled, net, data) -> None:
    plan = planned(profiled, SPLIT)
    found = remeasure(profiled, plan, net, data, anchor_samples=SAMPLES)
    whole, falls = by_hand(net, data, profiled)
    measured = found.damage - rounding_of(profiled, plan)
    assert measured == pytest.approx(whole, rel=1e-3)
    after, before = of_splits(found.profile, plan), of_splits(profiled, plan)
    assert sum(after.values()) == pytest.approx(measured, rel=1e-6)
    assert sum(before.values()) != pytest.approx(measured, rel=1e-2)
    assert min(falls.values()) > NEGLIGIBLE * whole > 0
    for name, fall in falls.items():
        assert after[name] == pytest.approx(whole * fall / sum(falls.values()), rel=1e-2)
    assert rounding_of(found.profile, plan) == rounding_of(profiled, plan) > 0


def test_what_splits_do_is_scaled_and_nothing_else_is_changed(profiled, net, data) -> None:
    plan, text = planned(profiled, SPLIT), profiled.to_json()
    found = remeasure(profiled, plan, net, data, anchor_samples=SAMPLES)
    assert profiled.to_json() == text
    for before, after in zip(profiled.layers, found.profile.layers, strict=True):
        assert (after.scale != 1.0) == bool(SPLIT[after.layer.name].rank)
        for old, new in zip(before.candidates, after.candidates, strict=True):
            own = (old.damage - old.rounding) * after.scale
            assert new.damage == pytest.approx(own + old.rounding, rel=1e-9)
            assert dataclasses.replace(new, damage=old.damage) == old
        assert dataclasses.replace(after, scale=1.0, candidates=before.candidates) == before
    assert dataclasses.replace(found.profile, layers=profiled.layers) == profiled
    assert found.profile.statistics is profiled.statistics


def test_once_more_with_the_same_plan_changes_nothing(profiled, net, data) -> None:
    plan = planned(profiled, SPLIT)
    first = remeasure(profiled, plan, net, data, anchor_samples=SAMPLES)
    second = remeasure(first.profile, plan, net, data, anchor_samples=SAMPLES)
    assert second.damage == first.damage
    for before, after in zip(first.profile.layers, second.profile.layers, strict=True):
        assert after.scale == pytest.approx(before.scale, rel=1e-9)


def test_its_options_move_the_result(profiled, net, data) -> None:
    plan = planned(profiled, SPLIT)
    usual = remeasure(profiled, plan, net, data)
    assert remeasure(profiled, plan, net, data).damage == usual.damage
    assert remeasure(profiled, plan, net, data, anchor_samples=SAMPLES).damage != usual.damage
    shuffled = dataclasses.replace(
        data, calibration=Batches(data.calibration.inputs, None, 16, shuffle=True)
    )
    seeds = [
        remeasure(profiled, plan, net, shuffled, anchor_samples=16, seed=seed).damage
        for seed in (0, 0, 1)
    ]
    assert seeds[0] == seeds[1] != seeds[2]


def test_a_plan_that_splits_nothing_is_not_measured(profiled, net, data, monkeypatch) -> None:
    monkeypatch.setattr(room, "_marginal", None)
    plan = planned(profiled, dict.fromkeys(SPLIT, Option(DENSE, (), 2)))
    found = remeasure(profiled, plan, net, data)
    assert found.profile == profiled
    assert found.damage == pytest.approx(plan.value)
    assert found.damage > 0


def test_an_option_that_is_not_on_the_menu_is_refused(profiled, net, data) -> None:
    plan = planned(profiled, SPLIT).replace("body", Option("channel_in", (3,), 8))
    with pytest.raises(
        InputError, match="channel_in rank 3 @8' is not on the menu of layer 'body'"
    ):
        remeasure(profiled, plan, net, data)


def test_a_plan_of_other_layers_is_refused(profiled, net, data) -> None:
    plan = planned(profiled, SPLIT)
    fewer = dataclasses.replace(plan, rows=plan.rows[1:])
    with pytest.raises(InputError, match="layers are not those of the profile"):
        remeasure(profiled, fewer, net, data)


def test_a_model_of_other_weights_is_refused(profiled, net, data) -> None:
    plan = planned(profiled, SPLIT)
    untold = dataclasses.replace(profiled, fingerprint="none")
    with torch.no_grad():
        net.stem_norm.running_mean[0] += 1e-6
    with pytest.raises(InputError, match="profile of 'model' was measured with other weights"):
        remeasure(profiled, plan, net, data, anchor_samples=16)
    assert remeasure(untold, plan, net, data, anchor_samples=16).damage > 0


def test_splits_that_break_the_network_are_infinitely_bad(profiled, net, data, monkeypatch) -> None:
    plan, body = planned(profiled, SPLIT), profiled.layers[1]
    broken = tuple(
        dataclasses.replace(c, damage=math.inf, rounding=math.inf)
        if c.option == Option("channel_in", (6,), 2)
        else c
        for c in body.candidates
    )
    layers = [*profiled.layers]
    layers[1] = dataclasses.replace(body, candidates=broken)
    monkeypatch.setattr(room, "divergence", lambda *given: math.nan)
    found = remeasure(dataclasses.replace(profiled, layers=tuple(layers)), plan, net, data)
    assert found.damage == math.inf
    assert [e.scale for e in found.profile.layers] == [1.0, FURTHEST, FURTHEST, 1.0]
    damages = [c.damage for c in found.profile.layers[1].candidates]
    assert damages.count(math.inf) == 1
    assert not any(map(math.isnan, damages))


def test_neither_network_nor_random_state_is_changed(profiled, net, data) -> None:
    state = {k: v.clone() for k, v in net.state_dict().items()}
    torch.manual_seed(4)
    before = torch.get_rng_state()
    remeasure(profiled, planned(profiled, SPLIT), net, data, anchor_samples=16)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_scales_by_hand() -> None:
    falls = {"a": 0.3, "b": 0.1, "c": -0.05, "d": 0.0}
    predicted = {"a": 0.2, "b": 0.2, "c": 0.4, "d": 0.0}
    scales = _scales(0.8, falls, predicted)
    level = 0.8 / (0.3 + 0.1 + 2 * NEGLIGIBLE * 0.8)
    assert scales["a"] == pytest.approx(level * 0.3 / 0.2)
    assert scales["b"] == pytest.approx(level * 0.1 / 0.2)
    assert scales["c"] == pytest.approx(1 / FURTHEST)
    assert scales["d"] == 1.0
    assert _scales(1.0, {"a": 1.0}, {"a": 1e-4}) == {"a": FURTHEST}
    assert _scales(1.0, {"a": 1.0}, {"a": float("nan")}) == {"a": 1.0}
