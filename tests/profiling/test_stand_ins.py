"""A layer as an option would leave it: split, rounded, reading integers."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sft.core.copies import copy_module
from sft.core.records import DENSE, KEEP, STORED, Option
from sft.layers import FactorizedSFT
from sft.layers.opened import open_recurrent
from sft.profiling import stand_ins as room
from sft.profiling.stand_ins import Integers, stand_in
from sft.runtimes.targets import find_target

TARGET = find_target("onnxruntime-avx2")
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv": (lambda: nn.Conv2d(4, 8, 3, padding=1), (4, 9, 9)),
    "strided": (lambda: nn.Conv2d(3, 8, (3, 5), (2, 1), (1, 2), bias=False), (3, 9, 8)),
    "dilated": (lambda: nn.Conv2d(4, 6, 3, dilation=2, padding="same"), (4, 9, 9)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8), (8, 9, 9)),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=2), (8, 9, 9)),
    "sequence": (lambda: nn.Conv1d(4, 8, 5, padding=2), (4, 30)),
    "volume": (lambda: nn.Conv3d(2, 4, 3, padding=1), (2, 5, 5, 5)),
    "pointwise": (lambda: nn.Conv2d(8, 6, 1), (8, 7, 7)),
    "linear": (lambda: nn.Linear(16, 6), (16,)),
    "tokens": (lambda: nn.Linear(16, 6, bias=False), (9, 16)),
}


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(5)
        yield


def made(kind: str, samples: int = 96) -> tuple[nn.Module, list[Tensor]]:
    """A layer, and smooth positive inputs whose neighbouring numbers go together."""
    build, shape = LAYERS[kind]
    x = torch.randn(samples, *shape).cumsum(-1)
    x = functional.relu(x + 0.3 * torch.randn(samples, *([1] * len(shape))))
    return build().eval(), list(x.split(40))


def error(small: nn.Module, layer: nn.Module, inputs: list[Tensor]) -> float:
    """Squared output error, over the variance of each output channel."""
    axis = -1 if isinstance(layer, nn.Linear) else 1
    y = torch.cat([layer(x) for x in inputs]).movedim(axis, 0).flatten(1)
    z = torch.cat([small(x) for x in inputs]).movedim(axis, 0).flatten(1)
    return float((y - z).square().sum() / (y - y.mean(1, keepdim=True)).square().sum())


@pytest.mark.parametrize("kind", LAYERS)
def test_kept_it_computes_the_same(kind: str) -> None:
    layer, inputs = made(kind)
    small = stand_in(layer, Option(KEEP), inputs, None, TARGET)
    assert small is not layer
    assert all(torch.equal(small(x), layer(x)) for x in inputs)


@pytest.mark.parametrize(
    ("kind", "scheme", "rank"),
    [
        ("conv", "channel_in", (4,)), ("conv", "channel_out", (8,)), ("strided", "spatial", (9,)),
        ("dilated", "channel_out", (6,)), ("grouped", "channel_out", (6,)),
        ("sequence", "channel_in", (4,)), ("linear", "channel_out", (6,)),
        ("conv", "tucker2", (4, 8)), ("conv", "interpolative", (8,)),
    ],
)  # fmt: skip
def test_in_float_at_full_rank_it_computes_the_same(kind, scheme, rank) -> None:
    layer, inputs = made(kind)
    small = stand_in(layer, Option(scheme, rank, None), inputs, None, TARGET)
    assert type(small) is not type(layer)
    for x in inputs:
        torch.testing.assert_close(small(x), layer(x), rtol=1e-4, atol=1e-4)
    nothing = stand_in(layer, Option(scheme, rank, None), [], None, TARGET)
    assert torch.equal(nothing(inputs[0]), small(inputs[0]))


@pytest.mark.parametrize("scheme", [DENSE, STORED])
@pytest.mark.parametrize("kind", LAYERS)
def test_8_bits_are_close_and_fewer_are_further(kind: str, scheme: str) -> None:
    layer, inputs = made(kind)
    errors = [
        error(stand_in(layer, Option(scheme, (), b), inputs, None, TARGET), layer, inputs)
        for b in (8, 4, 2)
    ]
    assert 0 < errors[0] < 1e-3
    assert errors[0] < errors[1] < errors[2] < 1


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("kind", LAYERS)
def test_few_bits_are_rounded_for_the_outputs(kind: str, bits: int, monkeypatch) -> None:
    layer, inputs = made(kind)
    option = Option(STORED, (), bits)
    metric = error(stand_in(layer, option, inputs, None, TARGET), layer, inputs)
    monkeypatch.setattr(room, "COARSE", 1)
    nearest = error(stand_in(layer, option, inputs, None, TARGET), layer, inputs)
    assert metric <= nearest * (1 + 1e-6)
    if kind not in ("depthwise", "pointwise"):
        assert metric < 0.9 * nearest


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_weights_take_a_few_steps_of_one_scale_a_channel(kind: str, bits: int) -> None:
    layer, inputs = made(kind)
    small = stand_in(layer, Option(STORED, (), bits), inputs, None, TARGET)
    assert small.weight.shape == layer.weight.shape
    for row in small.weight.flatten(1):
        values = row.abs().unique()
        steps = values[values > 1e-9]
        assert len(steps) <= 2 ** (bits - 1) - 1
        multiples = steps / steps.diff(prepend=steps.new_zeros(1)).min()
        if bits < 8:
            torch.testing.assert_close(multiples, multiples.round(), rtol=0, atol=1e-2)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_bias_takes_up_the_mean_of_what_is_lost(kind: str) -> None:
    layer, inputs = made(kind, samples=24)  # few enough that every position is read
    small = stand_in(layer, Option(STORED, (), 2), inputs, None, TARGET)
    axis = -1 if isinstance(layer, nn.Linear) else 1
    lost = torch.cat([small(x) - layer(x) for x in inputs]).movedim(axis, 0).flatten(1)
    spread = lost.std(1)
    if layer.bias is None:
        assert float((lost.mean(1).abs() / spread).max()) > 0.02
    else:
        assert float((lost.mean(1).abs() / spread).max()) < 1e-3


def test_integers_round_what_is_read_to_the_targets_steps() -> None:
    layer, inputs = made("conv")
    small = stand_in(layer, Option(DENSE, (), 8), inputs, None, TARGET)
    stored = stand_in(layer, Option(STORED, (), 8), inputs, None, TARGET)
    assert isinstance(small, Integers)
    assert type(stored) is nn.Conv2d
    assert torch.equal(small.module.weight, stored.weight)
    seen: list[Tensor] = []
    small.module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for x in inputs:
        small(x)
    steps = torch.cat(seen) / small.scale
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
    assert 16 < len(steps.round().unique()) <= TARGET.layout.activation_max + 1
    every = torch.cat(inputs)
    most = (TARGET.layout.activation_max - small.zero) * small.scale
    inner = every[every < most]
    rounded = torch.cat(seen)[every < most]
    assert float((inner - rounded).abs().max()) <= 0.5001 * small.scale
    assert error(small, layer, inputs) > error(stored, layer, inputs)


def test_without_inputs_weights_are_rounded_to_nearest_and_nothing_else() -> None:
    layer, _ = made("conv")
    small = stand_in(layer, Option(DENSE, (), 4), [], None, TARGET)
    assert type(small) is nn.Conv2d
    top = layer.weight.abs().amax((1, 2, 3), keepdim=True)
    want = torch.round(layer.weight / top * 7) * top / 7
    torch.testing.assert_close(small.weight, want)
    assert torch.equal(small.bias, layer.bias)


@pytest.mark.parametrize("kind", [nn.ConvTranspose1d, nn.ConvTranspose2d])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_transposed_convolution_has_a_scale_for_each_output(kind, bits) -> None:
    layer = kind(6, 5, 3, 2).eval()
    layer.weight *= torch.logspace(-2, 2, 5).reshape(1, 5, *([1] * (layer.weight.ndim - 2)))
    inputs = [torch.rand(20, 6, *([7] * (layer.weight.ndim - 2)))]
    small = stand_in(layer, Option(STORED, (), bits), inputs, None, TARGET)
    kept = (small.weight - layer.weight).movedim(1, 0).flatten(1).norm(dim=1)
    relative = kept / layer.weight.movedim(1, 0).flatten(1).norm(dim=1)
    assert float(relative.max()) < {8: 0.01, 4: 0.2, 2: 0.8}[bits]
    for row in small.weight.movedim(1, 0).flatten(1):
        assert len(row.abs().unique()) <= 2 ** (bits - 1)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_the_linear_maps_of_an_opened_recurrent_module(kind) -> None:
    opened = open_recurrent(kind(6, 8, batch_first=True).eval())
    maps = {n: m for n, m in opened.named_modules() if isinstance(m, nn.Linear)}
    assert len(maps) == 2
    for module in maps.values():
        read = [torch.randn(80, 5, module.in_features).cumsum(1)]
        for option in (Option(DENSE, (), 8), Option("channel_out", (6,), 8)):
            small = stand_in(module, option, read, None, TARGET)
            assert small(read[0]).shape == module(read[0]).shape
        eight = stand_in(module, Option(DENSE, (), 8), read, None, TARGET)
        assert error(eight, module, read) < 1e-3


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("kind", ["conv", "grouped", "linear", "sequence"])
def test_wanted_outputs_are_aimed_at_behind_other_inputs(kind: str, bits: int) -> None:
    layer, inputs = made(kind, samples=400)
    wanted = [layer(x) for x in inputs]
    worse = [x.round() * 0.7 + 0.2 for x in inputs]
    option = Option(STORED, (), bits)
    blind, aiming = (
        stand_in(layer, option, worse, None, TARGET, wanted=aim) for aim in (None, wanted)
    )
    distances = [
        float(sum((m(x) - y).square().sum() for x, y in zip(worse, wanted, strict=True)))
        for m in (blind, aiming)
    ]
    assert distances[1] < 0.8 * distances[0]


@pytest.mark.parametrize("bits", [4, 2])
def test_the_last_factor_makes_up_for_the_first(bits: int, monkeypatch) -> None:
    layer, inputs = made("conv", samples=200)
    option = Option("channel_in", (4,), bits)
    solved = stand_in(layer, option, inputs, None, TARGET)
    monkeypatch.setattr(room, "_solve_again", lambda *_: None)
    alone = stand_in(layer, option, inputs, None, TARGET)
    assert error(solved, layer, inputs) < error(alone, layer, inputs)
    assert isinstance(solved.module, FactorizedSFT)
    for factor in solved.module.factors:
        for row in factor.weight.flatten(1):
            assert len(row.abs().unique()) <= 2 ** (bits - 1)


@pytest.mark.parametrize("option", [Option(DENSE, (), 2), Option("channel_in", (4,), 4)])
def test_the_layer_its_inputs_and_what_is_wanted_are_not_changed(option: Option) -> None:
    layer, inputs = made("conv")
    wanted = [layer(x) for x in inputs]
    state = copy_module(layer).state_dict()
    before = [x.clone() for x in (*inputs, *wanted)]
    first = stand_in(layer, option, inputs, None, TARGET, wanted=wanted)
    assert all(torch.equal(v, state[k]) for k, v in layer.state_dict().items())
    assert all(torch.equal(x, y) for x, y in zip((*inputs, *wanted), before, strict=True))
    again = stand_in(layer, option, inputs, None, TARGET, wanted=wanted)
    assert torch.equal(first(inputs[0]), again(inputs[0]))
