"""A layer solved again for what it will read: inputs in integers, behind layers in integers.

    W = E[y x^T] E[x x^T]^-1        y the layer's output in float, x its input as it will be

with centred moments, and the bias that goes with them. What the layers before have lost is mended
as far as a linear map can mend it; then the layer itself is rounded. (The asymmetric reconstruction
of Zhang et al. 2015, arXiv:1505.06798, with rounding in place of low rank.)
"""

import math

import torch
from torch import Tensor
from torch.fx import Node

from sft.calibration.layer import POSITIONS, columns, in_tap_order
from sft.calibration.walk import Walk
from sft.core.geometry import Geometry
from sft.profiling.moments import Moments

RIDGE = 1e-3  # of the mean variance of what the layer reads
PER_NUMBER = 8  # positions for each number that an output reads: as many as are drawn, and needed


def refit(
    walk: Walk, node: Node, rows: Tensor, geometry: Geometry, seed: int
) -> tuple[Tensor, Tensor] | None:
    """Rows ``(G, o, D)`` that give the float outputs from the rounded inputs, and their bias.

    None where there are too few positions to tell. A ridge holds the rows to their present values
    where the data says little. The bias ``(G*o,)`` replaces the present one.
    """
    groups, outputs, depth = rows.shape
    moments = Moments(groups, depth + outputs, rows.device, rows.dtype)
    data = node.args[0]
    assert isinstance(data, Node)
    total = sum(len(b) for b in walk.batches)
    plain = walk.run(node, walk.plain, rounding=False)
    generator = torch.Generator().manual_seed(seed)
    for z, y in zip(walk.rounded[data], plain, strict=True):
        limit = math.ceil(max(POSITIONS, PER_NUMBER * depth) * len(z) / max(1, total))
        for read, given in columns(geometry, z, limit, generator, y):
            both = [part.view(groups, -1, part.shape[-1]) for part in (read, given)]
            joint = torch.cat(both, dim=1).flatten(0, 1)[None]
            moments.add([joint], joint.mean((0, 2)).double().view(groups, -1))
    if moments.count < PER_NUMBER * depth:
        return None
    covariance, mean = moments.covariance(), moments.mean()
    inner = in_tap_order(covariance[:, :depth, :depth], geometry)
    cross = in_tap_order(covariance[:, :depth, depth:], geometry, rows_only=True).mT
    at = in_tap_order(mean[:, :depth], geometry)
    present = rows.double()
    level = inner.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
    system = inner + torch.diag_embed(RIDGE * level[:, None].expand(groups, depth))
    solved = present + torch.linalg.solve(system, (cross - present @ inner).mT).mT
    bias = mean[:, depth:] - (solved @ at[:, :, None])[..., 0]
    return solved.to(rows), bias.flatten()
