"""Plans applied to models."""

import dataclasses

import pytest
import torch
from torch import nn

from sft.core.budget import Budget
from sft.core.errors import InputError
from sft.core.records import Cost, Option, Plan, PlanRow
from sft.layers import Conv2dSFT
from sft.planning.allocate import plan as make_plan
from sft.surgery.apply import apply


@pytest.fixture
def plan(profiled):
    return make_plan(profiled, Budget())


def test_only_the_named_layer_is_split_and_the_model_is_untouched(net, plan) -> None:
    before = {k: v.clone() for k, v in net.state_dict().items()}
    small = apply(net, plan.replace("body", Option("channel_in", (8,))))
    assert isinstance(small.body, Conv2dSFT)
    assert small.body.rank == (8,)
    assert not isinstance(small.down, Conv2dSFT)
    assert list(net.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_full_rank_changes_nothing(net, plan) -> None:
    small = apply(net, plan.replace("body", Option("channel_out", (16,))))
    x = torch.randn(4, 1, 12, 12)
    torch.testing.assert_close(small(x), net(x), rtol=1e-4, atol=1e-5)


def test_statistics_make_the_factors_better_than_plain_svd(net, data, plan) -> None:
    plan = plan.replace("body", Option("channel_out", (4,)))
    plain = dataclasses.replace(plan, statistics=None)
    x = data.calibration.inputs
    with torch.no_grad():
        aware, blind = (float((apply(net, p)(x) - net(x)).square().mean()) for p in (plan, plain))
    assert aware < blind


@pytest.mark.parametrize(
    ("layer", "option", "words"),
    [
        ("fc", Option("spatial", (2,)), r"'fc' with weight \(4, 32\).*fewer than two axes"),
        ("body", Option("channel_out", (99,)), r"'body' with weight \(16, 16, 3, 3\).*1 to 16"),
        ("body", Option("no_such"), r"'body'.*no scheme 'no_such'\. .* dense, stored, .*tucker2"),
    ],
)
def test_nonsense_is_refused_by_layer_name(net, plan, layer, option, words) -> None:
    with pytest.raises(InputError, match=words):
        apply(net, plan.replace(layer, option))


def test_an_input_that_no_memory_holds_is_refused(net, plan) -> None:
    for side in (10**7, 10**12):
        with pytest.raises(InputError, match=rf"input_shape \(1, {side}, {side}\) cannot be used"):
            apply(net, dataclasses.replace(plan, input_shape=(1, side, side)))


def test_dense_integers_of_a_transposed_convolution_are_refused() -> None:
    up = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ConvTranspose2d(4, 2, 3)).eval()
    cost = Cost(1, 1, 1)
    rows = tuple(PlanRow(name, Option("dense", (), 4), None, cost, "") for name in "01")
    plan = Plan("up", "t", {}, rows, cost, cost, "edited", 0, 0, 0, input_shape=(2, 8, 8))
    with pytest.raises(InputError, match=r"'1' with weight \(4, 2, 3, 3\).*integer kernel"):
        apply(up, plan)
    assert apply(up, plan.replace("1", Option("stored", (), 4)))


def test_a_missing_row_is_named(net, plan) -> None:
    with pytest.raises(InputError, match="no row for 'stem'"):
        apply(net, dataclasses.replace(plan, rows=plan.rows[1:]))


def test_a_plan_of_another_model_is_refused(net, plan) -> None:
    rows = (dataclasses.replace(plan.rows[0], name="elsewhere"), *plan.rows[1:])
    with pytest.raises(InputError, match="elsewhere"):
        apply(net, dataclasses.replace(plan, rows=rows))
