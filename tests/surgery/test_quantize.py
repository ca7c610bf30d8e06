"""Rounding in the graph: what it rounds, and that training keeps the integers."""

import dataclasses

import pytest
import torch

from sft.calibration.quantize import quantize
from sft.core.budget import Budget
from sft.core.errors import InputError
from sft.core.records import Option
from sft.planning.allocate import plan as make_plan
from sft.profiling.profile import profile
from sft.runtimes.targets import find_target, list_targets
from sft.surgery.apply import apply
from sft.training.finetune import finetune

TARGET = find_target("onnxruntime-avx2")


@pytest.fixture
def plan(profiled):
    return make_plan(profiled, Budget()).replace("body", Option("channel_out", (8,), 8))


def test_every_layer_is_rounded_and_stays_close(net, data, plan) -> None:
    small = apply(net, plan)
    rounded = quantize(small, plan, TARGET, data.calibration)
    assert set(rounded.weights()) == {
        "stem.weight", "body.first.weight", "body.second.weight", "down.weight", "fc.weight",
    }  # fmt: skip
    x = data.calibration.inputs
    error = (rounded(x) - small(x)).square().mean() / small(x).square().mean()
    assert 0 < float(error.detach()) < 0.01


def test_integers_are_within_the_layout_and_use_it(net, data, plan) -> None:
    rounded = quantize(apply(net, plan), plan, TARGET, data.calibration)
    for weight, rounding in rounded.weights().values():
        integers = rounding.integers(weight.detach())
        assert int(integers.max()) <= TARGET.layout.weight_max
        assert int(integers.min()) >= TARGET.layout.weight_min
        top = integers.flatten(1).abs().amax(1)
        assert int(top.min()) > TARGET.layout.pair_sum // 2 - 2  # a pair of equals still fits
        assert int(top.max()) > TARGET.layout.pair_sum // 2  # more than 7 bits


@pytest.mark.parametrize("target", list_targets(), ids=lambda t: t.name)
def test_every_target_layout_can_be_simulated(net, data, plan, target) -> None:
    plan = dataclasses.replace(plan, target=target.name)
    small = apply(net, plan)
    rounded = quantize(small, plan, target, data.calibration)
    x = data.calibration.inputs
    agree = (rounded(x).argmax(1) == small(x).argmax(1)).float().mean()
    assert float(agree) > 0.95
    converted = rounded.convert()
    torch.testing.assert_close(converted(x), rounded(x), rtol=1e-5, atol=1e-5)


def test_fewer_bits_round_more_coarsely(net, data, plan) -> None:
    x = data.calibration.inputs
    errors = []
    for bits in (8, 4, 2):
        rows = tuple(
            dataclasses.replace(r, option=dataclasses.replace(r.option, weight_bits=bits))
            for r in plan.rows
        )
        small = apply(net, plan)
        rounded = quantize(small, dataclasses.replace(plan, rows=rows), TARGET, data.calibration)
        errors.append(float((rounded(x) - small(x)).square().mean().detach()))
    assert errors[0] < errors[1] < errors[2]


def test_a_layer_kept_in_float_has_no_rounded_weight(net, data, plan) -> None:
    plan = plan.replace("down", Option("keep"))
    rounded = quantize(apply(net, plan), plan, TARGET, data.calibration)
    assert "down.weight" not in rounded.weights()


def test_training_ends_on_integers_and_the_ranges_may_stay(net, data, plan) -> None:
    rounded = quantize(apply(net, plan), plan, TARGET, data.calibration)
    ranges = {k: a.limits() for k, a in rounded.activations().items()}
    tuned = finetune(rounded, data.train, net, steps=5, learning_rate=1e-2, learn_steps=False)
    assert {k: a.limits() for k, a in tuned.activations().items()} == ranges
    moved = [
        not torch.equal(weight, rounded.weights()[name][0])
        for name, (weight, _) in tuned.weights().items()
    ]
    assert all(moved)
    for weight, rounding in tuned.weights().values():
        assert torch.equal(rounding.on_grid(weight), weight)
    x = data.calibration.inputs
    converted = tuned.convert()
    torch.testing.assert_close(converted(x), tuned(x), rtol=1e-5, atol=1e-5)


def test_empty_calibration_is_refused(net, plan) -> None:
    with pytest.raises(InputError, match="empty"):
        quantize(apply(net, plan), plan, TARGET, [])


def test_convolutions_with_padding_in_words_are_rounded(data) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3, padding="same"),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 4, 3, padding="valid"),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
    ).eval()
    plan = make_plan(profile(model, data, TARGET.name), Budget())
    rounded = quantize(apply(model, plan), plan, TARGET, data.calibration)
    assert set(rounded.weights()) == {"0.weight", "2.weight"}


def test_a_planned_layer_that_cannot_be_rounded_is_named(data) -> None:
    torch.manual_seed(0)
    conv = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv2d(1, 4, 3))
    model = torch.nn.Sequential(conv, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()).eval()
    plan = make_plan(profile(model, data, TARGET.name), Budget())
    assert plan.option("0").scheme == "keep"
    with pytest.raises(InputError, match="Layer '0' is planned in integers"):
        quantize(model, plan.replace("0", Option("dense")), TARGET, data.calibration)


def test_integers_equal_those_of_the_conversion(net, data, plan) -> None:
    rounded = quantize(apply(net, plan), plan, TARGET, data.calibration)
    converted = rounded.convert()
    stored = [b for b in converted.state_dict().values() if b.dtype == torch.int8 and b.ndim > 1]
    for weight, rounding in rounded.weights().values():
        integers = rounding.integers(weight.detach())
        assert any(torch.equal(integers, other) for other in stored)
