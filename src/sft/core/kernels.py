"""Kernels of dense layers: from a layer to its geometry and back, one form for all, their product.

The *canonical kernel* of a layer is a tensor ``(G, O/G, I/G, S)``: groups, outputs and inputs of
one group, and the ``S`` taps of the kernel flattened in row-major order (1 for a linear layer).
A transposed convolution has the same form; its taps are not flipped.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sft.core.errors import InputError
from sft.core.geometry import VALID, Geometry

KINDS: dict[tuple[int, bool], type[nn.Module]] = {
    (0, False): nn.Linear,
    (1, False): nn.Conv1d,
    (2, False): nn.Conv2d,
    (3, False): nn.Conv3d,
    (1, True): nn.ConvTranspose1d,
    (2, True): nn.ConvTranspose2d,
    (3, True): nn.ConvTranspose3d,
}


def geometry_of(layer: nn.Module) -> Geometry:
    """The geometry of a dense layer of `torch.nn`.

    Raises `InputError` for any other module, also for a subclass (its forward may differ), and
    for a layer whose weight is computed from other parameters (parametrised, weight norm, pruned).
    """
    _check_standard(layer)
    if isinstance(layer, nn.Linear):
        return Geometry(layer.in_features, layer.out_features)
    assert isinstance(layer, nn.modules.conv._ConvNd)
    padding = (0,) if layer.padding == VALID else layer.padding
    return Geometry(
        inputs=layer.in_channels,
        outputs=layer.out_channels,
        kernel=_each_axis(layer, "kernel_size", layer.kernel_size),
        stride=_each_axis(layer, "stride", layer.stride),
        padding=padding if isinstance(padding, str) else _each_axis(layer, "padding", padding),
        dilation=_each_axis(layer, "dilation", layer.dilation),
        groups=layer.groups,
        padding_mode=layer.padding_mode,
        transposed=layer.transposed,
        output_padding=(
            _each_axis(layer, "output_padding", layer.output_padding) if layer.transposed else ()
        ),
    )


def arguments_of(geometry: Geometry) -> dict[str, Any]:
    """The arguments by which the constructors of `torch.nn` make a layer of this geometry."""
    if not geometry.axes:
        return {"in_features": geometry.inputs, "out_features": geometry.outputs}
    arguments: dict[str, Any] = {
        "in_channels": geometry.inputs,
        "out_channels": geometry.outputs,
        "kernel_size": geometry.kernel,
        "stride": geometry.stride,
        "padding": geometry.padding,
        "dilation": geometry.dilation,
        "groups": geometry.groups,
        "padding_mode": geometry.padding_mode,
    }
    if geometry.transposed:
        arguments["output_padding"] = geometry.output_padding
    return arguments


def build_layer(
    geometry: Geometry,
    bias: bool,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """The dense layer of `torch.nn` with this geometry, all zero; the random state is untouched."""
    kind = KINDS[geometry.axes, geometry.transposed]
    layer = kind(**arguments_of(geometry), bias=bias, device="meta", dtype=dtype)
    layer.to_empty(device=torch.get_default_device() if device is None else device)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    return layer


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a layer as `torch.nn` stores it."""
    assert isinstance(layer.weight, Tensor)
    return layer.weight


def bias_of(layer: nn.Module) -> Tensor | None:
    """The bias ``(O,)`` of a layer, or None."""
    assert layer.bias is None or isinstance(layer.bias, Tensor)
    return layer.bias


def to_canonical(weight: Tensor, geometry: Geometry) -> Tensor:
    """A weight of `torch.nn` as canonical kernel ``(G, O/G, I/G, S)``; a view where that can be."""
    ends = _per_group(geometry)
    if geometry.transposed:
        return weight.reshape(geometry.groups, ends[1], ends[0], geometry.taps).transpose(1, 2)
    return weight.reshape(geometry.groups, *ends, geometry.taps)


