import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

from sft.core.errors import InputError
from sft.models.inspect import check_model, inspect


class Block(nn.Module):
    """A residual block whose batch norm, dropout and counter notice a careless run."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.project = nn.Conv2d(8, 6, 1)
        self.fc = nn.Linear(6, 4)
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        x = self.drop(torch.relu(self.bn(self.conv1(x))))
        x = self.project(x + self.conv2(x)) + torch.rand(())
        y: Tensor = self.fc(x.mean((2, 3)))
        return y


NETS: list[tuple[str, nn.Module, tuple[int, ...]]] = [
    ("block", Block(), (3, 9, 9)),
    ("one_d", nn.Sequential(nn.Conv1d(4, 6, 5, stride=3), nn.Conv1d(6, 6, 3, groups=3)), (4, 40)),
    ("three_d", nn.Conv3d(2, 4, (1, 3, 3), dilation=(1, 2, 2)), (2, 4, 9, 9)),
    ("transposed", nn.ConvTranspose2d(6, 4, 3, stride=2, output_padding=1, groups=2), (6, 5, 5)),
    ("transposed_1d", nn.ConvTranspose1d(3, 2, 4, stride=4), (3, 7)),
    ("transposed_3d", nn.ConvTranspose3d(2, 3, 2, stride=2), (2, 3, 3, 3)),
    ("linear_3d", nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 2, bias=False)), (6, 5)),
]


@pytest.mark.parametrize(("name", "net", "shape"), NETS, ids=[n for n, _, _ in NETS])
@pytest.mark.parametrize("batch", [1, 3])
def test_macs_are_half_of_torchs_flops(
    name: str, net: nn.Module, shape: tuple[int, ...], batch: int
) -> None:
    net = copy.deepcopy(net).eval()
    example = torch.randn(batch, *shape)
    with FlopCounterMode(display=False) as counter:
        net(example)
    found = inspect(net, example, name)
    assert found.macs == counter.get_total_flops() / 2 / batch
    assert sum(layer.macs for layer in found.layers) == found.macs
    assert found.model == name
    assert found.input_shape == shape
    assert found.params == sum(p.numel() for p in net.parameters())


def test_layers_in_order_of_first_call_with_shapes_of_one_sample() -> None:
    found = inspect(Block(), torch.randn(2, 3, 9, 9))
    assert [(x.name, x.kind) for x in found.layers] == [
        ("conv1", "Conv2d"),
        ("conv2", "Conv2d"),
        ("project", "Conv2d"),
        ("fc", "Linear"),
    ]
    first = found.layers[0]
    assert (first.input_shape, first.output_shape) == ((3, 9, 9), (8, 5, 5))
    assert first.weight_shape == (8, 3, 3, 3)
    assert first.bias
    assert first.calls == 1
    assert first.macs == 5 * 5 * 8 * 3 * 9
    assert not found.layers[1].bias


def test_matrix_products_outside_layers_count_for_the_whole() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            q = self.q(x)
            return q @ q.transpose(1, 2)

    found = inspect(Attention(), torch.randn(2, 3, 4))
    assert found.layers[0].macs == 3 * 16
    assert found.macs == 3 * 16 + 3 * 3 * 4


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_bit_for_bit(fails: bool) -> None:
    net = Block().train()
    net.bn.eval()
    net.conv1.weight.requires_grad_(False)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    objects = {k: id(v) for k, v in [*net.named_parameters(), *net.named_buffers()]}
    flags = {n: m.training for n, m in net.named_modules()}
    rng = torch.get_rng_state()
    if fails:
        with pytest.raises(InputError):
            inspect(net, torch.ones(2, 5, 9, 9))
    else:
        inspect(net, torch.ones(2, 3, 9, 9))
    assert torch.equal(torch.get_rng_state(), rng)
    assert {n: m.training for n, m in net.named_modules()} == flags
    after = net.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert {k: id(v) for k, v in [*net.named_parameters(), *net.named_buffers()]} == objects
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert all(p.grad is None for p in net.parameters())
    assert not net.conv1.weight.requires_grad
    assert net.conv2.weight.requires_grad


def test_spectral_norm_of_a_model_in_training_is_left_alone() -> None:
    net = nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(3, 3, 3))).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    inspect(net, torch.ones(1, 3, 5, 5))
    assert all(torch.equal(net.state_dict()[k], v) for k, v in before.items())


class Mine(nn.Conv2d):
    pass


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.a(x))
        return y


class TwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 3, 3)
        self.again = self.a

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.again(x)
        return y


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(self.a(x))
        return y


class Shrinking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(self.a(x))
        return y


def weight_normed() -> nn.Module:
    return parametrizations.weight_norm(nn.Conv2d(3, 3, 3))


REFUSALS: list[tuple[nn.Module, str, str]] = [
    (Mine(3, 6, 3), "Mine", "Mine is a class of its own"),
    (weight_normed(), "Conv2d", "parametrization"),
    (Tied(), "Conv2d", "shared"),
    (Shrinking(), "Conv2d", "inputs of different shapes"),
]


@pytest.mark.parametrize(("net", "kind", "reason"), REFUSALS, ids=[r for _, _, r in REFUSALS])
def test_refusals_give_the_reason(net: nn.Module, kind: str, reason: str) -> None:
    for layer in inspect(nn.Sequential(net), torch.ones(1, 3, 8, 8)).layers:
        assert layer.kind == kind
        assert list(layer.refusals) == ["*"]
        assert reason in layer.refusals["*"]


def test_a_layer_used_twice_or_under_two_names_is_one_layer() -> None:
    for net, calls in ((Twice(), 2), (TwoNames(), 1)):
        (layer,) = inspect(net, torch.ones(1, 3, 8, 8)).layers
        assert (layer.name, layer.calls, layer.refusals) == ("a", calls, {})
        assert layer.geometry is not None
        assert layer.macs == calls * layer.geometry.macs(layer.input_size)


@pytest.mark.parametrize(("net", "kind", "_"), REFUSALS)
def test_what_is_refused_has_no_geometry(net: nn.Module, kind: str, _: str) -> None:
    assert all(x.geometry is None for x in inspect(net, torch.ones(1, 3, 8, 8)).layers)


@pytest.mark.parametrize("kernel", [3, (1, 3), 5])
def test_a_plain_convolution_is_not_refused(kernel: Any) -> None:
    found = inspect(nn.Sequential(nn.Conv2d(3, 4, kernel)), torch.ones(1, 3, 8, 8))
    assert found.layers[0].refusals == {}


def test_a_layer_called_twice_counts_twice() -> None:
    (layer,) = inspect(Shrinking(), torch.ones(1, 3, 8, 8)).layers
    assert layer.calls == 2
    assert layer.macs == (36 + 16) * 81
    assert (layer.input_shape, layer.output_shape) == ((3, 8, 8), (3, 6, 6))


def test_a_model_that_does_not_run_is_quoted_on_one_line() -> None:
    with pytest.raises(InputError) as caught:
        inspect(nn.Conv2d(3, 4, 3), torch.ones(1, 5, 8, 8))
    assert "(1, 5, 8, 8)" in str(caught.value)
    assert "expected input[1, 5, 8, 8] to have 3 channels" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value: float) -> None:
    net = Block()
    with torch.no_grad():
        net.conv2.weight[0, 0, 0, 0] = value
    with pytest.raises(InputError, match=r"'conv2\.weight'"):
        check_model(net, torch.ones(1, 3, 9, 9))
    net = Block()
    net.bn.running_var[0] = value
    with pytest.raises(InputError, match=r"'bn\.running_var'"):
        inspect(net, torch.ones(1, 3, 9, 9))


class Returns(nn.Module):
    def __init__(self, what: Any) -> None:
        super().__init__()
        self.conv, self.what = nn.Conv2d(3, 4, 3), what

    def forward(self, x: Tensor) -> Any:
        return self.what(self.conv(x))


def test_outputs() -> None:
    x = torch.ones(1, 3, 8, 8)
    with pytest.raises(InputError, match="returns dict"):
        inspect(Returns(lambda y: {"out": y}), x)
    with pytest.raises(InputError, match="returns tuple"):
        inspect(Returns(lambda y: ("a", y)), x)
    with pytest.raises(InputError, match="one tensor is wanted"):
        inspect(Returns(lambda y: (y, "a")), x)


def test_wrong_requests() -> None:
    x = torch.ones(1, 3, 8, 8)
    with pytest.raises(InputError, match="'mine' calls no layer"):
        inspect(nn.Sequential(nn.ReLU()), x, "mine")
    with pytest.raises(InputError, match="of type function"):
        inspect(lambda x: x, x)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least one sample"):
        inspect(nn.Conv2d(3, 4, 3), x[:0])
    with pytest.raises(InputError, match="'weight' has no shape yet"):
        inspect(nn.LazyConv2d(4, 3), x)
