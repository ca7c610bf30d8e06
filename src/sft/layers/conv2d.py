"""A 2-D convolution whose kernel is the product of two smaller convolutions over a rank."""

import math
from typing import Literal, Self

import torch
from torch import Tensor, nn

from sft.core.errors import InputError

CHANNEL_IN = "channel_in"
CHANNEL_OUT = "channel_out"

Size = int | tuple[int, int]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class Conv2dSFT(nn.Module):
    """`nn.Conv2d` in two factors, `first` and `second`, with `rank` channels between them.

    =========== ================================ ================================
    scheme      `first.weight`                   `second.weight`
    =========== ================================ ================================
    channel_in  ``(rank, I, 1, 1)``              ``(O, rank, kh, kw)``, spatial
    channel_out ``(rank, I, kh, kw)``, spatial   ``(O, rank, 1, 1)``
    =========== ================================ ================================

    The spatial factor alone has the stride, padding, dilation and padding mode, so the output has
    the size that `nn.Conv2d` gives. `first` has no bias, so a zero border stays zero.
    Shapes: ``(N, I, H, W) -> (N, O, H', W')``, with or without the batch axis.

    The default initialisation gives every entry of the product kernel the variance of
    `nn.Conv2d`'s default, ``1 / (3 D)`` with ``D = I * kh * kw``: `first` keeps the variance of
    its input (entries of variance ``1 / fan_in``), `second` has the default of `nn.Conv2d`
    (``1 / (3 fan_in)``), and the bias is drawn as the dense layer's, within ``1 / sqrt(D)``.

    Raises `InputError` for groups, a rank below 1, an unknown scheme and any geometry that
    `nn.Conv2d` refuses. A rank above the kernel's own is allowed; it buys nothing.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        rank: int,
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
        super().__init__()
        _check(in_channels, out_channels, rank, groups, scheme)
        pointwise_first = scheme == CHANNEL_IN
        ends = (rank, out_channels) if pointwise_first else (in_channels, rank)
        try:
            spatial = nn.Conv2d(
                *ends,
                kernel_size,
                stride,
                padding,
                dilation,
                bias=bias and pointwise_first,
                padding_mode=padding_mode,
                device=device,
                dtype=dtype,
            )
        except ValueError as error:
            raise InputError(
                f"Conv2dSFT({in_channels}, {out_channels}, kernel_size={kernel_size}, "
                f"stride={stride}, padding={padding!r}, padding_mode={padding_mode!r}) is no "
                f"possible convolution: {error}."
            ) from error
        ends = (in_channels, rank) if pointwise_first else (rank, out_channels)
        pointwise = nn.Conv2d(
            *ends, 1, bias=bias and not pointwise_first, device=device, dtype=dtype
        )
        self.in_channels, self.out_channels = in_channels, out_channels
        self.rank, self.scheme = rank, scheme
        self.first, self.second = (pointwise, spatial) if pointwise_first else (spatial, pointwise)
        self.reset_parameters()

    @classmethod
    def like(cls, conv: nn.Conv2d, rank: int, scheme: str = CHANNEL_IN) -> Self:
        """The factorised layer with the geometry, device, dtype and flags of a dense one.

        The bias is `conv`'s; the factors are zero and wait for a decomposition. The random
        state is not touched.
        """
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            _pair(conv.kernel_size),
            rank,
            _pair(conv.stride),
            conv.padding if isinstance(conv.padding, str) else _pair(conv.padding),
            conv.bias is not None,
            dilation=_pair(conv.dilation),
            groups=conv.groups,
            padding_mode=conv.padding_mode,
            scheme=scheme,
            device="meta",
            dtype=conv.weight.dtype,
        )
        layer.to_empty(device=conv.weight.device).train(conv.training)
        with torch.no_grad():
            for factor in (layer.first, layer.second):
                factor.weight.zero_().requires_grad_(conv.weight.requires_grad)
            if conv.bias is not None and layer.second.bias is not None:
                layer.second.bias.copy_(conv.bias).requires_grad_(conv.bias.requires_grad)
        return layer

    @property
    def spatial(self) -> nn.Conv2d:
        """The factor that has the kernel's extent and geometry."""
        return self.second if self.scheme == CHANNEL_IN else self.first

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw both factors anew, as the class describes."""
        bound = math.sqrt(3 / self.first.weight[0].numel())
        nn.init.uniform_(self.first.weight, -bound, bound)
        self.second.reset_parameters()
        if self.second.bias is not None:
            height, width = self.spatial.kernel_size
            bound = 1 / math.sqrt(self.in_channels * height * width)
            nn.init.uniform_(self.second.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x))
        return y

    @torch.no_grad()
    def merge(self) -> nn.Conv2d:
        """The dense layer that computes the same; a copy, sharing no memory with this one."""
        spatial, bias = self.spatial, self.second.bias
        dense = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            _pair(spatial.kernel_size),
            _pair(spatial.stride),
            spatial.padding if isinstance(spatial.padding, str) else _pair(spatial.padding),
            _pair(spatial.dilation),
            bias=bias is not None,
            padding_mode=spatial.padding_mode,
            device="meta",
            dtype=spatial.weight.dtype,
        )
        dense.to_empty(device=spatial.weight.device).train(self.training)
        equation = "orhw,rixy->oihw" if self.scheme == CHANNEL_IN else "orxy,rihw->oihw"
        dense.weight.copy_(torch.einsum(equation, self.second.weight, self.first.weight))
        if dense.bias is not None and bias is not None:
            dense.bias.copy_(bias)
        return dense

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, rank={self.rank}, scheme={self.scheme}"


def _check(in_channels: int, out_channels: int, rank: int, groups: int, scheme: str) -> None:
    if groups != 1:
        raise InputError(
            f"Conv2dSFT({in_channels}, {out_channels}, groups={groups}): a grouped convolution "
            f"has no kernel over all channels that two plain convolutions could share. Use "
            f"groups=1, or keep the layer dense and only quantise it."
        )
    if min(in_channels, out_channels, rank) < 1:
        raise InputError(
            f"Conv2dSFT(in_channels={in_channels}, out_channels={out_channels}, rank={rank}): "
            f"each must be at least 1."
        )
    if scheme not in (CHANNEL_IN, CHANNEL_OUT):
        raise InputError(
            f"Conv2dSFT has no scheme '{scheme}'. Known: {CHANNEL_IN} (1x1 then kxk), "
            f"{CHANNEL_OUT} (kxk then 1x1)."
        )


def _pair(size: tuple[int, ...]) -> tuple[int, int]:
    height, width = size
    return height, width
