"""Batch norm folding and module replacement."""

import pytest
import torch
from torch import nn

from sft.core.errors import InputError
from sft.surgery.modules import capture, fold_batch_norm, get_module, replace_module


class TwoUsers(nn.Module):
    """A convolution whose output is read by a norm and by something else."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return self.norm(y) + y


def with_statistics(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.running_mean)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model.eval()


def norms(model: nn.Module) -> int:
    return sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_folding_keeps_the_outputs_and_the_original(net) -> None:
    net = with_statistics(net)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x = torch.randn(3, 1, 12, 12)
    folded = fold_batch_norm(net, x[:1])
    assert norms(folded) == 0
    assert norms(net) == 2
    torch.testing.assert_close(folded(x), net(x), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_a_norm_behind_a_shared_output_is_left_alone() -> None:
    model = with_statistics(TwoUsers())
    x = torch.randn(2, 2, 6, 6)
    folded = fold_batch_norm(model, x[:1])
    assert norms(folded) == 1
    torch.testing.assert_close(folded(x), model(x))


def test_a_model_that_cannot_be_captured_is_refused_with_the_reason() -> None:
    class Branches(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(InputError, match="cannot be captured"):
        capture(Branches(), torch.randn(1, 2))


def test_a_captured_graph_takes_any_batch_size(net) -> None:
    graph = capture(net, torch.randn(1, 1, 12, 12))
    for count in (1, 5):
        x = torch.randn(count, 1, 12, 12)
        torch.testing.assert_close(graph(x), net(x))


def test_replace_and_get_by_name() -> None:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(1, 1, 1)))
    new = nn.Identity()
    replace_module(model, "0.0", new)
    assert get_module(model, "0.0") is new
    with pytest.raises(InputError, match=r"no layer '0\.7'"):
        get_module(model, "0.7")


class Reused(nn.Module):
    """Convolutions and norms called in patterns that must not be folded."""

    def __init__(self, pattern: str) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 2, 3, padding="same"), nn.Conv2d(2, 2, 3, padding=1)
        self.norm, self.pattern = nn.BatchNorm2d(2), pattern

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.pattern == "one norm, two convolutions":
            return self.norm(self.a(x)) + self.norm(self.b(x))
        if self.pattern == "one convolution twice":
            return self.norm(self.a(x)) + self.a(x)
        if self.pattern == "norm elsewhere too":
            return self.norm(self.norm(self.a(x)) + x)
        return self.norm(self.a(x))


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        ("one norm, two convolutions", 1),
        ("one convolution twice", 1),
        ("norm elsewhere too", 1),
        ("plain, padding=same", 0),
    ],
)
def test_folding_keeps_outputs_when_things_are_used_twice(pattern: str, left: int) -> None:
    torch.manual_seed(0)
    model = with_statistics(Reused(pattern))
    x = torch.randn(2, 2, 6, 6)
    folded = fold_batch_norm(model, x[:1])
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)
    assert norms(folded) == left
