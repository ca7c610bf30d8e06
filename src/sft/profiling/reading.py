"""One weighted operator of a graph: its geometry, its rows, and the moments of what it reads."""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from sft.core.geometry import Geometry
from sft.profiling.moments import Moments
from sft.profiling.patches import draw, patches, picked, reads
from sft.quantizers.operators import WEIGHTED

POSITIONS = 4096  # at least, where there are so many
PER_NUMBER = 2  # positions for each number that an output reads
STRETCH = 4096  # positions that are read and written side by side


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


@dataclasses.dataclass(frozen=True)
class Reading:
    """What an output position reads, tap by tap: ``mean`` and ``variance`` ``(G, D)``, and
    ``covariance`` ``(G, D, D)`` or None where only the variance was asked for.
    """

    mean: Tensor
    variance: Tensor
    covariance: Tensor | None


def observe_reading(
    geometry: Geometry,
    inputs: Iterable[Tensor],
    generator: torch.Generator,
    total: int,
    covariance: bool,
) -> Reading:
    """First and second moments of what the operator's output positions read.

    inputs : batches as the operator gets them. total : how many samples they have in all; the
        positions that are used are drawn so that there are `POSITIONS` or `PER_NUMBER` times D.
    covariance : whether the costly one is wanted.
    """
    depth = geometry.inputs // geometry.groups * geometry.taps
    moments: Moments | None = None
    sums: list[Tensor] = []
    count = 0
    for x in inputs:
        share = max(1, len(x)) / max(1, total)
        limit = math.ceil(share * max(POSITIONS, PER_NUMBER * depth * covariance))
        for part, _ in columns(geometry, x, limit, generator):
            if covariance:
                moments = moments or Moments(geometry.groups, depth, x.device, x.dtype)
                moments.add([part], part.mean((0, 2)).double().view(geometry.groups, -1))
                continue
            wide = part[0].double()
            sums.append(torch.stack([wide.sum(1), wide.square().sum(1)]))
            count += part.shape[2]
    if moments is not None:
        full = in_tap_order(moments.covariance(), geometry)
        mean = in_tap_order(moments.mean(), geometry)
        return Reading(mean, full.diagonal(dim1=1, dim2=2), full)
    first, second = torch.stack(sums).sum(0).view(2, geometry.groups, -1) / max(count, 1)
    variance = (second - first.square()).clamp(min=0)
    return Reading(in_tap_order(first, geometry), in_tap_order(variance, geometry), None)


def columns(
    geometry: Geometry,
    x: Tensor,
    limit: int,
    generator: torch.Generator,
    outputs: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Columns ``(1, G*D, m)`` that at most `limit` positions of a batch read, and what they give.

    outputs : of the operator for `x`; their columns are ``(1, O, m)``, empty without them.
    """
    none = x.new_empty(0)
    if not geometry.axes:
        rows = x.reshape(-1, x.shape[-1])
        chosen = draw(len(rows), limit, generator)
        chosen = torch.arange(len(rows)) if chosen is None else chosen
        place = chosen.to(rows.device)
        given = none if outputs is None else outputs.reshape(-1, outputs.shape[-1])[place].T[None]
        yield rows[place].T[None], given
        return
    out = geometry.output_size(tuple(x.shape[2:]))
    tables = reads(geometry, tuple(x.shape[2:]), out, x.device)
    total = len(x) * math.prod(out)
    chosen = draw(total, limit, generator)
    if outputs is None:
        yield from ((part, none) for part in patches(x, tables, chosen))
        return
    chosen = torch.arange(total) if chosen is None else chosen
    flat = outputs.flatten(2)
    for some in torch.split(chosen, STRETCH):
        read = torch.cat(list(patches(x, tables, some)), dim=2)
        yield read, torch.cat(list(picked(flat, some)), dim=2)


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


def in_tap_order(moment: Tensor, geometry: Geometry, rows_only: bool = False) -> Tensor:
    """``(G, D, D)`` or ``(G, D)`` from channel by channel to tap by tap.

    rows_only : the last axis counts something else and stays.
    """
    inputs = geometry.inputs // geometry.groups
    order = torch.arange(inputs * geometry.taps, device=moment.device)
    order = order.view(inputs, geometry.taps).T.flatten()
    found = moment[:, order]
    return found if moment.ndim == 2 or rows_only else found[:, :, order]


def _each(value: Any, axes: int) -> tuple[int, ...]:
    several = tuple(value) if isinstance(value, list | tuple) else (value,)
    return tuple(int(v) for v in several) * (axes if len(several) == 1 else 1)
