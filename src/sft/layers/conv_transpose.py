"""Transposed convolutions of one, two and three axes whose kernel is held as factors."""

import torch
from torch import nn

from sft.layers.chains import CHANNEL_IN
from sft.layers.conv import Size
from sft.layers.factorized import FactorizedSFT, dense_geometry


class _ConvTransposeSFT(FactorizedSFT):
    """The constructor that the transposed convolutions share."""

    dense: type[nn.Module]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        rank: Size,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        bias: bool = True,
        *,
        dilation: Size = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
        scheme: str = CHANNEL_IN,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        geometry = dense_geometry(
            self.dense,
            in_channels=in_channels,
            out_channels=out_channels,
            kernel_size=kernel_size,
            stride=stride,
            padding=padding,
            output_padding=output_padding,
            dilation=dilation,
            groups=groups,
            padding_mode=padding_mode,
            dtype=dtype,
        )
        super().__init__(geometry, rank, scheme, bias, device=device, dtype=dtype)
        self.in_channels, self.out_channels = in_channels, out_channels


class ConvTranspose1dSFT(_ConvTransposeSFT):
    """`nn.ConvTranspose1d` in factors: ``(N, I, L) -> (N, O, L')``, also without batch axis.

    The factors along no axis are plain pointwise convolutions, the others transposed ones. The
    schemes are those of `Conv2dSFT`, less `spatial`. The output's size is the geometry's own: there
    is no `output_size` argument.
    """

    dense = nn.ConvTranspose1d


class ConvTranspose2dSFT(_ConvTransposeSFT):
    """`nn.ConvTranspose2d` in factors: ``(N, I, H, W) -> (N, O, H', W')``, also without batch axis.

    As `ConvTranspose1dSFT`, with all schemes of `Conv2dSFT`.
    """

    dense = nn.ConvTranspose2d


class ConvTranspose3dSFT(_ConvTransposeSFT):
    """`nn.ConvTranspose3d` in factors: ``(N, I, T, H, W) -> (N, O, T', H', W')``.

    As `ConvTranspose1dSFT`, with all schemes of `Conv3dSFT`.
    """

    dense = nn.ConvTranspose3d
