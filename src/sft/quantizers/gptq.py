"""Rounding that lets later columns make up for the errors of earlier ones.

GPTQ: Frantar 2022, arXiv:2210.17323. With the moment factored as ``M = N N^T``, N upper
triangular, the error of a row is ``||N^T e||^2``, ``e = w - s q``. Column i of it is
``N_ii e_i + sum_{j<i} N_ji e_j``: round ``w_i + sum_{j<i} N_ji e_j / N_ii``. These are the
integers of GPTQ without its inverse (the form of Chee 2023, QuIP, arXiv:2307.13304).
"""

import torch
from torch import Tensor

from sft.quantizers.grid import (
    Grid,
    check_rows,
    clamp_levels,
    keep_better,
    levels_of,
    nearest_integers,
    top_of,
)
from sft.quantizers.polish import SWEEPS, polish
from sft.quantizers.scale import best_scale

BLOCK = 128
DAMPING = 0.01


def gptq(rows: Tensor, grid: Grid, moment: Tensor | None, *, sweeps: int = SWEEPS) -> Tensor:
    """Integers ``(R, D)`` int8 of low error in the moment; no row is worse than `round_nearest`.

    rows : ``(R, D)`` floating. moment : ``(D, D)``, symmetric positive semi-definite, or None for
    the identity, in which nearest is best. sweeps : of `polish`, at the end.

    Costs about ``D^3 / 3 + (2 + 2 sweeps) R D^2`` float64 operations. Raises `InputError`.
    """
    check_rows(rows, grid, moment)
    levels = levels_of(rows, grid)
    nearest = nearest_integers(levels, grid)
    if moment is None or moment.shape[0] == 0:
        return nearest.to(torch.int8)
    order = _order(moment.diagonal(), grid.pair_sum is not None)
    factor = _upper_factor(moment.double()[order][:, order])
    q = torch.empty_like(levels)
    q[:, order] = _round_columns(levels[:, order].mT.contiguous(), factor, grid).mT
    q = keep_better(rows, grid, moment, nearest, q)
    return polish(rows, q.to(torch.int8), grid, moment, sweeps)


def gptq_symmetric(
    rows: Tensor, bits: int, moment: Tensor | None, pair_sum: int | None = None
) -> tuple[Tensor, Tensor]:
    """`gptq` to symmetric integers of 2 to 8 bits, with the scales of `best_scale`.

    Returns ``(q, scale)``: ``(R, D)`` int8 and ``(R,)``.
    """
    top = top_of(bits)
    diagonal = None if moment is None else moment.diagonal()
    scale = best_scale(rows, top, diagonal, pair_sum)
    return gptq(rows, Grid(scale, -top, top, pair_sum), moment), scale


def _round_columns(levels: Tensor, factor: Tensor, grid: Grid) -> Tensor:
    """Integers ``(D, R)`` of columns in their order; in pairs where the grid limits pairs."""
    q, lost = torch.empty_like(levels), torch.empty_like(levels)
    columns = len(levels)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        wanted = levels[start:end] + _carried(factor, lost, start, slice(start, end), 0)
        for i in range(start, end):
            aim = wanted[i - start] + _carried(factor, lost, i, slice(i, i + 1), start)[0]
            if grid.pair_sum is None or (i % 2 == 0 and i + 1 == columns):
                q[i] = clamp_levels(torch.round(aim), grid, None)
            elif i % 2:
                q[i] = clamp_levels(torch.round(aim), grid, q[i - 1])
            else:
                second = slice(i + 1, i + 2)
                other = wanted[i + 1 - start] + _carried(factor, lost, i, second, start)[0]
                q[i] = _first_of_pair(aim, other, factor[i : i + 2, i : i + 2], grid)
            lost[i] = levels[i] - q[i]
    return q


def _carried(factor: Tensor, lost: Tensor, end: int, columns: slice, start: int) -> Tensor:
    """What the errors of columns `start` to `end` ask of later `columns`: ``(k, R)``."""
    scaled = factor[start:end, columns] / factor.diagonal()[columns]
    return scaled.mT @ lost[start:end]


def _first_of_pair(first: Tensor, second: Tensor, factor: Tensor, grid: Grid) -> Tensor:
    """The first integer of a pair; where the pair would offend, the best on the limit.

    first, second : ``(R,)``, what both want before either is rounded. factor : ``(2, 2)``.
    """
    assert grid.pair_sum is not None
    own, cross, other = float(factor[0, 0]), float(factor[0, 1]), float(factor[1, 1])
    free = clamp_levels(torch.round(first), grid, None)
    then = clamp_levels(torch.round(second + (first - free) * cross / other), grid, None)
    sign = torch.sign(free + then)
    slope = 1 - cross / other
    surplus = first + second - sign * grid.pair_sum
    step = surplus * other**2 * slope / (own**2 + other**2 * slope**2)
    limited = clamp_levels(torch.round(first - step), grid, None)
    return torch.where((free + then).abs() > grid.pair_sum, limited, free)


def _order(diagonal: Tensor, pairs: bool) -> Tensor:
    """Columns by falling moment; neighbours stay together where pairs matter, an odd one last."""
    if not pairs:
        return torch.argsort(diagonal, descending=True, stable=True)
    whole = len(diagonal) // 2 * 2
    falling = torch.argsort(diagonal[:whole].reshape(-1, 2).sum(1), descending=True, stable=True)
    paired = torch.stack([2 * falling, 2 * falling + 1], 1).flatten()
    return torch.cat([paired, torch.arange(whole, len(diagonal), device=diagonal.device)])


def _upper_factor(moment: Tensor) -> Tensor:
    """N ``(D, D)``, upper triangular: ``N N^T`` is the moment plus 1 % of its mean diagonal.

    More is added until it factorises. A column that is never read is then rounded by itself.
    """
    mean = float(moment.diagonal().mean())
    mean = mean if mean > 0 else 1.0
    damping = DAMPING
    while True:
        damped = moment.flip(0, 1)
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            factor: Tensor = lower.flip(0, 1)
            return factor
        damping *= 10
