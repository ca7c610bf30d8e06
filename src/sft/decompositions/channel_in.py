"""The input-side channel scheme: a 1x1 convolution to r channels, then kxk to all outputs.

This is the order of the published `Conv2dSFT`. With the kernel unfolded as `M` (``O*kh*kw x I``)
and inputs taken as stationary with channel covariance `C`, the best rank-r projection of the input
channels comes from the eigenvectors `V` of ``C^(1/2) M^T M C^(1/2)``:
``first = V_r^T C^(-1/2)``, ``second = M C^(1/2) V_r``. Without statistics `C` is the identity and
this is the truncated SVD of `M`. The bias takes up the mean of what is dropped.
"""

import torch
from torch import nn

from sft.core.records import Target
from sft.core.statistics import Statistics
from sft.decompositions.base import (
    descending_eigh,
    relative_tail,
    shift_bias,
    unsupported_convolution,
)
from sft.layers import Conv2dSFT

REGULARISATION = 1e-6


class ChannelIn:
    """1x1 ``I -> r``, then kxk ``r -> O`` (stride, padding, dilation of the original)."""

    name = "channel_in"

    def unsupported(self, layer: nn.Module) -> str | None:
        return unsupported_convolution(layer)

    def full_rank(self, weight_shape: tuple[int, ...]) -> int:
        return min(weight_shape[1], weight_shape[0] * weight_shape[2] * weight_shape[3])

    def params(self, weight_shape: tuple[int, ...], rank: int) -> int:
        outputs, inputs, height, width = weight_shape
        return rank * (inputs + outputs * height * width)

    def macs(
        self, weight_shape: tuple[int, ...], rank: int, input_pixels: int, output_pixels: int
    ) -> int:
        outputs, inputs, height, width = weight_shape
        return rank * (inputs * input_pixels + outputs * height * width * output_pixels)

    def lane(self, target: Target) -> int:
        return target.lane

    def errors(self, weight: torch.Tensor, statistics: Statistics | None) -> torch.Tensor:
        energy, _, _, _ = self._basis(weight, statistics)
        return relative_tail(energy)[: self.full_rank(tuple(weight.shape))]

    def build(self, layer: nn.Module, rank: int, statistics: Statistics | None) -> nn.Module:
        assert isinstance(layer, nn.Conv2d)
        weight = layer.weight.detach()
        _, vectors, root, inverse_root = self._basis(weight, statistics)
        outputs, inputs, height, width = weight.shape
        matrix = _unfold(weight)
        kept = vectors[:, :rank]
        first = kept.T @ inverse_root
        second = matrix @ (root @ kept)
        balance = (second.square().mean() / first.square().mean()).sqrt().sqrt()
        balance = balance if balance > 0 else torch.ones_like(balance)
        first, second = first * balance, second / balance
        small = Conv2dSFT.like(layer, rank, self.name)
        kernel = second.reshape(outputs, height, width, rank).permute(0, 3, 1, 2)
        small.first.weight.data.copy_(first.reshape(small.first.weight.shape))
        small.second.weight.data.copy_(kernel)
        lost = None
        if statistics is not None:
            product = (second @ first).reshape(outputs, height, width, inputs)
            missing = weight.double().cpu() - product.permute(0, 3, 1, 2)
            lost = missing.flatten(1) @ statistics.patch_mean
        shift_bias(small.second, layer.bias, lost)
        return small

    def _basis(
        self, weight: torch.Tensor, statistics: Statistics | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Energies and eigenvectors of the whitened kernel, C^(1/2) and C^(-1/2)."""
        matrix = _unfold(weight)
        inputs = matrix.shape[1]
        identity = torch.eye(inputs, dtype=torch.float64)
        root = inverse_root = identity
        if statistics is not None:
            covariance = statistics.input_covariance
            floor = REGULARISATION * covariance.diagonal().mean() + 1e-30
            values, vectors = descending_eigh(covariance + floor * identity)
            values = values.clamp_min(float(floor))
            root = (vectors * values.sqrt()) @ vectors.T
            inverse_root = (vectors / values.sqrt()) @ vectors.T
        energy, basis = descending_eigh(root @ (matrix.T @ matrix) @ root)
        return energy, basis, root, inverse_root


def _unfold(weight: torch.Tensor) -> torch.Tensor:
    """Kernel ``(O, I, kh, kw)`` to the matrix ``(O*kh*kw, I)`` in float64."""
    return weight.detach().double().cpu().permute(0, 2, 3, 1).reshape(-1, weight.shape[1])
