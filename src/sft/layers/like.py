"""The factorised stand-in of a dense layer: the same geometry, device, dtype and flags."""

from typing import TypeVar

import torch
from torch import nn

from sft.core.kernels import arguments_of, bias_of, geometry_of, weight_of
from sft.layers.conv import Conv1dSFT, Conv2dSFT, Conv3dSFT
from sft.layers.conv_transpose import ConvTranspose1dSFT, ConvTranspose2dSFT, ConvTranspose3dSFT
from sft.layers.factorized import FactorizedSFT
from sft.layers.interpolative import InterpolativeSFT
from sft.layers.linear import LinearSFT
from sft.layers.residual import ResidualSFT

F = TypeVar("F", bound=FactorizedSFT)

CLASSES: dict[tuple[int, bool], type[FactorizedSFT]] = {
    (0, False): LinearSFT,
    (1, False): Conv1dSFT,
    (2, False): Conv2dSFT,
    (3, False): Conv3dSFT,
    (1, True): ConvTranspose1dSFT,
    (2, True): ConvTranspose2dSFT,
    (3, True): ConvTranspose3dSFT,
}


def factorized_like(layer: nn.Module, rank: tuple[int, ...], scheme: str) -> FactorizedSFT:
    """The factorised layer that can stand in for a dense one of `torch.nn`.

    It has the geometry, device, dtype, training and gradient flags of `layer`, and always a bias:
    the layer's, or zero. The factors are zero and wait for a decomposition (`load_factors`). The
    random state and `layer` are untouched. Raises `InputError` for any other module, a depthwise
    layer, an unknown scheme and a rank that does not fit it.
    """
    geometry = geometry_of(layer)
    kind = CLASSES[geometry.axes, geometry.transposed]
    arguments = arguments_of(geometry)
    made = kind(**arguments, rank=rank, scheme=scheme, device="meta", dtype=weight_of(layer).dtype)
    return _fill(made, layer)


def residual_like(layer: nn.Module, rank: tuple[int, ...]) -> ResidualSFT:
    """As `factorized_like`, with the layer's weight in `dense` and an empty branch beside it.

    It computes what `layer` does until other kernels are loaded.
    """
    made = ResidualSFT(geometry_of(layer), rank, device="meta", dtype=weight_of(layer).dtype)
    _fill(made, layer)
    with torch.no_grad():
        weight_of(made.dense).copy_(weight_of(layer))
    return made


def interpolative_like(layer: nn.Module, rank: tuple[int, ...]) -> InterpolativeSFT:
    """As `factorized_like`; which outputs the first factor computes is to be said by `select`.

    That comes before the kernels and the bias are loaded: it moves the outputs.
    """
    made = InterpolativeSFT(geometry_of(layer), rank, device="meta", dtype=weight_of(layer).dtype)
    _fill(made, layer)
    made.select(torch.arange(made.rank[0]).expand(made.geometry.groups, -1))
    own = bias_of(layer)
    if own is not None:
        placed = torch.empty_like(own)
        placed[made.order] = own.detach()
        parts = torch.split(placed, [part.outputs for part in made.parts])
        for factor, values in zip(made.factors, parts, strict=True):
            held = bias_of(factor)
            assert held is not None
            with torch.no_grad():
                held.copy_(values).requires_grad_(own.requires_grad)
    return made


def _fill(made: F, layer: nn.Module) -> F:
    """Zero factors, and the layer's bias, device and flags."""
    weight, bias = weight_of(layer), bias_of(layer)
    made.to_empty(device=weight.device).train(layer.training)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_().requires_grad_(weight.requires_grad)
        last = bias_of(made.factors[-1])
        if bias is not None and last is not None and last.shape == bias.shape:
            last.copy_(bias).requires_grad_(bias.requires_grad)
    return made
