"""Integers improved one column at a time, in the metric of the layer's output.

Cyclic coordinate descent (QuantEase, Behdin 2023, arXiv:2309.01885).
"""

import torch
from torch import Tensor

from sft.quantizers.grid import Grid, check_rows, clamp_levels, levels_of

BLOCK = 128
SWEEPS = 2


def polish(
    rows: Tensor, q: Tensor, grid: Grid, moment: Tensor | None, sweeps: int = SWEEPS
) -> Tensor:
    """Integers ``(R, D)`` int8 of no higher error: each in turn is the best, the others given.

    q : ``(R, D)``, within the grid. sweeps : through all columns; ends when nothing moves.
    """
    check_rows(rows, grid, moment)
    if moment is None or sweeps == 0:
        return q.clone()
    hessian = moment.double()
    best = q.double().mT.contiguous()
    pull = hessian @ (levels_of(rows, grid).mT - best)
    for _ in range(sweeps):
        moved = False
        for start in range(0, len(best), BLOCK):
            block = slice(start, start + BLOCK)
            change = _polish_block(best[block], pull[block], hessian[block, block], grid)
            if bool(change.any()):
                pull -= hessian[:, block] @ change
                best[block] += change
                moved = True
        if not moved:
            break
    return best.mT.to(torch.int8).contiguous()


def _polish_block(q: Tensor, pull: Tensor, hessian: Tensor, grid: Grid) -> Tensor:
    """The change ``(k, R)`` of a block of columns; `pull` is ``H (w - q)`` at its start."""
    change = torch.zeros_like(q)
    current = q.clone()
    for i in range(len(q)):
        curvature = float(hessian[i, i])
        if not curvature > 0:
            continue
        wanted = current[i] + (pull[i] - hessian[i] @ change) / curvature
        partner = i ^ 1
        beside = current[partner] if grid.pair_sum is not None and partner < len(q) else None
        current[i] = clamp_levels(torch.round(wanted), grid, beside)
        change[i] = current[i] - q[i]
    return change
