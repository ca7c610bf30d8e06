"""Which positions are used, what the model is like afterwards, and what is refused."""

import copy

import pytest
import torch
from torch import Tensor, nn

from sft.core.data import Data
from sft.core.errors import InputError
from sft.core.kernels import geometry_of, to_canonical
from sft.core.statistics import Statistics
from sft.profiling.statistics import gather_statistics


@pytest.mark.parametrize("positions", [50, 400])
def test_chosen_positions(positions: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 12, 1))
    batches = list(torch.randn(5, 6, 3, 14, 14))
    names = ["0", "2"]

    def run(seed: int, names: list[str], positions: int | None) -> dict[str, Statistics]:
        options = {"patch_covariances": names, "gradients": True, "seed": seed}
        return gather_statistics(model, names, batches, positions=positions, **options)[0]

    whole, found, again, other = (
        run(0, names, None), run(0, names, positions), run(0, ["2"], positions),
        run(1, names, positions),
    )  # fmt: skip
    for name in names:
        assert torch.equal(found[name].patch_mean, whole[name].patch_mean)
        assert torch.equal(found[name].output_mean, whole[name].output_mean)
        assert found[name].count == whole[name].count == 5 * 6 * 14 * 14
        for field in ("output_covariance", "input_covariance", "gradient_covariance"):
            exact, value = getattr(whole[name], field), getattr(found[name], field)
            assert not torch.equal(exact, value)
            assert not torch.equal(getattr(other[name], field), value)
            assert float((exact - value).norm() / exact.norm()) < 5 / positions**0.5
    for field in ("output_covariance", "input_covariance"):  # the same alone as among others
        assert torch.equal(getattr(again["2"], field), getattr(found["2"], field))


def test_chosen_positions_do_not_change_the_error_curve(net: nn.Module, data: Data) -> None:
    names = ["stem", "body", "down"]
    whole, _ = gather_statistics(net, names, data.calibration)
    few, _ = gather_statistics(net, names, data.calibration, positions=1024)
    for name in names:
        kernel = to_canonical(net.get_submodule(name).weight, geometry_of(net.get_submodule(name)))
        curves = []
        for found in (whole[name], few[name]):
            energy = torch.linalg.eigvalsh(found.covariance_of_outputs(kernel)[0]).clamp(min=0)
            curves.append(energy.cumsum(0) / energy.sum())  # relative error when these are dropped
        assert float((curves[0] - curves[1]).abs().max()) < 0.02
        assert not torch.equal(*curves)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("bad", [False, True])
def test_the_model_is_left_as_it_was(gradients: bool, bad: bool) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Conv2d(4, 4, 3),
    )
    model[4].eval()
    model[1].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    flags = [(m.training, len(m._forward_hooks)) for m in model.modules()]
    wanted = [p.requires_grad for p in model.parameters()]
    x = torch.randn(2, 3, 8, 8)
    random = torch.get_rng_state()
    batches = [x, torch.full_like(x, float("nan"))] if bad else [x, x]
    if bad:
        with pytest.raises(InputError, match="NaN"):
            gather_statistics(model, ["0", "4"], batches, gradients=gradients)
    else:
        gather_statistics(model, ["0", "4"], batches, gradients=gradients, positions=10)
    assert torch.equal(torch.get_rng_state(), random)
    assert [(m.training, len(m._forward_hooks)) for m in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("names", "batches", "options", "message"),
    [
        (["0"], [], {}, "empty"),
        (["0"], [torch.zeros(0, 3, 5, 5)], {}, "empty"),
        (["0"], [torch.full((1, 3, 5, 5), float("nan"))], {}, "NaN"),
        (["0"], [torch.full((1, 3, 5, 5), 3e38)], {}, "layer '0' sees NaN or infinite"),
        (["0"], [torch.zeros(1, 3, 5, 5)], {"positions": 0}, "At least 1 position"),
        (["0"], [torch.zeros(1, 3, 5, 5)], {"patch_covariances": ["1"]}, "not among the layers"),
        (["0", "idle"], [torch.zeros(1, 3, 5, 5)], {}, "layer 'idle' was not run"),
        (["1"], [torch.zeros(1, 3, 5, 5)], {}, "ReLU"),
    ],
)  # fmt: skip
def test_refusals(names: list[str], batches: list[Tensor], options: dict, message: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU())
    model[0].idle = nn.Linear(2, 2)
    names = ["0.idle" if name == "idle" else name for name in names]
    with pytest.raises(InputError, match=message.replace("'idle'", "'0.idle'")):
        gather_statistics(model, names, batches, **options)
