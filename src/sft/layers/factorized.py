"""A layer whose kernel is held as factors: smaller layers of `torch.nn`, applied in sequence."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sft.core.errors import InputError
from sft.core.geometry import Geometry
from sft.core.kernels import (
    bias_of,
    build_layer,
    compose,
    from_canonical,
    geometry_of,
    to_canonical,
    weight_of,
)
from sft.layers.chains import CHAINS

NAMES = {2: ("first", "second"), 3: ("first", "core", "last")}


class FactorizedSFT(nn.Module):
    """A dense layer of `torch.nn` in two factors, `first` and `second`, or in three, `first`,
    `core` and `last`.

    Only the last factor has a bias, so a zero border stays zero; the strides and paddings stay with
    the taps of their axis, so the output has the size that the dense layer gives. The layer
    computes exactly what its `merge()` computes.

    The default initialisation gives every entry of the product kernel the variance of the dense
    layer's default: all factors but the last keep the variance of their input (entries of variance
    ``1 / fan_in``), the last has the default of `torch.nn` (``1 / (3 fan_in)``; for a transposed
    layer what the product needs), and the bias is drawn as the dense layer's.

    geometry : the dense layer's. rank : one per group, or two for `tucker2`. scheme : a name of
    `CHAINS`. A rank above the kernel's own is allowed; it buys nothing.
    Raises `InputError` for a depthwise layer, a rank below 1, an unknown scheme and a scheme that
    the kernel's extent leaves nothing to split for.
    """

    def __init__(
        self,
        geometry: Geometry,
        rank: int | tuple[int, ...],
        scheme: str,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        refuse_depthwise(geometry)
        self.geometry, self.scheme = geometry, scheme
        self.rank = rank if isinstance(rank, tuple) else (rank,)
        layout = self._layout()
        self.names, self.parts = tuple(layout), tuple(layout.values())
        for name, part in layout.items():
            biased = bias and self._biased(name)
            self.add_module(name, build_layer(part, biased, device, dtype))
        self.reset_parameters()

    def _layout(self) -> dict[str, Geometry]:
        """Name and geometry of each factor, in the order of `factors`."""
        parts = CHAINS[self.scheme](self.geometry, self.rank)
        return dict(zip(NAMES[len(parts)], parts, strict=True))

    def _biased(self, name: str) -> bool:
        """Whether a factor has a bias, where the layer has one: only the last."""
        return name == self.names[-1]

    @property
    def factors(self) -> tuple[nn.Module, ...]:
        """The factors, in the order in which they are applied."""
        return tuple(getattr(self, name) for name in self.names)

    @property
    def bias(self) -> Tensor | None:
        """The bias ``(O,)`` of the last factor, or None."""
        return bias_of(self.factors[-1])

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all factors anew, as the class describes."""
        whole = self.geometry
        for factor, part in zip(self.factors[:-1], self.parts[:-1], strict=True):
            draw(weight_of(factor), 3 / _fan_in(part))
        ratio = whole.outputs / whole.inputs if whole.transposed else 1.0
        draw(weight_of(self.factors[-1]), 1 / (_fan_in(self.parts[-1]) * ratio))
        if self.bias is not None:
            draw(self.bias, default_square(whole))

    def forward(self, input: Tensor) -> Tensor:
        for factor in self.factors:
            input = factor(input)
        return input

    def kernel(self) -> Tensor:
        """The dense canonical kernel ``(G, O/G, I/G, S)``; differentiable, in the layer's dtype.

        Layers of 16 bits are multiplied out in 32 and rounded once.
        """
        product = self._product(self._kernels())
        return product.to(weight_of(self.factors[0]).dtype)

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """The dense layer that computes the same; a copy, sharing no memory with this one."""
        weight, bias = weight_of(self.factors[-1]), self.bias
        dense = build_layer(self.geometry, bias is not None, weight.device, weight.dtype)
        weight_of(dense).copy_(from_canonical(self.kernel(), self.geometry))
        weight_of(dense).requires_grad_(weight.requires_grad)
        merged = bias_of(dense)
        if bias is not None and merged is not None:
            held = bias_of(self.factors[-1])
            merged.copy_(bias).requires_grad_(held is not None and held.requires_grad)
        return dense.train(self.training)

    @torch.no_grad()
    def load_factors(self, kernels: Sequence[Tensor], bias: Tensor | None = None) -> None:
        """Fill the factors from canonical kernels, in the order of `factors`, of any dtype.

        bias : ``(O,)``, or None for zero. Raises `InputError` for another number or shape; the
        layer is untouched then.
        """
        self._check_factors(kernels, bias)
        for factor, part, kernel in zip(self.factors, self.parts, kernels, strict=True):
            weight_of(factor).copy_(from_canonical(kernel, part))
        if self.bias is not None:
            self.bias.copy_(torch.zeros_like(self.bias) if bias is None else bias)

    def _check_factors(self, kernels: Sequence[Tensor], bias: Tensor | None) -> None:
        """Raise `InputError` unless the kernels and the bias have the shapes of the factors."""
        wanted = [(p.groups, *_ends(p), p.taps) for p in self.parts]
        given = [tuple(kernel.shape) for kernel in kernels]
        if given != wanted:
            raise InputError(
                f"{type(self).__name__} ({self.extra_repr()}) holds kernels of shapes {wanted}, "
                f"but {given} were given."
            )
        own = self.bias
        if bias is not None and (own is None or bias.shape != own.shape):
            holds = "no bias" if own is None else f"a bias of {tuple(own.shape)}"
            raise InputError(
                f"{type(self).__name__} ({self.extra_repr()}) has {holds}, but one of "
                f"{tuple(bias.shape)} was given."
            )

    def _product(self, kernels: list[Tensor]) -> Tensor:
        """The dense canonical kernel of the factors' kernels."""
        return compose(kernels, self.parts, self.geometry)

    def _kernels(self) -> list[Tensor]:
        """The factors' canonical kernels, in 32 bits at least."""
        found = []
        for factor, part in zip(self.factors, self.parts, strict=True):
            weight = weight_of(factor)
            weight = weight.float() if weight.element_size() < 4 else weight
            found.append(to_canonical(weight, part))
        return found

    def extra_repr(self) -> str:
        ends = f"{self.geometry.inputs}, {self.geometry.outputs}"
        rank = self.rank[0] if len(self.rank) == 1 else self.rank
        return f"{ends}, rank={rank}, scheme={self.scheme}"


