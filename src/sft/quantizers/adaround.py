"""Learned rounding: each weight goes up or down, whichever serves the layer's output.

AdaRound: Nagel 2020, arXiv:2004.10568. An integer is ``floor(w / s) + h(v)`` with the rectified
sigmoid ``h``; Adam lowers the layer's error, in its quadratic metric, plus a regulariser
``1 - |2 h - 1|^b`` that drives h to 0 or 1 as b falls. A weight beyond the grid has the outermost
step and a fraction above 1 or below 0, so that the others learn to make up for the clipping. At the
end pairs are mended, and all is polished (`polish`).
"""

import math

import torch
from torch import Tensor

from sft.quantizers.grid import (
    Grid,
    check_rows,
    keep_better,
    levels_of,
    mend_pairs,
    nearest_integers,
)
from sft.quantizers.polish import polish

ITERATIONS = 600
RATE = 0.03
WEIGHT = 0.2
WARM_UP = 0.2
HIGHEST, LOWEST = 8.0, 2.0  # the regulariser's exponent, at first and at last
STRETCH, SHIFT = 1.2, -0.1


def adaround(
    rows: Tensor, grid: Grid, moment: Tensor | None, *, iterations: int = ITERATIONS
) -> Tensor:
    """Integers ``(R, D)`` int8 of low error in the moment; no row is worse than `round_nearest`.

    rows : ``(R, D)`` floating. moment : ``(D, D)``, symmetric positive semi-definite, or None for
    the identity, in which nearest is best.

    Costs ``2 R D^2`` float32 operations at each iteration: about 0.3 s of one thread for rows of
    ``(512, 4608)``. Raises `InputError`.
    """
    check_rows(rows, grid, moment)
    levels = levels_of(rows, grid)
    nearest = nearest_integers(levels, grid).to(torch.int8)
    if moment is None or not bool(moment.diagonal().sum() > 0):
        return nearest
    floor = torch.floor(levels).clamp(grid.qmin, grid.qmax - 1)
    up = _learn((levels - floor).float(), _normalised(moment), iterations)
    q = floor + up
    if grid.pair_sum is not None:
        q = mend_pairs(q, grid.pair_sum, levels)
    q = keep_better(rows, grid, moment, nearest, q.to(torch.int8))
    return polish(rows, q, grid, moment)


def _learn(fraction: Tensor, moment: Tensor, iterations: int) -> Tensor:
    """Whether each weight goes up, ``(R, D)`` of bool, from its fraction of a step."""
    inner = ((fraction.clamp(0.01, 0.99) - SHIFT) / STRETCH).logit()
    optimizer = torch.optim.Adam([inner], RATE)
    for step in range(iterations):
        soft = torch.sigmoid(inner)
        height = soft * STRETCH + SHIFT
        gradient = 2 * ((height.clamp(0, 1) - fraction) @ moment)
        gradient += _push(height, step / iterations)
        gradient *= STRETCH * soft * (1 - soft)
        inner.grad = gradient.masked_fill_((height <= 0) | (height >= 1), 0)
        optimizer.step()
    return torch.sigmoid(inner) >= 0.5


def _push(height: Tensor, progress: float) -> Tensor:
    """Gradient of the regulariser with respect to h; zero while warming up."""
    if progress < WARM_UP:
        return torch.zeros_like(height)
    annealed = (progress - WARM_UP) / (1 - WARM_UP)
    exponent = LOWEST + (HIGHEST - LOWEST) * 0.5 * (1 + math.cos(math.pi * annealed))
    middle = 2 * height - 1
    return -2 * WEIGHT * exponent * middle.abs().pow(exponent - 1) * middle.sign()


def _normalised(moment: Tensor) -> Tensor:
    """The moment in float32, its mean diagonal 1, so that errors count in steps."""
    return (moment.double() / moment.double().diagonal().mean()).float()
