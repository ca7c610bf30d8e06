"""Post-training quantisation: every option changes the result, and helps where it should."""

import pytest
import torch
from torch import nn

from sft.calibration.quantize import quantize
from sft.core.data import Batches
from sft.core.errors import InputError
from sft.quantizers import offending_pairs
from sft.quantizers.fake import in_kernel_order
from sft.quantizers.linear import symmetric_scale
from sft.surgery.apply import apply

VNNI, AVX2 = "onnxruntime-vnni", "onnxruntime-avx2"


def error(model: nn.Module, wanted: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        given, right = model(x), wanted(x)
    return float((given - right).square().sum() / right.square().sum())


def test_a_better_rounding_is_nearer_at_few_bits(net, data, make_plan) -> None:
    plan = make_plan(net, data.example(), 3, VNNI)
    small, x = apply(net, plan), data.split("test")[0].inputs
    errors = {
        name: error(quantize(small, plan, VNNI, data.calibration, rounding=name), small, x)
        for name in ("nearest", "gptq", "adaround")
    }
    assert errors["gptq"] < 0.7 * errors["nearest"]
    assert errors["adaround"] < 0.7 * errors["nearest"]


def test_scales_weighed_by_the_data_beat_the_greatest_magnitude(net, data, make_plan) -> None:
    plan = make_plan(net, data.example(), 3, VNNI)
    small, x = apply(net, plan), data.split("test")[0].inputs
    found = {
        name: quantize(
            small,
            plan,
            VNNI,
            data.calibration,
            rounding="nearest",
            weight_ranges=name,
            refit=False,
        )
        for name in ("minmax", "mse")
    }
    weight = dict(small.named_parameters())["down.weight"]
    widest = symmetric_scale(weight, 3, 0)
    torch.testing.assert_close(found["minmax"].weights()["down.weight"][1].scale, widest)
    assert error(found["mse"], small, x) < error(found["minmax"], small, x)


def test_layers_solved_again_behind_rounded_ones_are_nearer(net, data, make_plan) -> None:
    plan = make_plan(net, data.example(), 3, VNNI)
    small, x = apply(net, plan), data.split("test")[0].inputs
    errors = [
        error(quantize(small, plan, VNNI, data.calibration, refit=refit), small, x)
        for refit in (False, True)
    ]
    assert errors[1] < 0.8 * errors[0]


def test_ranges_of_activations_differ_by_their_method(net, data, make_plan) -> None:
    plan = make_plan(net, data.example(), 8, VNNI)
    small = apply(net, plan)
    wide = quantize(small, plan, VNNI, data.calibration, ranges="minmax").activations()
    tight = quantize(small, plan, VNNI, data.calibration, ranges="mse").activations()
    assert all(float(tight[k].scale) <= float(wide[k].scale) * 1.0001 for k in wide)
    assert any(float(tight[k].scale) < 0.999 * float(wide[k].scale) for k in wide)


def test_the_bias_takes_up_the_mean_that_weights_lost(make_plan) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    x = torch.rand(64, 4, 8, 8) + 2  # a large mean
    plan = make_plan(net, x[:1], 2, VNNI)
    errors = [
        error(
            quantize(net, plan, VNNI, Batches(x), rounding="nearest", correct_bias=correct), net, x
        )
        for correct in (False, True)
    ]
    assert errors[1] < 0.1 * errors[0]


def test_pairs_that_saturate_are_mended_at_little_loss(net, data, make_plan) -> None:
    x = data.split("test")[0].inputs
    errors, pairs = {}, {}
    for target in (VNNI, AVX2):
        plan = make_plan(net, data.example(), 8, target)
        small = apply(net, plan)
        model = quantize(small, plan, target, data.calibration)
        integers = [in_kernel_order(r.integers(w.detach())) for w, r in model.weights().values()]
        pairs[target] = sum(offending_pairs(q, 128) for q in integers)
        errors[target] = error(model, small, x)
    assert pairs[VNNI] > 0
    assert pairs[AVX2] == 0
    assert errors[AVX2] < 3 * errors[VNNI]


class Outlier(nn.Module):
    """The second layer's input has one channel a thousand times as large as the one that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 1)
        self.third = nn.Conv2d(8, 4, 3, padding=1)
        with torch.no_grad():
            self.first.weight[0] *= 2000
            self.second.weight[:, 0] = 0
            self.second.weight[:, 0] += 1e-9
            self.third.weight *= 30

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.third(x).mean((2, 3))


def test_a_layer_that_integers_ruin_stays_in_float_with_its_reason(make_plan) -> None:
    torch.manual_seed(0)
    net, x = Outlier().eval(), torch.randn(64, 1, 8, 8)
    plan = make_plan(net, x[:1], 8, VNNI)
    spared = quantize(net, plan, VNNI, Batches(x))
    forced = quantize(net, plan, VNNI, Batches(x), spare_sensitive=False)
    assert spared.plan.option("second").scheme == "keep"
    assert "rounded alone" in next(r.reason for r in spared.plan.rows if r.name == "second")
    assert spared.plan.option("third").scheme == "dense"
    assert error(spared, net, x) < 0.1 * error(forced, net, x)
    assert forced.plan == plan


def test_a_network_that_takes_integers_well_keeps_its_plan(net, data, make_plan) -> None:
    plan = make_plan(net, data.example(), 8, VNNI)
    assert quantize(apply(net, plan), plan, VNNI, data.calibration).plan == plan


def test_the_same_seed_gives_the_same_integers(net, data, make_plan) -> None:
    plan = make_plan(net, data.example(), 4, VNNI)
    small = apply(net, plan)
    before = torch.random.get_rng_state()
    one, two = (quantize(small, plan, VNNI, data.calibration, seed=3) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    for name, (weight, _) in one.weights().items():
        assert torch.equal(weight, two.weights()[name][0])


def test_the_model_is_left_as_it_was(net, data, make_plan) -> None:
    plan = make_plan(net, data.example(), 4, VNNI)
    small = apply(net, plan)
    before = {k: v.clone() for k, v in small.state_dict().items()}
    quantize(small, plan, VNNI, data.calibration, equalize=True)
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())


def test_unknown_methods_are_refused_before_any_work(net, data, make_plan) -> None:
    plan = make_plan(net, data.example(), 8, VNNI)
    small = apply(net, plan)
    for option in ({"ranges": "widest"}, {"rounding": "up"}, {"weight_ranges": "widest"}):
        with pytest.raises(InputError, match="There is no"):
            quantize(small, plan, VNNI, data.calibration, **option)


def test_data_that_is_not_finite_is_refused(net, data, make_plan) -> None:
    plan = make_plan(net, data.example(), 8, VNNI)
    x = data.calibration.inputs.clone()
    x[3, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        quantize(apply(net, plan), plan, VNNI, Batches(x))
