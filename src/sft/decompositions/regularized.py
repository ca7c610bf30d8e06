"""The SFT objective, solved in closed form.

    min over A, B of  1/2 ||K - A B||_F^2 + l1 ||A||_F^2 + l2 ||B||_F^2

With `K = U S V^T` and `t = 2 sqrt(l1 l2)` the solution keeps the singular values above `t` and
shrinks them by `t`: nuclear-norm soft thresholding (Srebro 2004; Mazumder, Hastie, Tibshirani
2010; Cai, Candes, Shen 2010). So `l1` and `l2` choose the rank.
"""

import dataclasses

import torch

from sft.core.errors import InputError


@dataclasses.dataclass(frozen=True)
class RegularizedFactors:
    """``A (m, r)``, ``B (r, n)`` of the matrix ``K (m, n)``, and the objective's value there."""

    a: torch.Tensor
    b: torch.Tensor
    rank: int
    value: float


def solve_regularized(
    matrix: torch.Tensor,
    l1: float,
    l2: float,
    max_rank: int | None = None,
    *,
    debias: bool = False,
) -> RegularizedFactors:
    """Minimise the SFT objective over all factor pairs (of at most `max_rank` columns).

    matrix : ``(m, n)``, real. l1, l2 : weights of the squared norms, both above 0.
    debias : keep the chosen rank and refit without shrinking: the best approximation of that rank,
        and the objective at it.
    Raises `InputError` for another shape or weight. The factors have the matrix's dtype.
    """
    if matrix.ndim != 2:
        raise InputError(f"The SFT objective is for a matrix; the shape is {tuple(matrix.shape)}.")
    if not (l1 > 0 and l2 > 0):
        raise InputError(f"l1={l1} and l2={l2}: both must be above 0.")
    u, s, vt = torch.linalg.svd(matrix.detach().double().cpu(), full_matrices=False)
    threshold = 2.0 * (l1 * l2) ** 0.5
    rank = int((s > threshold).sum())
    if max_rank is not None:
        rank = min(rank, max_rank)
    shrunk = (s[:rank] - (0.0 if debias else threshold)).sqrt()
    a = u[:, :rank] * shrunk * (l2 / l1) ** 0.25
    b = (l1 / l2) ** 0.25 * shrunk[:, None] * vt[:rank]
    kept, dropped = s[:rank], s[rank:]
    lost = 0.0 if debias else threshold**2 / 2
    value = float((threshold * kept - lost).sum() + dropped.square().sum() / 2)
    return RegularizedFactors(a.to(matrix.dtype), b.to(matrix.dtype), rank, value)


def choose_rank(matrix: torch.Tensor, l1: float, l2: float) -> int:
    """The rank that the SFT objective chooses: how many singular values exceed 2 sqrt(l1 l2)."""
    return solve_regularized(matrix, l1, l2).rank
