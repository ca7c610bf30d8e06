"""The factorised convolutions and linear layer: published signatures, initialisation, refusals."""

from typing import Any

import pytest
import torch
from torch import nn

from sft.core.errors import InputError
from sft.layers import (
    CHAINS,
    Conv1dSFT,
    Conv2dSFT,
    Conv3dSFT,
    ConvTranspose1dSFT,
    ConvTranspose2dSFT,
    ConvTranspose3dSFT,
    FactorizedSFT,
    LinearSFT,
    to_canonical,
)

SCHEMES = tuple(sorted(CHAINS))
schemes = pytest.mark.parametrize("scheme", SCHEMES)


def rank_of(scheme: str, first: int, second: int) -> int | tuple[int, ...]:
    return (first, second) if scheme == "tucker2" else first


@pytest.mark.parametrize("scheme", ["channel_in", "channel_out"])
def test_positional_arguments_are_those_of_the_description(scheme: str) -> None:
    layer = Conv2dSFT(3, 64, 3, 16, 2, 1, False, scheme=scheme)
    assert layer(torch.zeros(1, 3, 32, 32)).shape == (1, 64, 16, 16)
    assert sorted(layer.state_dict()) == ["first.weight", "second.weight"]
    assert (layer.rank, layer.in_channels, layer.out_channels) == ((16,), 3, 64)
    assert layer.first.out_channels == layer.second.in_channels == 16
    assert layer.first.kernel_size == ((1, 1) if scheme == "channel_in" else (3, 3))


@schemes
def test_padding_and_stride_are_applied_once(scheme: str) -> None:
    layer = Conv2dSFT(2, 3, 3, rank_of(scheme, 2, 2), 2, 1, scheme=scheme)
    assert layer(torch.zeros(1, 2, 9, 9)).shape == (1, 3, 5, 5)
    parts = layer.factors
    for axis in (0, 1):
        assert [p.stride[axis] for p in parts].count(2) == 1
        assert [p.padding[axis] for p in parts].count(1) == 1


def test_kernel_shapes_of_each_scheme() -> None:
    def shapes(scheme: str) -> list[tuple[int, ...]]:
        layer = Conv2dSFT(8, 6, (3, 5), rank_of(scheme, 3, 2), groups=2, scheme=scheme)
        return [tuple(factor.weight.shape) for factor in layer.factors]

    assert shapes("channel_in") == [(6, 4, 1, 1), (6, 3, 3, 5)]
    assert shapes("channel_out") == [(6, 4, 3, 5), (6, 3, 1, 1)]
    assert shapes("spatial") == [(6, 4, 3, 1), (6, 3, 1, 5)]
    assert shapes("tucker2") == [(6, 4, 1, 1), (4, 3, 3, 5), (6, 2, 1, 1)]
    assert shapes("separable") == [(6, 4, 1, 1), (6, 1, 3, 5), (6, 3, 1, 1)]


def test_spatial_of_three_axes_splits_the_first_long_one_from_the_others() -> None:
    layer = Conv3dSFT(4, 6, (1, 3, 2), 5, scheme="spatial")
    extents = [factor.kernel_size for factor in layer.factors]
    assert extents == [(1, 3, 1), (1, 1, 2)]
    assert LinearSFT(5, 7, 2)(torch.zeros(3, 4, 5)).shape == (3, 4, 7)


@schemes
@pytest.mark.parametrize("kind", [Conv2dSFT, ConvTranspose2dSFT])
def test_default_initialisation_has_the_variance_of_dense(
    kind: type[Conv2dSFT], scheme: str
) -> None:
    torch.manual_seed(1)
    layer = kind(48, 96, 3, rank_of(scheme, 40, 44), groups=2, scheme=scheme)
    dense = kind.dense(48, 96, 3, groups=2)
    ratio = layer.merge().weight.square().mean() / dense.weight.square().mean()
    assert 0.85 < ratio < 1.15
    bound = dense.weight.abs().max()
    assert 0.5 * bound < layer.bias.abs().max() <= 1.01 * bound


@pytest.mark.parametrize(
    "make",
    [
        lambda: Conv1dSFT(3, 4, 3, 2, padding=1),
        lambda: Conv2dSFT(3, 4, 3, (2, 2), padding=1, scheme="tucker2"),
        lambda: Conv3dSFT(3, 4, 3, 2, padding=1, scheme="spatial"),
        lambda: ConvTranspose1dSFT(3, 4, 3, 2, 2, 1, 1),
        lambda: ConvTranspose2dSFT(3, 4, 3, 2, 2, 1, 1, scheme="separable"),
        lambda: ConvTranspose3dSFT(3, 4, 3, 2, 2, 1, 1, scheme="channel_out"),
        lambda: LinearSFT(3, 4, 2),
    ],
)
def test_each_class_is_a_plain_module(make: Any) -> None:
    layer, other = make(), make()
    axes = layer.geometry.axes
    x = torch.randn(2, 3, *(4,) * axes)
    assert not torch.equal(layer(x), other(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), other(x))
    torch.testing.assert_close(layer(x[0]), layer(x)[0])
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    rank = layer.rank if len(layer.rank) > 1 else layer.rank[0]
    assert f"3, 4, rank={rank}, scheme={layer.scheme}" in repr(layer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [Conv2dSFT, ConvTranspose2dSFT])
