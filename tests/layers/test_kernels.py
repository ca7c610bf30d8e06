"""What `geometry_of` refuses, and what `compose` costs."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sft.core.errors import InputError
from sft.core.geometry import Geometry
from sft.layers import CHAINS, build_layer, compose, geometry_of


class OwnConv(nn.Conv2d):
    """A subclass; its forward may do anything."""


@pytest.mark.parametrize(
    ("layer", "word"),
    [
        (nn.ReLU(), "ReLU"),
        (OwnConv(2, 2, 3), "OwnConv"),
        (nn.Bilinear(2, 2, 2), "Bilinear"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 3)), "remove_parametrizations"),
        (nn.utils.spectral_norm(nn.Linear(2, 2)), "weight_orig"),
    ],
)
def test_other_modules_are_refused_by_name(layer: nn.Module, word: str) -> None:
    with pytest.raises(InputError, match=word):
        geometry_of(layer)


def test_named_padding_becomes_numbers_where_it_can() -> None:
    assert geometry_of(nn.Conv2d(2, 2, 3, padding="valid")).padding == (0, 0)
    same = geometry_of(nn.Conv2d(2, 2, (3, 4), padding="same", dilation=(2, 1)))
    assert same.padding == "same"
    assert same.pads() == ((2, 1), (2, 2))


def test_build_layer_leaves_the_random_state() -> None:
    before = torch.get_rng_state()
    layer = build_layer(Geometry(3, 4), True, dtype=torch.bfloat16)
    assert torch.equal(before, torch.get_rng_state())
    assert layer.weight.dtype == torch.bfloat16
    assert build_layer(Geometry(3, 4), False, "meta").weight.is_meta


def test_composing_a_depthwise_factor_costs_no_square_of_the_rank() -> None:
    whole = Geometry(2, 3, (3, 3), (1, 1), (0, 0), (1, 1))
    rank = 500
    factors = CHAINS["separable"](whole, (rank,))
    kernels = [
        torch.randn(f.groups, f.outputs // f.groups, f.inputs // f.groups, f.taps) for f in factors
    ]
    with FlopCounterMode(display=False) as counter:
        product = compose(kernels, factors, whole)
    wanted = torch.einsum(
        "or,rs,ri->ois", kernels[2][0, :, :, 0], kernels[1][:, 0, 0], kernels[0][0, :, :, 0]
    )
    torch.testing.assert_close(product[0], wanted, rtol=1e-4, atol=1e-3)
    assert counter.get_total_flops() // 2 <= (1 + 3) * rank * 2 * 9


def test_compose_refuses_a_chain_with_other_groups() -> None:
    whole, first = Geometry(4, 4, groups=2), Geometry(4, 2)
    with pytest.raises(InputError, match="groups"):
        compose([torch.ones(1, 2, 4, 1), torch.ones(1, 4, 2, 1)], [first, Geometry(2, 4)], whole)


def test_one_number_in_a_tuple_stands_for_all_axes() -> None:
    layer = nn.Conv2d(2, 2, 3, stride=(2,), padding=(1,), dilation=(2,))
    geometry = geometry_of(layer)
    assert (geometry.stride, geometry.padding, geometry.dilation) == ((2, 2), (1, 1), (2, 2))
    assert geometry.output_size((8, 9)) == layer(torch.zeros(1, 2, 8, 9)).shape[2:]
