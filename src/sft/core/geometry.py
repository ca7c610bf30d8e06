"""The geometry of one convolution-like layer: channels, and per axis kernel, stride and padding.

Pure numbers; nothing here touches a tensor. A linear layer is a convolution without axes. Every
factor of a split layer is itself such a geometry, so what a split costs is the sum over its
factors, whatever the scheme.
"""

import dataclasses
import math
from collections.abc import Collection

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

Sizes = tuple[int, ...]
SAME, VALID = "same", "valid"


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Geometry:
    """Channels, and one entry per axis of everything else; no axes for `nn.Linear`.

    `padding` is the padding of both sides of each axis, or "same". `output_padding` is of
    transposed convolutions only.
    """

    inputs: int
    outputs: int
    kernel: Sizes = ()
    stride: Sizes = ()
    padding: Sizes | str = ()
    dilation: Sizes = ()
    groups: int = 1
    padding_mode: str = "zeros"
    transposed: bool = False
    output_padding: Sizes = ()

    @property
    def axes(self) -> int:
        """How many axes the kernel slides along: 0 for a linear layer."""
        return len(self.kernel)

    @property
    def taps(self) -> int:
        """Weights between one input and one output channel."""
        return math.prod(self.kernel)

    @property
    def pointwise(self) -> bool:
        """Whether the kernel has one tap."""
        return self.taps == 1

    @property
    def depthwise(self) -> bool:
        """Whether every output channel reads one input channel of several."""
        return self.groups > 1 and self.groups == self.inputs

    @property
    def params(self) -> int:
        """Weights, without the bias."""
        return self.outputs * (self.inputs // self.groups) * self.taps

    @property
    def weight_shape(self) -> Sizes:
        """Shape of the weight as `torch.nn` stores it."""
        ends = (self.inputs, self.outputs) if self.transposed else (self.outputs, self.inputs)
        return (ends[0], ends[1] // self.groups, *self.kernel)

    def pads(self) -> tuple[Sizes, Sizes]:
        """Padding before and after each axis, as `torch.nn` pads (an odd one goes to the end)."""
        if self.padding != SAME:
            assert not isinstance(self.padding, str)
            return self.padding, self.padding
        total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True)]
        return tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)

    def output_size(self, size: Sizes) -> Sizes:
        """Lengths of the output's axes for an input whose axes have lengths `size`.

        A linear layer keeps the lengths of whatever axes stand before its channels.
        """
        if not self.axes:
            return size
        before, after = self.pads()
        extra = self.output_padding if self.transposed else (0,) * self.axes
        lengths = []
        for i, length in enumerate(size):
            reach = self.dilation[i] * (self.kernel[i] - 1)
            if self.transposed:
                grown = (length - 1) * self.stride[i] + reach + 1
                lengths.append(grown - before[i] - after[i] + extra[i])
            else:
                lengths.append((length + before[i] + after[i] - reach - 1) // self.stride[i] + 1)
        return tuple(lengths)

    def macs(self, size: Sizes) -> int:
        """Multiply-accumulates of one sample whose axes have lengths `size`."""
        used = size if self.transposed else self.output_size(size)
        return math.prod(used) * self.params

    def factor(
        self, inputs: int, outputs: int, along: Collection[int], groups: int | None = None
    ) -> "Geometry":
        """A factor of this layer: the kernel's extent along the axes `along`, one tap elsewhere.

        Stride, padding, dilation and mode of those axes go with it. A factor along no axis is a
        plain pointwise convolution, also inside a transposed one.
        """
        own = [i in along for i in range(self.axes)]

        def pick(values: Sizes, neutral: int) -> Sizes:
            return tuple(v if mine else neutral for v, mine in zip(values, own, strict=True))

        groups = self.groups if groups is None else groups
        if not any(own):
            ones, none = (1,) * self.axes, (0,) * self.axes
            return Geometry(inputs, outputs, ones, ones, none, ones, groups)
        padding = self.padding if isinstance(self.padding, str) else pick(self.padding, 0)
        return dataclasses.replace(
            self,
            inputs=inputs,
            outputs=outputs,
            kernel=pick(self.kernel, 1),
            stride=pick(self.stride, 1),
            padding=padding,
            dilation=pick(self.dilation, 1),
            groups=groups,
            output_padding=pick(self.output_padding, 0) if self.transposed else (),
        )


def chain_params(factors: Collection[Geometry]) -> int:
    """Weights of factors that follow one another."""
    return sum(factor.params for factor in factors)


def chain_macs(factors: Collection[Geometry], size: Sizes) -> int:
    """Multiply-accumulates of factors that follow one another, for one sample."""
    total = 0
    for factor in factors:
        total += factor.macs(size)
        size = factor.output_size(size)
    return total
