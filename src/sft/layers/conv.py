"""Convolutions of one, two and three axes whose kernel is held as factors."""

from typing import Literal

import torch
from torch import nn

from sft.layers.chains import CHANNEL_IN
from sft.layers.factorized import FactorizedSFT, dense_geometry

Size = int | tuple[int, ...]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class _ConvSFT(FactorizedSFT):
    """The constructor that the convolutions share; it takes what those of `torch.nn` take."""

    dense: type[nn.Module]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        rank: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        bias: bool = True,
        *,
        dilation: Size = 1,
        groups: int = 1,
        padding_mode: PaddingMode = "zeros",
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
            dilation=dilation,
            groups=groups,
            padding_mode=padding_mode,
            dtype=dtype,
        )
        super().__init__(geometry, rank, scheme, bias, device=device, dtype=dtype)
        self.in_channels, self.out_channels = in_channels, out_channels


class Conv1dSFT(_ConvSFT):
    """`nn.Conv1d` in factors: ``(N, I, L) -> (N, O, L')``, with or without the batch axis.

    The schemes are those of `Conv2dSFT`, less `spatial`, which needs two axes.
    """

    dense = nn.Conv1d


class Conv2dSFT(_ConvSFT):
    """`nn.Conv2d` in factors: ``(N, I, H, W) -> (N, O, H', W')``, with or without the batch axis.

    With ``G`` groups and ``r`` channels a group between the factors (`rank`; a pair of ranks for
    `tucker2`), the weights are

    =========== ===================== ======================= =====================
    scheme      `first`               `second` or `core`      `last`
    =========== ===================== ======================= =====================
    channel_in  ``(Gr, I/G, 1, 1)``   ``(O, r, kh, kw)``
    channel_out ``(Gr, I/G, kh, kw)`` ``(O, r, 1, 1)``
    spatial     ``(Gr, I/G, kh, 1)``  ``(O, r, 1, kw)``
    tucker2     ``(Gr, I/G, 1, 1)``   ``(Gs, r, kh, kw)``     ``(O, s, 1, 1)``
    separable   ``(Gr, I/G, 1, 1)``   ``(Gr, 1, kh, kw)``     ``(O, r, 1, 1)``
    =========== ===================== ======================= =====================

    Stride, padding, dilation and padding mode stay with the taps of their axis. Initialisation and
    refusals are those of `FactorizedSFT`; a geometry that `nn.Conv2d` refuses is an `InputError`.
    """

    dense = nn.Conv2d


class Conv3dSFT(_ConvSFT):
    """`nn.Conv3d` in factors: ``(N, I, T, H, W) -> (N, O, T', H', W')``, also without batch axis.

    The schemes are those of `Conv2dSFT`; `spatial` splits the first axis with more than one tap
    from the others.
    """

    dense = nn.Conv3d
