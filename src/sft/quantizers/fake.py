"""Rounding that gradients pass through: what stands in the graph until the integers are final.

Both modules speak torchao's PT2E protocol (`FakeQuantizeBase`), so `convert_pt2e` turns exactly
their scales and zero points into the integers of the file.
"""

import enum
import math
from typing import Any

import torch
from torch import nn

from sft.quantizers.grid import mend_pairs
from sft.quantizers.histogram import Histogram
from sft.quantizers.learned_step import round_with_step
from sft.quantizers.linear import affine_parameters, symmetric_scale
from sft.quantizers.pt2e import FakeQuantizeBase

VALUES = 2**11  # of a sample that enter a histogram, at least


class Mode(enum.Enum):
    """What a rounding does with what passes."""

    PASS = "pass"  # nothing
    OBSERVE = "observe"  # nothing, but its histogram is kept
    ROUND = "round"


class ActivationFakeQuantize(FakeQuantizeBase):  # type: ignore[misc]
    """Affine per-tensor rounding of an activation; what passes is observed, then rounded.

    The scale, of shape ``(1,)``, can be made a parameter that training moves (`learn`); the zero
    point is a whole number and stays, so that zero stays exact.
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
        self.mode = Mode.OBSERVE
        self.histogram: Histogram | None = None
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("zero_point", torch.zeros(1, dtype=torch.int64))
        self.scale: torch.Tensor
        self.zero_point: torch.Tensor

    def set_range(self, low: torch.Tensor, high: torch.Tensor) -> None:
        """Round onto the grid that covers ``[low, high]`` (scalars, or of one element)."""
        scale, zero = affine_parameters(low, high, self.quant_min, self.quant_max)
        device = self.scale.device
        self.scale.data = scale.detach().float().reshape(1).to(device)
        self.zero_point = zero.reshape(1).to(device)

    def limits(self) -> tuple[float, float]:
        """The least and the greatest value that the integers can stand for."""
        scale, zero = float(self.scale.detach()), int(self.zero_point)
        return (self.quant_min - zero) * scale, (self.quant_max - zero) * scale

    def learn(self) -> nn.Parameter:
        """Make the scale a parameter and return it."""
        return _as_parameter(self)

    def calculate_qparams(self, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point, each of shape ``(1,)``."""
        return self.scale.detach(), self.zero_point

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.mode is Mode.OBSERVE:
            self.histogram = self.histogram or Histogram()
            self.histogram.add(thinned(x.detach()))
        if self.mode is not Mode.ROUND:
            return x
        low, high = self.quant_min - int(self.zero_point), self.quant_max - int(self.zero_point)
        if isinstance(self.scale, nn.Parameter):
            return round_with_step(x, self.scale, low, high)
        zero = self.zero_point.to(torch.int32)
        return torch.fake_quantize_per_tensor_affine(
            x, self.scale, zero, self.quant_min, self.quant_max
        )


