"""What a split layer may do that a whole one cannot: choose its gauge, and refit its last factor.

Between two factors stands nothing, so ``(A R)(R^-1 B)`` is the same layer for any invertible R.
With orthonormal columns of A, errors in B reach the output as they are, none amplified. When B is
rounded already, A is solved again for what is really there: ``A = E[y z^T] E[z z^T]^-1``, y the
output in float and z what A reads in integers. (One half of `quantizers.quantize_factors`, with the
rounding of activations taken in.)
"""

import math

import torch
from torch import Tensor
from torch.fx import Node

from sft.calibration.layer import POSITIONS, columns, in_tap_order
from sft.calibration.walk import Walk
from sft.core.geometry import Geometry
from sft.core.records import Plan
from sft.profiling.moments import Moments
from sft.quantizers.operators import nearest_owner
from sft.surgery.quantize import QuantizedModel

RIDGE = 1e-3  # of the mean variance of what the factor reads
PER_NUMBER = 8  # positions for each number that it reads


def factors_of(model: QuantizedModel, plan: Plan) -> dict[str, list[str]]:
    """The weights of every split layer, in the order in which they are applied."""
    split = {row.name for row in plan.rows if row.option.rank}
    found: dict[str, list[str]] = {}
    for name in model.weights():
        owner = nearest_owner(name.rpartition(".")[0], split)
        if owner is not None:
            found.setdefault(owner, []).append(name)
    return {owner: names for owner, names in found.items() if len(names) > 1}


@torch.no_grad()
def orthonormalize(model: QuantizedModel, plan: Plan) -> int:
    """Give pointwise last factors orthonormal columns, in place; how many there were.

    Only chains of two factors, whose last one is no wider than its outputs, without groups.
    """
    done = 0
    for names in factors_of(model, plan).values():
        first, second = (model.graph_module.get_parameter(n) for n in (names[0], names[-1]))
        chain = len(names) == 2 and names[0].endswith("first.weight")
        if not chain or second[0, 0].numel() != 1 or second.shape[1] != first.shape[0]:
            continue
        matrix = second.flatten(1).double()
        if matrix.shape[0] < matrix.shape[1]:
            continue
        basis, rest = torch.linalg.qr(matrix)
        sign = torch.sign(rest.diagonal() + 1e-300)  # keeps the channels as they were, if they may
        basis, rest = basis * sign, rest * sign[:, None]
        second.copy_(basis.view_as(second))
        first.copy_((rest @ first.flatten(1).double()).view_as(first))
        bias = dict(model.graph_module.named_parameters()).get(f"{names[0][:-6]}bias")
        if bias is not None:
            bias.copy_(rest @ bias.double())
        done += 1
    return done


def refit(
    walk: Walk, node: Node, rows: Tensor, geometry: Geometry, seed: int
) -> tuple[Tensor, Tensor]:
    """Rows ``(G, o, D)`` that give the float outputs from the rounded inputs, and their bias.

    A ridge holds the rows to their present values where the data says little. The bias ``(G*o,)``
    replaces the present one.
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
