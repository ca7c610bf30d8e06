"""The gauge of split layers: the same function, orthonormal columns, fewer errors at few bits."""

import torch
from torch import nn

from sft.calibration.factors import factors_of, orthonormalize
from sft.calibration.quantize import quantize
from sft.core.records import Option
from sft.quantizers.fake import Mode
from sft.runtimes.targets import find_target
from sft.surgery.apply import apply
from sft.surgery.quantize import prepare

VNNI = "onnxruntime-vnni"


def split_net() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 8, 3)).eval()
    return net, torch.randn(64, 8, 8, 8)


def test_the_gauge_leaves_the_function_as_it_is(make_plan) -> None:
    net, x = split_net()
    plan = make_plan(net, x[:1], 4, VNNI).replace("0", Option("channel_out", (8,), 4))
    small = apply(net, plan)
    with torch.no_grad():
        small[0].second.weight.mul_(torch.logspace(-1, 1, 8)[None, :, None, None])
    model = prepare(small, plan, find_target(VNNI))
    model.set_modes(Mode.PASS, Mode.PASS)
    wanted = model(x)
    assert list(factors_of(model, plan)) == ["0"]
    assert orthonormalize(model, plan) == 1
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-4)
    last = model.graph_module.get_parameter("0.second.weight").detach().flatten(1)
    torch.testing.assert_close(last.mT @ last, torch.eye(8), rtol=1e-5, atol=1e-5)


def test_split_layers_lose_less_with_gauge_and_refit(net, data, make_plan) -> None:
    plan = make_plan(net, data.example(), 3, VNNI)
    for name in ("body", "down"):
        plan = plan.replace(name, Option("channel_out", (12,), 3))
    small, x = apply(net, plan), data.split("test")[0].inputs
    with torch.no_grad():
        wanted = small(x)
        errors = [
            float(
                (quantize(small, plan, VNNI, data.calibration, refit=refit)(x) - wanted)
                .square()
                .sum()
            )
            for refit in (False, True)
        ]
    assert errors[1] < 0.6 * errors[0]
