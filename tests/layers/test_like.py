"""The stand-in of a dense layer carries everything over and touches nothing."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from sft.core.errors import InputError
from sft.layers import FactorizedSFT, factorized_like, geometry_of, residual_like

KINDS = {
    "Conv1dSFT": lambda: nn.Conv1d(4, 6, 3, 2),
    "Conv2dSFT": lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 2), (1, 2), padding_mode="circular"),
    "Conv3dSFT": lambda: nn.Conv3d(4, 6, 2, padding="same", padding_mode="replicate", bias=False),
    "ConvTranspose1dSFT": lambda: nn.ConvTranspose1d(4, 6, 3, 2),
    "ConvTranspose2dSFT": lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2, dilation=2),
    "ConvTranspose3dSFT": lambda: nn.ConvTranspose3d(4, 6, 2, bias=False),
    "LinearSFT": lambda: nn.Linear(4, 6),
}


def stand_in(layer: nn.Module, residual: bool) -> FactorizedSFT:
    return residual_like(layer, (2,)) if residual else factorized_like(layer, (2,), "channel_out")


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_everything_is_carried_over_and_the_random_state_left(name: str, residual: bool) -> None:
    dense = KINDS[name]().to(torch.bfloat16).eval()
    dense.weight.requires_grad_(False)
    before = torch.get_rng_state()
    layer = stand_in(dense, residual)
    assert torch.equal(before, torch.get_rng_state())
    assert type(layer).__name__ == ("ResidualSFT" if residual else name)
    assert layer.rank == (2,)
    assert layer.scheme == ("residual" if residual else "channel_out")
    assert layer.geometry == geometry_of(dense)
    assert not any(module.training for module in layer.modules())
    assert all(p.dtype == torch.bfloat16 for p in layer.parameters())
    assert not any(factor.weight.requires_grad for factor in layer.factors)
    assert [factor.bias is None for factor in layer.factors[:-1]] == [True] * (1 + residual)
    assert layer.bias.requires_grad == (dense.bias is not None)
    wanted = torch.zeros_like(layer.bias) if dense.bias is None else dense.bias
    assert torch.equal(layer.bias, wanted)
    assert dense.bias is None or layer.bias.data_ptr() != dense.bias.data_ptr()
    weights = [factor.weight for factor in layer.factors]
    assert not any(weight.any() for weight in weights[residual:])
    if residual:
        assert torch.equal(weights[0], dense.weight)
        assert weights[0].data_ptr() != dense.weight.data_ptr()


def test_gradient_flag_of_the_bias_is_its_own() -> None:
    dense = nn.Linear(3, 4)
    dense.bias.requires_grad_(False)
    layer = factorized_like(dense, (2,), "channel_in")
    assert layer.training
    assert layer.first.weight.requires_grad
    assert not layer.bias.requires_grad


def test_stays_on_the_layer_s_device() -> None:
    layer = factorized_like(nn.Conv2d(2, 3, 3, device="meta"), (2,), "channel_in")
    assert all(p.is_meta for p in layer.parameters())


@pytest.mark.parametrize(
    ("make", "scheme", "word"),
    [
        (lambda: nn.Conv2d(4, 8, 3, groups=4), "channel_in", "only be quantised"),
        (lambda: nn.BatchNorm2d(4), "channel_in", "BatchNorm2d"),
        (lambda: nn.Linear(4, 4), "nosuch", "Known: channel_in"),
    ],
)
def test_refusals(make: Callable[[], nn.Module], scheme: str, word: str) -> None:
    with pytest.raises(InputError, match=word):
        factorized_like(make(), (2,), scheme)