class WeightFakeQuantize(FakeQuantizeBase):  # type: ignore[misc]
    """Symmetric rounding of a weight with one scale for each index of axis `ch_axis`.

    The scales follow the weight's greatest magnitudes until they are frozen (`freeze`) or learned
    (`learn`). Integers that the target's kernel would add up beyond its 16 bits are mended
    (`pair_sum`; see `grid.Grid`).
    """

    def __init__(
        self,
        dtype: torch.dtype,
        quant_min: int,
        quant_max: int,
        ch_axis: int = 0,
        qscheme: torch.qscheme = torch.per_channel_symmetric,
        is_dynamic: bool = False,
        pair_sum: int | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.dtype, self.qscheme, self.is_dynamic = dtype, qscheme, is_dynamic
        self.quant_min, self.quant_max, self.ch_axis = quant_min, quant_max, ch_axis
        self.pair_sum = pair_sum if pair_sum is not None and 2 * quant_max > pair_sum else None
        self.mode = Mode.ROUND
        self.frozen = False
        self.register_buffer("scale", torch.ones(1))
        self.scale: torch.Tensor

    @property
    def bits(self) -> int:
        """In how many bits the integers can be stored."""
        return (2 * self.quant_max).bit_length()

    def freeze(self, scale: torch.Tensor) -> None:
        """Use these scales ``(channels,)`` from now on."""
        if isinstance(self.scale, nn.Parameter):
            self.scale.data = scale.detach().clone()
        else:
            self.scale = scale.detach().clone()
        self.frozen = True

    def learn(self) -> nn.Parameter:
        """Make the scales a parameter and return it."""
        self.frozen = True
        return _as_parameter(self)

    def calculate_qparams(self, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales and zero points (all 0), each of shape ``(channels,)``."""
        scale = self.scale.detach()
        return scale, torch.zeros_like(scale, dtype=torch.int64)

    def integers(self, weight: torch.Tensor) -> torch.Tensor:
        """The integers that the file holds for this weight, of its shape."""
        # multiplied by the inverse, as torch's fake quantisation and torchao's conversion do
        wanted = weight.detach() * (1.0 / self.scale.detach()).reshape(self._shape(weight))
        rounded = torch.round(wanted).clamp(self.quant_min, self.quant_max).to(self.dtype)
        if self.pair_sum is None:
            return rounded
        mended = mend_pairs(in_kernel_order(rounded), self.pair_sum, in_kernel_order(wanted))
        return from_kernel_order(mended, rounded)

    def on_grid(self, weight: torch.Tensor) -> torch.Tensor:
        """The values that the integers stand for, of the weight's shape."""
        return self.integers(weight).to(weight.dtype) * self.scale.detach().reshape(
            self._shape(weight)
        )

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        if not self.frozen:
            self.scale = symmetric_scale(weight.detach(), self.quant_max, self.ch_axis)
        if self.mode is not Mode.ROUND:
            return weight
        rounded = round_with_step(weight, self.scale, self.quant_min, self.quant_max, self.ch_axis)
        if self.pair_sum is None:
            return rounded
        return rounded + (self.on_grid(weight) - rounded).detach()

    def _shape(self, weight: torch.Tensor) -> list[int]:
        shape = [1] * weight.ndim
        shape[self.ch_axis] = -1
        return shape


def thinned(x: torch.Tensor) -> torch.Tensor:
    """Every so many values of each large sample ``x[n]``, and its least and greatest, for a
    histogram.

    They are taken in the order in which they lie in memory, so that nothing is copied; the step
    shares no factor with the number of values, so that it meets every channel. What is taken of a
    sample does not depend on the others, so slices of a batch give together what it gives.
    """
    if x.ndim < 2:
        return x.flatten()
    strides = x.stride()
    order = sorted(range(1, x.ndim), key=lambda axis: -strides[axis])
    rows = x.permute(0, *order).flatten(1)
    count = rows.shape[1]
    stride = count // VALUES
    if stride < 2:
        return rows.flatten()
    while math.gcd(stride, count) > 1:
        stride -= 1
    ends = torch.aminmax(rows, dim=1)
    return torch.cat([rows[:, ::stride].flatten(), *ends])


def in_kernel_order(weight: torch.Tensor) -> torch.Tensor:
    """``(O, I, *kernel)`` to rows ``(O, taps * I)``, tap by tap, as integer kernels read them."""
    return weight.flatten(2).transpose(1, 2).flatten(1) if weight.ndim > 2 else weight


def from_kernel_order(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The way back from `in_kernel_order` to the shape of `like`."""
    if like.ndim <= 2:
        return rows
    taps = like.flatten(2).shape[2]
    return rows.view(len(rows), taps, -1).transpose(1, 2).reshape(like.shape)


def _as_parameter(module: FakeQuantizeBase) -> nn.Parameter:
    if not isinstance(module.scale, nn.Parameter):
        scale = module._buffers.pop("scale")
        module.register_parameter("scale", nn.Parameter(scale.detach().clone()))
    parameter = module.scale
    assert isinstance(parameter, nn.Parameter)
    return parameter
