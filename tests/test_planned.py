"""Planning with the network at hand."""

import dataclasses

import pytest

from sft import planned as room
from sft.calibration.quantize import quantize
from sft.core.budget import Budget
from sft.core.records import Plan, Profile
from sft.exporters import export
from sft.planned import plan_in_place, plan_that_fits, weigh
from sft.planning.allocate import plan as make_plan
from sft.profiling.remeasure import Remeasured, remeasure
from sft.surgery.apply import apply

TIGHT = Budget(size=0.2, macs=0.3)


def options(plan: Plan) -> list[str]:
    return [str(row.option) for row in plan.rows]


def test_without_a_limit_nothing_is_measured(profiled, net, data, monkeypatch) -> None:
    monkeypatch.setattr(room, "remeasure", None)
    assert plan_in_place(profiled, Budget(), net, data) == make_plan(profiled, Budget())
    kept = plan_in_place(profiled, Budget(max_drop=0.1), net, data, keep=["fc"])
    assert kept.option("fc").scheme == "keep"


def test_the_plan_of_least_damage_in_place_is_given(profiled, net, data, monkeypatch) -> None:
    seen: list[tuple[Remeasured, Plan]] = []

    def watched(profile: Profile, plan: Plan, *more: object, **named: object) -> Remeasured:
        found = remeasure(profile, plan, net, data, **named)
        seen.append((found, plan))
        return found

    monkeypatch.setattr(room, "remeasure", watched)
    chosen = plan_in_place(profiled, TIGHT, net, data)
    assert len({tuple(options(plan)) for _, plan in seen}) == len(seen)
    measured, best = min(seen, key=lambda pair: pair[0].damage)
    assert options(chosen) == options(best)
    assert chosen.cost == best.cost
    says_what_was_measured(chosen, measured)
    assert chosen.value != best.value
    assert seen[0][1] == make_plan(profiled, TIGHT)
    assert chosen.cost.size <= 0.2 * profiled.size


def says_what_was_measured(chosen: Plan, measured: Remeasured) -> None:
    """Damages, reasons and bound are those of the menus that were corrected with the plan."""
    for row, entry in zip(chosen.rows, measured.profile.layers, strict=True):
        (candidate,) = [c for c in entry.candidates if c.option == row.option]
        assert row.predicted_damage == candidate.damage
        assert f"damage {candidate.damage:.2g}" in row.reason
    assert chosen.value == pytest.approx(sum(row.predicted_damage for row in chosen.rows))
    assert chosen.bound == pytest.approx(make_plan(measured.profile, TIGHT).value, rel=1e-7)
    assert chosen.gap == pytest.approx((chosen.value - chosen.bound) / chosen.value)
    assert chosen.status == ("optimal" if chosen.gap <= 1e-7 else "feasible")


@pytest.mark.parametrize("best", [0, 1, 2])
def test_the_best_round_wins_and_a_plan_seen_before_ends_it(
    profiled, net, data, monkeypatch, best: int
) -> None:
    """Each round makes the layer that is 2 bits now dear, so that another one is chosen."""
    asked: list[Plan] = []
    measured: list[Remeasured] = []

    def made(profile: Profile, plan: Plan, *_: object, **__: object) -> Remeasured:
        asked.append(plan)
        layers = tuple(
            dataclasses.replace(
                entry,
                candidates=tuple(
                    dataclasses.replace(c, damage=c.damage + 10.0)
                    if c.option == plan.option(entry.layer.name) and entry.layer.name == "down"
                    else c
                    for c in entry.candidates
                ),
            )
            for entry in profile.layers
        )
        damage = 0.5 if len(asked) - 1 == best else 1.0
        measured.append(Remeasured(dataclasses.replace(profile, layers=layers), damage))
        return measured[-1]

    monkeypatch.setattr(room, "remeasure", made)
    chosen = plan_in_place(profiled, TIGHT, net, data, rounds=2)
    assert len(asked) == 3
    assert options(chosen) == options(asked[best])
    says_what_was_measured(chosen, measured[best])
    assert chosen.status == "feasible"
    asked.clear()
    plan_in_place(profiled, TIGHT, net, data, rounds=0)
    assert len(asked) == 1
    asked.clear()
    monkeypatch.setattr(room, "remeasure", lambda p, plan, *_, **__: (
        asked.append(plan), Remeasured(p, 1.0))[1])  # fmt: skip
    plan_in_place(profiled, TIGHT, net, data, rounds=5)
    assert len(asked) == 1


def test_it_is_the_same_each_time_and_keeps_what_is_asked(profiled, net, data) -> None:
    first = plan_in_place(profiled, TIGHT, net, data, keep=["stem"])
    assert first == plan_in_place(profiled, TIGHT, net, data, keep=["stem"])
    assert first.option("stem").scheme == "keep"
    option = next(
        c.option for c in profiled.layers[2].candidates if c.option.rank and c.option.weight_bits
    )
    fixed = plan_in_place(profiled, TIGHT, net, data, overrides={"down": option})
    assert fixed.option("down") == option


def test_the_seed_is_that_of_the_measuring(profiled, net, data, monkeypatch) -> None:
    seeds: list[object] = []

    def watched(profile: Profile, plan: Plan, *_: object, seed: int) -> Remeasured:
        seeds.append(seed)
        return Remeasured(profile, 1.0)

    monkeypatch.setattr(room, "remeasure", watched)
    plan_in_place(profiled, TIGHT, net, data, seed=7)
    assert seeds == [7]


def lighter(profile: Profile, by: int) -> Profile:
    """The same menus, their sizes told too small by so many bytes a layer."""
    layers = tuple(
        dataclasses.replace(entry, candidates=tuple(
            dataclasses.replace(c, cost=dataclasses.replace(c.cost, size=c.cost.size - by))
            for c in entry.candidates
        ))
        for entry in profile.layers
    )  # fmt: skip
    return dataclasses.replace(profile, layers=layers)


def test_a_plan_whose_file_would_be_too_large_is_made_again_for_less(
    profiled, net, data, tmp_path
) -> None:
    told = lighter(profiled, 60)
    limit = weigh(plan_in_place(profiled, Budget(size=0.13), net, data), net, data) - 1
    budget = Budget(size_bytes=limit)
    assert weigh(plan_in_place(told, budget, net, data), net, data) > limit
    found = plan_that_fits(told, budget, net, data)
    assert found.budget == {"size_bytes": limit}
    small = apply(net, found)
    rounded = quantize(small, found, found.target, data.calibration, spare_sensitive=False)
    assert weigh(found, net, data) <= limit
    artifact = export(rounded, found, tmp_path / "model.onnx")
    assert artifact.file_bytes == weigh(found, net, data)


def test_a_plan_whose_file_fits_stays_and_without_a_limit_none_is_weighed(
    profiled, net, data, monkeypatch
) -> None:
    roomy = Budget(size=0.5, macs=0.4)
    assert plan_that_fits(profiled, roomy, net, data) == plan_in_place(profiled, roomy, net, data)
    monkeypatch.setattr(room, "weigh", None)
    macs = Budget(macs=0.4)
    assert plan_that_fits(profiled, macs, net, data) == plan_in_place(profiled, macs, net, data)