def test_merging_rounds_the_product_once(kind: type[Conv2dSFT], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = kind(4, 6, 3, (3, 4), scheme="tucker2", dtype=dtype)
    merged = layer.merge()
    assert merged.weight.dtype == merged.bias.dtype == layer.kernel().dtype == dtype
    exact = kind(4, 6, 3, (3, 4), scheme="tucker2", dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    torch.testing.assert_close(
        merged.weight.double(), exact.merge().weight, rtol=torch.finfo(dtype).eps, atol=1e-7
    )
    x = torch.randn(1, 4, 6, 6, dtype=dtype)
    assert layer(x).dtype == dtype
    torch.testing.assert_close(layer(x), merged(x), rtol=0.05, atol=0.05)


def test_merge_is_a_copy_with_the_flags() -> None:
    layer = Conv2dSFT(2, 3, 3, 2).eval()
    layer.second.weight.requires_grad_(False)
    merged = layer.merge()
    assert not merged.training
    assert not merged.weight.requires_grad
    assert merged.bias.requires_grad
    x = torch.randn(1, 2, 5, 5)
    before = layer(x)
    merged.weight.data.zero_()
    merged.bias.data.zero_()
    assert torch.equal(layer(x), before)


@schemes
def test_kernel_is_differentiable(scheme: str) -> None:
    layer = Conv2dSFT(2, 4, (2, 3), rank_of(scheme, 2, 1), scheme=scheme, dtype=torch.float64)
    parameters = {k: v.detach().requires_grad_() for k, v in layer.named_parameters()}
    names = [name for name in parameters if name.endswith("weight")]

    def kernel(*weights: torch.Tensor) -> torch.Tensor:
        for name, weight in zip(names, weights, strict=True):
            owner = layer.get_submodule(name.removesuffix(".weight"))
            del owner._parameters["weight"]
            owner._parameters["weight"] = weight
        return layer.kernel()

    assert torch.autograd.gradcheck(kernel, tuple(parameters[name] for name in names))


def test_load_factors_fills_the_factors_in_order() -> None:
    layer = ConvTranspose2dSFT(4, 6, 3, (2, 3), groups=2, scheme="tucker2")
    kernels = [
        torch.randn(2, 2, 2, 1, dtype=torch.float64),
        torch.randn(2, 3, 2, 9, dtype=torch.float64),
        torch.randn(2, 3, 3, 1, dtype=torch.float64),
    ]
    layer.load_factors(kernels, torch.arange(6.0))
    for factor, part, kernel in zip(layer.factors, layer.parts, kernels, strict=True):
        assert torch.equal(to_canonical(factor.weight, part), kernel.float())
    assert torch.equal(layer.bias, torch.arange(6.0))
    whole = torch.einsum("gob,gbas,gai->gois", kernels[2][..., 0], kernels[1], kernels[0][..., 0])
    torch.testing.assert_close(layer.kernel(), whole.float())
    layer.load_factors(kernels)
    assert not layer.bias.any()


def test_load_factors_refuses_other_shapes_and_changes_nothing() -> None:
    layer = Conv2dSFT(4, 6, 3, 2, bias=False)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    right = [torch.ones(1, 2, 4, 1), torch.ones(1, 6, 2, 9)]
    with pytest.raises(InputError, match=r"\(1, 6, 2, 9\)"):
        layer.load_factors([right[0], torch.ones(1, 6, 3, 9)])
    with pytest.raises(InputError, match="no bias"):
        layer.load_factors(right, torch.zeros(6))
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"groups": 4}, "only be quantised"),
        ({"groups": 3}, "groups=3"),
        ({"rank": 0}, "at least 1"),
        ({"rank": 2.0}, "whole"),
        ({"rank": (2, 2)}, "one rank"),
        ({"scheme": "tucker2"}, "2 ranks"),
        ({"scheme": "tucker2", "kernel_size": 1, "rank": (2, 2)}, "one tap"),
        ({"scheme": "separable", "kernel_size": 1}, "one tap"),
        ({"scheme": "spatial", "kernel_size": (3, 1)}, "two axes"),
        ({"in_channels": 0}, "in_channels must be at least 1"),
        ({"kernel_size": (3, 0)}, "kernel_size must be at least 1"),
        ({"stride": 0}, "stride must be at least 1"),
        ({"kernel_size": (3, 3, 3)}, "has 3 numbers"),
        ({"scheme": "tucker9"}, "tucker9"),
        ({"padding": "same", "stride": 2}, "same"),
        ({"padding_mode": "mirror"}, "mirror"),
        ({"dtype": torch.int32}, "int32"),
        ({"kernel_size": (3,)}, "has 1 numbers"),
        ({"padding": (1, 1, 1)}, "padding="),
    ],
)
def test_refusals_name_what_is_wrong(arguments: dict[str, Any], word: str) -> None:
    usual = {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "rank": 2}
    with pytest.raises(InputError, match=word):
        Conv2dSFT(**{**usual, **arguments})


@pytest.mark.parametrize("scheme", ["spatial", "tucker2", "separable"])
def test_linear_has_no_taps_to_split(scheme: str) -> None:
    with pytest.raises(InputError, match="linear"):
        LinearSFT(4, 4, rank_of(scheme, 2, 2), scheme=scheme)


def test_transposed_refuses_other_padding_modes() -> None:
    with pytest.raises(InputError, match="reflect"):
        ConvTranspose2dSFT(2, 2, 3, 1, padding_mode="reflect")


def test_every_kind_is_a_factorised_layer() -> None:
    layer = Conv2dSFT(4, 6, 3, 9)
    assert isinstance(layer, FactorizedSFT)
    assert layer.rank == (9,)
    assert isinstance(layer.merge(), nn.Conv2d)