def dense_geometry(kind: type[nn.Module], **arguments: Any) -> Geometry:
    """The geometry of ``kind(**arguments)``, a layer of `torch.nn` that is not built.

    Raises `InputError` where the layer is impossible.
    """
    sizes = ("in_channels", "out_channels", "in_features", "out_features", "groups")
    extents = ("kernel_size", "stride", "dilation")
    usual = {
        "dtype": None,
        "groups": 1,
        "dilation": 1,
        "output_padding": 0,
        "padding_mode": "zeros",
    }
    told = {name: value for name, value in arguments.items() if usual.get(name, "") != value}
    shown = ", ".join(f"{name}={value!r}" for name, value in told.items())
    for name in (*sizes, *extents):
        value = arguments.get(name, 1)
        if any(v < 1 for v in (value if isinstance(value, tuple | list) else (value,))):
            raise InputError(f"nn.{kind.__name__}({shown}): {name} must be at least 1.")
    try:
        return geometry_of(kind(**arguments, device="meta"))
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"nn.{kind.__name__}({shown}) is no possible layer: {error}.") from error


def refuse_depthwise(geometry: Geometry) -> None:
    """Raise `InputError` for a depthwise layer, which has no channels to share factors."""
    if geometry.depthwise:
        raise InputError(
            f"The layer is depthwise: {geometry.inputs} channels in groups={geometry.groups}, one "
            "input to each. There is nothing between its channels to factorise; it should only be "
            "quantised."
        )


def default_square(geometry: Geometry) -> float:
    """Square of the bound within which `torch.nn` draws the weight and the bias of a layer."""
    return 1 / (geometry.weight_shape[1] * geometry.taps)


def draw(tensor: Tensor, square: float) -> None:
    """Fill with uniform numbers between the roots of `square`."""
    bound = math.sqrt(square)
    nn.init.uniform_(tensor, -bound, bound)


def _fan_in(part: Geometry) -> int:
    return part.inputs // part.groups * part.taps


def _ends(part: Geometry) -> tuple[int, int]:
    return part.outputs // part.groups, part.inputs // part.groups
