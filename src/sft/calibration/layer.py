"""One weighted operator of a graph: its geometry, its rows, and the moments of what it reads."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from sft.core.geometry import Geometry
from sft.profiling.moments import Moments
from sft.profiling.patches import draw, patches, reads
from sft.quantizers.operators import WEIGHTED

POSITIONS = 4096  # at least, where there are so many
PER_NUMBER = 2  # positions for each number that an output reads


def geometry_of_node(node: Node, weight: Tensor) -> Geometry | None:
    """The geometry of a convolution or linear operator; None for any other."""
    if node.target not in WEIGHTED:
        return None
    outputs, inputs = weight.shape[:2]
    axes = weight.ndim - 2
    if axes <= 0:
        return Geometry(inputs, outputs)
    given: list[Any] = list(node.args[3:])
    defaults: list[Any] = [1, 0, 1, 1]
    stride, padding, dilation, groups = given + defaults[len(given) :]
    padding = padding if padding == "same" else (0 if padding == "valid" else padding)
    return Geometry(
        inputs * groups,
        outputs,
        tuple(weight.shape[2:]),
        _each(stride, axes),
        padding if isinstance(padding, str) else _each(padding, axes),
        _each(dilation, axes),
        groups,
    )


def moments_of(
    geometry: Geometry, inputs: Iterable[Tensor], generator: torch.Generator, total: int
) -> Moments:
    """Moments ``(G, D, D)`` of what an output position reads, taps of one channel together.

    inputs : batches as the operator gets them. total : how many samples they have in all; the
        positions that are used are drawn so that there are `POSITIONS` or `PER_NUMBER` times D.
    """
    depth = geometry.inputs // geometry.groups * geometry.taps
    moments: Moments | None = None
    for x in inputs:
        x = x if x.is_floating_point() else x.float()
        moments = moments or Moments(geometry.groups, depth, x.device, x.dtype)
        limit = math.ceil(max(POSITIONS, PER_NUMBER * depth) * max(1, len(x)) / max(1, total))
        if not geometry.axes:
            rows = x.reshape(-1, x.shape[-1])
            chosen = draw(len(rows), limit, generator)
            rows = rows if chosen is None else rows[chosen.to(rows.device)]
            moments.add([rows.T[None]], rows.mean(0).double().view(1, -1))
            continue
        out = geometry.output_size(tuple(x.shape[2:]))
        tables = reads(geometry, tuple(x.shape[2:]), out, x.device)
        chosen = draw(len(x) * math.prod(out), limit, generator)
        for part in patches(x, tables, chosen):
            moments.add([part], part.mean((0, 2)).double().view(geometry.groups, -1))
    assert moments is not None
    return moments


def kernel_rows(weight: Tensor, geometry: Geometry) -> Tensor:
    """``(O, I/G, *kernel)`` to ``(G, O/G, D)``, tap by tap, as integer kernels read them."""
    rows = weight.detach()
    rows = rows.flatten(2).transpose(1, 2).flatten(1) if rows.ndim > 2 else rows
    return rows.reshape(geometry.groups, geometry.outputs // geometry.groups, -1)


def weight_of_rows(rows: Tensor, geometry: Geometry) -> Tensor:
    """The way back from `kernel_rows` to the weight's shape."""
    if not geometry.axes:
        return rows.reshape(geometry.weight_shape)
    inputs = geometry.inputs // geometry.groups
    tapped = rows.reshape(geometry.outputs, geometry.taps, inputs)
    return tapped.transpose(1, 2).reshape(geometry.weight_shape)


def in_tap_order(moment: Tensor, geometry: Geometry) -> Tensor:
    """``(G, D, D)`` or ``(G, D)`` from channel by channel to tap by tap."""
    inputs = geometry.inputs // geometry.groups
    order = torch.arange(inputs * geometry.taps, device=moment.device)
    order = order.view(inputs, geometry.taps).T.flatten()
    return moment[:, order] if moment.ndim == 2 else moment[:, order][:, :, order]


def channel_means(outputs: Iterable[Tensor], axis: int) -> Tensor:
    """``(C,)`` mean of each channel over batches, in float64."""
    total: Tensor | None = None
    count = 0
    for y in outputs:
        rows = y.movedim(axis, 0).flatten(1)
        part = rows.double().sum(1)
        total = part if total is None else total + part
        count += rows.shape[1]
    assert total is not None
    return total / max(count, 1)


def _each(value: Any, axes: int) -> tuple[int, ...]:
    several = tuple(value) if isinstance(value, list | tuple) else (value,)
    return tuple(int(v) for v in several) * (axes if len(several) == 1 else 1)


__all__ = [
    "channel_means",
    "geometry_of_node",
    "in_tap_order",
    "kernel_rows",
    "moments_of",
    "weight_of_rows",
]
