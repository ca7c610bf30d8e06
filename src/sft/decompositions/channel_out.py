"""The output-side channel scheme: a kxk convolution to r channels, then 1x1 to all outputs.

Data-aware form (Zhang et al. 2015): the best rank-r subspace of the *outputs* is spanned by the
first r eigenvectors `U` of their centred covariance, so `first = U^T W`, `second = U`, and the
bias takes up the mean of what is dropped. The error at every rank is the sum of the dropped
eigenvalues. Without statistics it is the truncated SVD of `W` as an ``O x I*kh*kw`` matrix.
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


class ChannelOut:
    """kxk ``I -> r`` (stride, padding, dilation of the original), then 1x1 ``r -> O``."""

    name = "channel_out"

    def unsupported(self, layer: nn.Module) -> str | None:
        return unsupported_convolution(layer)

    def full_rank(self, weight_shape: tuple[int, ...]) -> int:
        return min(weight_shape[0], weight_shape[1] * weight_shape[2] * weight_shape[3])

    def params(self, weight_shape: tuple[int, ...], rank: int) -> int:
        outputs, inputs, height, width = weight_shape
        return rank * (inputs * height * width + outputs)

    def macs(
        self, weight_shape: tuple[int, ...], rank: int, input_pixels: int, output_pixels: int
    ) -> int:
        return self.params(weight_shape, rank) * output_pixels

    def lane(self, target: Target) -> int:
        return target.output_lane

    def errors(self, weight: torch.Tensor, statistics: Statistics | None) -> torch.Tensor:
        energy, _ = self._basis(weight, statistics)
        return relative_tail(energy)[: self.full_rank(tuple(weight.shape))]

    def build(self, layer: nn.Module, rank: int, statistics: Statistics | None) -> nn.Module:
        assert isinstance(layer, nn.Conv2d)
        weight = layer.weight.detach()
        _, basis = self._basis(weight, statistics)
        kept = basis[:, :rank]
        matrix = weight.double().cpu().flatten(1)
        small = Conv2dSFT.like(layer, rank, self.name)
        small.first.weight.data.copy_((kept.T @ matrix).reshape(small.first.weight.shape))
        small.second.weight.data.copy_(kept.reshape(small.second.weight.shape))
        lost = None
        if statistics is not None:
            mean = matrix @ statistics.patch_mean
            lost = mean - kept @ (kept.T @ mean)
        shift_bias(small.second, layer.bias, lost)
        return small

    def _basis(
        self, weight: torch.Tensor, statistics: Statistics | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if statistics is not None:
            return descending_eigh(statistics.output_covariance)
        matrix = weight.detach().double().cpu().flatten(1)
        return descending_eigh(matrix @ matrix.T)
