"""Rounding that gradients pass through: what stands in the graph until the integers are final.

Both modules speak torchao's PT2E protocol (`FakeQuantizeBase`), so `convert_pt2e` turns exactly
their scales and zero points into the integers of the file.
"""

from typing import Any

import torch

from sft.quantizers.linear import affine_parameters, symmetric_scale
from sft.quantizers.pt2e import FakeQuantizeBase


class ActivationFakeQuantize(FakeQuantizeBase):  # type: ignore[misc]
    """Affine per-tensor rounding of an activation; the range is observed, then frozen.

    While `observing`, the range grows to cover every value seen.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        quant_min: int,
        quant_max: int,
        qscheme: torch.qscheme = torch.per_tensor_affine,
        is_dynamic: bool = False,
        **_: Any,
    ) -> None:
        super().__init__()
        self.dtype, self.qscheme, self.is_dynamic = dtype, qscheme, is_dynamic
        self.quant_min, self.quant_max = quant_min, quant_max
        self.observing = True
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        self.low: torch.Tensor
        self.high: torch.Tensor

    def calculate_qparams(self, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point, each of shape ``(1,)``."""
        scale, zero = affine_parameters(self.low, self.high, self.quant_min, self.quant_max)
        return scale.reshape(1), zero.reshape(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.observing:
            low, high = x.detach().aminmax()
            self.low = torch.minimum(self.low, low)
            self.high = torch.maximum(self.high, high)
        scale, zero = self.calculate_qparams()
        return torch.fake_quantize_per_tensor_affine(
            x, scale, zero.to(torch.int32), self.quant_min, self.quant_max
        )


class WeightPerChannelFakeQuantize(FakeQuantizeBase):  # type: ignore[misc]
    """Symmetric rounding of a weight with one scale for each index of axis `ch_axis`.

    The scales follow the weight's greatest magnitudes until they are frozen (`freeze`).
    """

    def __init__(
        self,
        dtype: torch.dtype,
        quant_min: int,
        quant_max: int,
        ch_axis: int = 0,
        qscheme: torch.qscheme = torch.per_channel_symmetric,
        is_dynamic: bool = False,
        **_: Any,
    ) -> None:
        super().__init__()
        self.dtype, self.qscheme, self.is_dynamic = dtype, qscheme, is_dynamic
        self.quant_min, self.quant_max, self.ch_axis = quant_min, quant_max, ch_axis
        self.frozen = False
        self.register_buffer("scale", torch.ones(1))
        self.scale: torch.Tensor

    def freeze(self, scale: torch.Tensor) -> None:
        """Use these scales ``(channels,)`` from now on."""
        self.scale, self.frozen = scale.detach().clone(), True

    def calculate_qparams(self, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales and zero points (all 0), each of shape ``(channels,)``."""
        return self.scale, torch.zeros_like(self.scale, dtype=torch.int64)

    def integers(self, weight: torch.Tensor) -> torch.Tensor:
        """The integers that the file holds for this weight, of its shape."""
        shape = [1] * weight.ndim
        shape[self.ch_axis] = -1
        # multiplied by the inverse, as torch's fake quantisation and torchao's conversion do
        rounded = torch.round(weight * (1.0 / self.scale).reshape(shape))
        return rounded.clamp(self.quant_min, self.quant_max).to(self.dtype)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        if not self.frozen:
            self.scale = symmetric_scale(weight.detach(), self.quant_max, self.ch_axis)
        zero = torch.zeros_like(self.scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(
            weight, self.scale, zero, self.ch_axis, self.quant_min, self.quant_max
        )
