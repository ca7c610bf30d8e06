"""The rows of a layer solved again for what it will read.

    W = E[y x^T] E[x x^T]^-1        y the output that is wanted, x the input as it will be

with centred moments, and the bias that goes with them. (The asymmetric reconstruction of Zhang et
al. 2015, arXiv:1505.06798.)
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sft.core.geometry import Geometry
from sft.profiling.moments import Moments
from sft.profiling.reading import POSITIONS, columns, in_tap_order

RIDGE = 1e-3  # of the mean variance of what the layer reads
PER_NUMBER = 8  # positions for each number that an output reads: as many as are drawn, and needed


def solve_rows(
    rows: Tensor,
    geometry: Geometry,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    seed: int,
) -> tuple[Tensor, Tensor] | None:
    """Rows ``(G, o, D)`` that give the outputs from the inputs, batch by batch, and their bias.

    None where there are too few positions to tell. A ridge holds the rows to their present values
    where the data says little. The bias ``(G*o,)`` replaces the present one.
    """
    groups, width, depth = rows.shape
    moments = Moments(groups, depth + width, rows.device, rows.dtype)
    total = sum(len(x) for x in inputs)
    generator = torch.Generator().manual_seed(seed)
    for z, y in zip(inputs, outputs, strict=True):
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