def from_canonical(kernel: Tensor, geometry: Geometry) -> Tensor:
    """A canonical kernel as weight of `torch.nn`: the exact inverse of `to_canonical`."""
    if geometry.transposed:
        kernel = kernel.transpose(1, 2)
    return kernel.reshape(geometry.weight_shape)


def compose(kernels: Sequence[Tensor], factors: Sequence[Geometry], whole: Geometry) -> Tensor:
    """The dense canonical kernel ``(G, O/G, I/G, S)`` of factors that follow one another.

    kernels : the canonical kernel of each of `factors`, in the order in which they are applied.
    whole : the layer that they stand for. No axis has an extent in two factors, and the groups of
        a factor divide those of `whole` further or not at all, so each product runs over the
        channels of one group only. Differentiable; in the kernels' own dtype.
    """
    groups, inputs = whole.groups, whole.inputs // whole.groups
    product, extents = kernels[0], factors[0].kernel
    if factors[0].groups != groups:
        raise InputError(
            f"The first factor has {factors[0].groups} groups, the whole layer {groups}; the first "
            "factor of a chain has the groups of the layer."
        )
    for kernel, factor in zip(kernels[1:], factors[1:], strict=True):
        product = product.reshape(factor.groups, factor.inputs // factor.groups, inputs, -1)
        product = torch.einsum("goms,gmit->goist", kernel, product)
        product = _merge_taps(product, factor.kernel, extents)
        extents = tuple(a * b for a, b in zip(factor.kernel, extents, strict=True))
    return product.reshape(groups, whole.outputs // groups, inputs, math.prod(extents))


def _merge_taps(product: Tensor, later: Sequence[int], earlier: Sequence[int]) -> Tensor:
    """``(G, o, i, S_later, S_earlier)`` with the two extents of each axis side by side."""
    axes = len(later)
    open_axes = product.reshape(*product.shape[:3], *later, *earlier)
    order = [3 + offset + axis for axis in range(axes) for offset in (0, axes)]
    return open_axes.permute(0, 1, 2, *order).flatten(3) if axes else product.flatten(3)


def _per_group(geometry: Geometry) -> tuple[int, int]:
    return geometry.outputs // geometry.groups, geometry.inputs // geometry.groups


def _each_axis(layer: nn.Module, name: str, sizes: Sequence[int]) -> tuple[int, ...]:
    """A setting for each axis; like `torch.nn`, one number stands for all but the kernel's."""
    axes = next(axes for (axes, _), kind in KINDS.items() if type(layer) is kind)
    if len(sizes) == 1 and name != "kernel_size":
        return tuple(sizes) * axes
    if len(sizes) != axes:
        raise InputError(
            f"{type(layer).__name__} has {axes} axes, but {name}={tuple(sizes)} has "
            f"{len(sizes)} numbers."
        )
    return tuple(sizes)


def _check_standard(layer: nn.Module) -> None:
    """Raise `InputError` unless the layer is one of `KINDS` with a weight of its own."""
    known = ", ".join(f"nn.{kind.__name__}" for kind in KINDS.values())
    if nn.utils.parametrize.is_parametrized(layer):
        names = ", ".join(layer.parametrizations)  # type: ignore[arg-type]
        raise InputError(
            f"{type(layer).__name__} computes its {names} by a parametrisation, which a factorised "
            "layer cannot carry over. Call torch.nn.utils.parametrize.remove_parametrizations "
            "first, or keep the layer dense."
        )
    if type(layer) not in KINDS.values():
        raise InputError(
            f"{type(layer).__name__} is no dense layer of torch.nn with a known kernel (a subclass "
            f"may compute something else). Known: {known}."
        )
    if not isinstance(layer.weight, nn.Parameter):
        names = ", ".join(name for name, _ in layer.named_parameters(recurse=False))
        raise InputError(
            f"The weight of {type(layer).__name__} is no parameter of its own; it is computed from "
            f"{names} (weight norm, spectral norm or pruning). Remove that first, or keep the "
            "layer dense."
        )
