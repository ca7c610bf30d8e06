"""Conv2dSFT against nn.Conv2d: the same geometry, and the same function as its merged kernel."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sft.core.errors import InputError
from sft.layers import Conv2dSFT

SCHEMES = ("channel_in", "channel_out")
schemes = pytest.mark.parametrize("scheme", SCHEMES)


@st.composite
def geometries(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments that nn.Conv2d takes; inputs of 9 x 8 are large enough for all of them."""
    side = st.integers(1, 3)
    kernel = (draw(side), draw(side))
    stride = draw(st.one_of(side, st.tuples(side, side)))
    dilation = draw(st.one_of(st.integers(1, 2), st.tuples(st.integers(1, 2), st.integers(1, 2))))
    pads = st.integers(0, 2)
    padding = draw(st.one_of(pads, st.tuples(pads, pads), st.sampled_from(["same", "valid"])))
    return {
        "in_channels": draw(st.integers(1, 4)),
        "out_channels": draw(st.integers(1, 5)),
        "kernel_size": draw(st.sampled_from([kernel, kernel[0]])),
        "stride": 1 if padding == "same" else stride,
        "padding": padding,
        "bias": draw(st.booleans()),
        "dilation": dilation,
        "padding_mode": draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    }


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@settings(max_examples=60, deadline=None)
@given(geometries(), st.integers(1, 6), st.sampled_from(SCHEMES))
def test_same_geometry_and_same_function_as_dense(
    geometry: dict[str, Any], rank: int, scheme: str
) -> None:
    torch.manual_seed(0)
    dense = nn.Conv2d(**geometry, dtype=torch.float64)
    layer = Conv2dSFT(**geometry, rank=rank, scheme=scheme, dtype=torch.float64)
    x = torch.randn(2, geometry["in_channels"], 9, 8, dtype=torch.float64)
    y = layer(x)
    assert y.shape == dense(x).shape
    kernel = torch.einsum(
        "orhw,rixy->oihw" if scheme == "channel_in" else "orxy,rihw->oihw",
        layer.second.weight,
        layer.first.weight,
    )
    assert kernel.shape == dense.weight.shape
    dense.weight.data.copy_(kernel)
    if dense.bias is not None and layer.second.bias is not None:
        dense.bias.data.copy_(layer.second.bias)
    torch.testing.assert_close(y, dense(x), rtol=1e-10, atol=1e-10)
    merged = layer.merge()
    torch.testing.assert_close(y, merged(x), rtol=1e-10, atol=1e-10)
    for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode"):
        assert getattr(merged, name) == getattr(dense, name)


@schemes
def test_positional_arguments_are_those_of_the_description(scheme: str) -> None:
    layer = Conv2dSFT(3, 64, 3, 16, 2, 1, False, scheme=scheme)
    assert layer(torch.zeros(1, 3, 32, 32)).shape == (1, 64, 16, 16)
    assert sorted(layer.state_dict()) == ["first.weight", "second.weight"]
    assert layer.first.out_channels == layer.second.in_channels == layer.rank == 16
    assert layer.first.kernel_size == ((1, 1) if scheme == "channel_in" else (3, 3))


@schemes
def test_takes_a_sample_without_batch_axis(scheme: str) -> None:
    layer, x = Conv2dSFT(2, 3, 3, 2, scheme=scheme), torch.randn(2, 5, 6)
    torch.testing.assert_close(layer(x), layer(x[None])[0])


@schemes
def test_state_dict_round_trip(scheme: str) -> None:
    layer = Conv2dSFT(3, 5, 3, 2, padding=1, scheme=scheme)
    other = Conv2dSFT(3, 5, 3, 2, padding=1, scheme=scheme)
    x = torch.randn(1, 3, 6, 6)
    assert not torch.equal(layer(x), other(x))
    assert sorted(layer.state_dict()) == ["first.weight", "second.bias", "second.weight"]
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), other(x))


@schemes
def test_export_keeps_the_function(scheme: str) -> None:
    layer = Conv2dSFT(3, 4, 3, 2, 2, 1, padding_mode="reflect", scheme=scheme).eval()
    x = torch.randn(2, 3, 8, 8)
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x))


@schemes
def test_default_initialisation_has_the_variance_of_dense(scheme: str) -> None:
    torch.manual_seed(1)
    merged = Conv2dSFT(48, 64, 3, 40, scheme=scheme).merge()
    dense = nn.Conv2d(48, 64, 3)
    ratio = merged.weight.square().mean() / dense.weight.square().mean()
    assert 0.9 < ratio < 1.1
    assert merged.bias is not None
    assert dense.bias is not None
    bound = 1 / (48 * 9) ** 0.5
    assert 0.5 * bound < merged.bias.abs().max() <= bound


@schemes
def test_like_copies_geometry_and_leaves_the_random_state(scheme: str) -> None:
    conv = nn.Conv2d(
        3, 6, (3, 2), (2, 1), (1, 2), (1, 2), padding_mode="circular", dtype=torch.float64
    ).eval()
    conv.weight.requires_grad_(False)
    before = torch.get_rng_state()
    layer = Conv2dSFT.like(conv, 4, scheme)
    assert torch.equal(before, torch.get_rng_state())
    assert (layer.rank, layer.scheme, layer.training) == (4, scheme, False)
    x = torch.randn(1, 3, 9, 9, dtype=torch.float64)
    assert conv.bias is not None
    torch.testing.assert_close(layer(x), conv.bias[:, None, None].expand_as(conv(x)))
    assert not layer.first.weight.requires_grad
    assert not layer.second.weight.requires_grad
    assert layer.second.bias is not None
    assert layer.second.bias.requires_grad
    assert layer.second.bias.data_ptr() != conv.bias.data_ptr()
    assert repr(layer.merge()) == repr(conv)


def test_merge_is_a_copy() -> None:
    layer = Conv2dSFT(2, 3, 3, 2).eval()
    merged = layer.merge()
    assert not merged.training
    x = torch.randn(1, 2, 5, 5)
    before = layer(x)
    merged.weight.data.zero_()
    assert merged.bias is not None
    merged.bias.data.zero_()
    assert torch.equal(layer(x), before)


def test_repr_names_rank_and_scheme() -> None:
    assert "rank=2, scheme=channel_out" in repr(Conv2dSFT(3, 4, 1, 2, scheme="channel_out"))


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"groups": 2}, "groups=2"),
        ({"rank": 0}, "rank=0"),
        ({"in_channels": 0}, "in_channels=0"),
        ({"scheme": "tucker9"}, "tucker9"),
        ({"padding": "same", "stride": 2}, "same"),
        ({"padding_mode": "mirror"}, "mirror"),
    ],
)
def test_refusals_name_what_is_wrong(arguments: dict[str, Any], word: str) -> None:
    usual = {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "rank": 2}
    with pytest.raises(InputError, match=word):
        Conv2dSFT(**{**usual, **arguments})


def test_like_refuses_groups() -> None:
    with pytest.raises(InputError, match="groups=2"):
        Conv2dSFT.like(nn.Conv2d(4, 4, 3, groups=2), 2)
