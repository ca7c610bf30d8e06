"""The search behind the `mse` range: how far to shrink a range so that the error is least."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sft.quantizers.linear import affine_parameters, usable_scale

SMALLEST_FACTOR = 0.05
FACTORS = 60
REFINED = 7
BLOCK = 2**16  # candidates times values in one step: stays in the processor's cache


class Problem(NamedTuple):
    """One row of values each: ``(R, N)``, counts or None, the widest ends ``(R,)``, the integers.

    The ends hold zero; those of a symmetric range are opposite.
    """

    values: Tensor
    counts: Tensor | None
    low: Tensor
    high: Tensor
    qmin: int
    qmax: int
    symmetric: bool


def least_error_factors(problem: Problem) -> Tensor:
    """Factors ``(2, R)`` in (0, 1] of `low` and `high` with the least `squared_errors`.

    Symmetric: one factor for both ends. Affine: both ends together, then the low and the high one
    alone. Each time a geometric grid from 0.05 to 1 is tried, then twice a finer one around the
    best so far. Factor 1 is always among them, so the error never grows.
    """
    factors = torch.ones_like(torch.stack([problem.low, problem.high]))
    best = squared_errors(problem, factors[None])[0]
    moves = [[0, 1]] if problem.symmetric else [[0, 1], [0], [1]]
    ratio = SMALLEST_FACTOR ** (1 / (1 - FACTORS))
    grid = ratio ** torch.arange(1 - FACTORS, 1, dtype=factors.dtype, device=factors.device)
    around = torch.linspace(-1, 1, REFINED, dtype=factors.dtype, device=factors.device)
    for ends in moves:
        tried = grid[:, None].expand(-1, len(best))
        factors, best = _take_better(problem, factors, best, ends, tried)
        for width in (1.0, 2 / (REFINED - 1)):
            tried = factors[ends[0]] * ratio ** (width * around[:, None])
            factors, best = _take_better(problem, factors, best, ends, tried.clamp(max=1))
    return factors


def squared_errors(problem: Problem, factors: Tensor) -> Tensor:
    """``sum_n counts_n (v_n - Q(v_n))^2`` for factors ``(C, 2, R)`` of the ends, shape ``(C, R)``.

    In units of the row's greatest magnitude squared, so that it neither over- nor underflows.
    """
    scale, zero = _grid(problem, factors)
    values, inverse = problem.values, 1 / scale
    lowest, highest = problem.qmin - zero, problem.qmax - zero
    total = torch.zeros_like(scale)
    for rows, columns in _blocks(values.shape[0], values.shape[1], len(factors)):
        steps = values[rows, columns] * inverse[:, rows, None]
        gaps = steps.round()  # then clamped: maximum and minimum are faster than clamp with tensors
        torch.maximum(gaps, lowest[:, rows, None], out=gaps)
        torch.minimum(gaps, highest[:, rows, None], out=gaps)
        gaps.sub_(steps).square_()
        if problem.counts is not None:
            gaps.mul_(problem.counts[rows, columns])
        total[:, rows] += gaps.sum(dim=-1)
    peak = torch.maximum(-problem.low, problem.high)
    unit = scale / torch.where(peak > 0, peak, torch.ones_like(peak))
    return total * unit.square()


def _take_better(
    problem: Problem, factors: Tensor, best: Tensor, ends: list[int], tried: Tensor
) -> tuple[Tensor, Tensor]:
    """The better of `factors` and of those with `tried` ``(C, R)`` at `ends`, and its error."""
    trials = factors.repeat(len(tried), 1, 1)
    trials[:, ends] = tried[:, None]
    least, place = squared_errors(problem, trials).min(dim=0)
    chosen = trials.gather(0, place.expand(1, 2, -1))[0]
    better = least < best
    return torch.where(better, chosen, factors), torch.where(better, least, best)


def _grid(problem: Problem, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each candidate, both floating of shape ``(C, R)``."""
    low, high = problem.low * factors[:, 0], problem.high * factors[:, 1]
    if problem.symmetric:
        scale = usable_scale(high / problem.qmax)
        return scale, torch.zeros_like(scale)
    scale, zero = affine_parameters(low, high, problem.qmin, problem.qmax)
    return scale, zero.to(scale.dtype)


def _blocks(rows: int, columns: int, candidates: int) -> Iterator[tuple[slice, slice]]:
    """Pieces of a ``(rows, columns)`` table with `BLOCK` entries for all candidates together."""
    wide = min(columns, max(1, BLOCK // candidates))
    tall = max(1, BLOCK // (candidates * wide))
    for top in range(0, rows, tall):
        for left in range(0, columns, wide):
            yield slice(top, top + tall), slice(left, left + wide)
