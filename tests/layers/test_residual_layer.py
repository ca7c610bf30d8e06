"""The dense layer with a low-rank branch."""

import pytest
import torch

from sft.core.errors import InputError
from sft.core.geometry import Geometry
from sft.layers import ResidualSFT

GEOMETRY = Geometry(4, 6, (3, 3), (2, 2), (1, 1), (1, 1), 2)


def test_a_new_layer_is_a_dense_one() -> None:
    torch.manual_seed(0)
    layer = ResidualSFT(GEOMETRY, 2)
    assert sorted(layer.state_dict()) == [
        "dense.weight",
        "first.weight",
        "second.bias",
        "second.weight",
    ]
    x = torch.randn(2, 4, 7, 7)
    bias = layer.second.bias[:, None, None]
    torch.testing.assert_close(layer(x), layer.dense(x) + bias)
    bound = 1 / (2 * 9) ** 0.5
    for tensor in (layer.dense.weight, layer.bias, layer.first.weight):
        assert 0.5 * bound < tensor.abs().max() <= bound


def test_the_branch_is_added() -> None:
    layer = ResidualSFT(GEOMETRY, (2,), bias=False)
    kernels = [torch.randn(2, 3, 2, 9), torch.randn(2, 2, 2, 9), torch.randn(2, 3, 2, 1)]
    layer.load_factors(kernels)
    whole = kernels[0] + torch.einsum("gor,gris->gois", kernels[2][..., 0], kernels[1])
    torch.testing.assert_close(layer.kernel(), whole)
    x = torch.randn(2, 4, 7, 7)
    torch.testing.assert_close(layer(x), layer.merge()(x), rtol=1e-4, atol=1e-5)
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x))


def test_depthwise_and_rank_zero_are_refused() -> None:
    with pytest.raises(InputError, match="quantised"):
        ResidualSFT(Geometry(4, 4, (3,), (1,), (0,), (1,), 4), 1)
    with pytest.raises(InputError, match="at least 1"):
        ResidualSFT(GEOMETRY, 0)
