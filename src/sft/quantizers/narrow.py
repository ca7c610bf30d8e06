"""Rounding of many narrow layers at once: the groups of a depthwise convolution.

Each group has a moment of its own, so its rows cannot share a factorisation; but it reads only a
few numbers. All groups are rounded side by side by coordinate descent: each integer in turn takes
the value that is best for the others (Behdin et al. 2023, arXiv:2309.01885).
"""

import torch
from torch import Tensor

SWEEPS = 6


def round_groups(rows: Tensor, scales: Tensor, moments: Tensor, qmax: int) -> Tensor:
    """Integers ``(G, o, D)`` int8 within ``[-qmax, qmax]``, never worse than nearest.

    rows : ``(G, o, D)``. scales : ``(G, o)``, positive. moments : ``(G, D, D)``, positive
    semidefinite; the error of a row is ``(w - s q)^T M (w - s q)``.
    """
    levels = rows.double() / scales.double()[:, :, None]
    moments = moments.double()
    q = levels.round().clamp(-qmax, qmax)
    best, least = q, _errors(levels - q, moments)
    for _ in range(SWEEPS):
        q = q.clone()
        pull = (levels - q) @ moments  # (G, o, D): half of the negative gradient
        for column in range(rows.shape[2]):
            own = moments[:, column, column].clamp_min(1e-30)[:, None]
            step = q[:, :, column] + pull[:, :, column] / own
            new = torch.where(own > 1e-30, step.round().clamp(-qmax, qmax), q[:, :, column])
            change = new - q[:, :, column]
            q[:, :, column] = new
            pull = pull - change[:, :, None] * moments[:, None, column]
        errors = _errors(levels - q, moments)
        better = errors < least
        if not bool(better.any()):
            break
        best = torch.where(better[:, :, None], q, best)
        least = torch.minimum(errors, least)
    return best.to(torch.int8)


def group_scales(rows: Tensor, variances: Tensor, qmax: int, candidates: int) -> Tensor:
    """``(G, o)`` scales with the least ``sum_d v_d (w_d - s q_d)^2`` of integers to nearest.

    rows : ``(G, o, D)``. variances : ``(G, D)``. Tries evenly spaced scales from 0.3 to 1.0 of the
    one that clips nothing; a row of zeros has the scale 1.
    """
    widest = rows.abs().amax(2) / qmax
    widest = torch.where(widest > 0, widest, torch.ones_like(widest))
    best, least = widest, torch.full_like(widest, torch.inf)
    for factor in torch.linspace(0.3, 1.0, candidates).tolist():
        scale = factor * widest
        steps = (rows / scale[:, :, None]).round().clamp(-qmax, qmax)
        lost = (rows - steps * scale[:, :, None]).square()
        errors = (lost * variances.to(lost)[:, None]).sum(2)
        better = errors <= least
        best, least = torch.where(better, scale, best), torch.where(better, errors, least)
    return best


def _errors(lost: Tensor, moments: Tensor) -> Tensor:
    return ((lost @ moments) * lost).sum(2)
