"""Equalisation leaves the function as it is and gives narrow channels more levels."""

import torch
from torch import nn

from sft.calibration.equalize import equalize, find_links
from sft.calibration.quantize import quantize
from sft.core.data import Batches
from sft.quantizers.fake import Mode
from sft.runtimes.targets import find_target
from sft.surgery.apply import apply
from sft.surgery.quantize import prepare

VNNI = "onnxruntime-vnni"


def uneven(bound: nn.Module) -> nn.Module:
    """Channels of widely different ranges between two layers, the second depthwise."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 1), bound, nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 4, 1)
    )
    with torch.no_grad():
        net[0].weight.mul_(torch.logspace(-2, 0, 16)[:, None, None, None])
        net[0].bias.mul_(torch.logspace(-2, 0, 16))
        net[2].weight.mul_(torch.logspace(2, 0, 16)[:, None, None, None])
    return net.eval()


def test_the_function_stays_the_same(make_plan) -> None:
    x = torch.randn(32, 3, 8, 8)
    for bound in (nn.ReLU(), nn.ReLU6(), nn.Identity(), nn.Hardtanh(-1, 2)):
        net = uneven(bound)
        model = prepare(net, make_plan(net, x[:1], 8, VNNI), find_target(VNNI))
        model.set_modes(Mode.PASS, Mode.PASS)
        wanted = model(x)
        weight = model.graph_module.get_parameter("0.weight").clone()
        assert equalize(model, lambda: [x]) == 2
        assert not torch.equal(weight, model.graph_module.get_parameter("0.weight"))
        torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-4)


def test_uneven_channels_round_better_behind_it(make_plan) -> None:
    net, x = uneven(nn.ReLU()), torch.randn(64, 3, 8, 8)
    plan = make_plan(net, x[:1], 8, VNNI)
    with torch.no_grad():
        wanted = net(x)
        errors = [
            float((quantize(net, plan, VNNI, Batches(x), equalize=e)(x) - wanted).square().sum())
            for e in (False, True)
        ]
    assert errors[1] < 0.5 * errors[0]


def test_a_value_that_others_read_too_is_no_link(net, data, make_plan) -> None:
    plan = make_plan(net, data.example(), 8, VNNI)
    model = prepare(apply(net, plan), plan, find_target(VNNI))
    assert list(find_links(model)) == []  # each is read by the addition as well, or pooled
