"""Ranks without a budget: by energy, by the SFT objective, by variational Bayes.

Helpers that stand alone; the planner chooses ranks from damage and cost instead.
"""

import math

import torch
from scipy.optimize import brentq, minimize_scalar
from torch import Tensor

from sft.core.errors import InputError
from sft.decompositions.regularized import choose_rank


def rank_by_energy(singular_values: Tensor, keep: float) -> int:
    """The smallest rank whose singular values hold the share `keep` of the squared sum, 1 at least.

    singular_values : ``(n,)``, in any order. keep : above 0, at most 1.
    Raises `InputError` for another shape or share.
    """
    if singular_values.ndim != 1 or len(singular_values) == 0:
        raise InputError(
            f"The singular values have shape {tuple(singular_values.shape)}; one row is needed."
        )
    energy = singular_values.detach().double().square().sort(descending=True).values
    tail = energy.flip(0).cumsum(0).flip(0)
    return rank_by_error(torch.cat([tail[1:], tail.new_zeros(1)]) / tail[0].clamp_min(1e-300), keep)


def rank_by_error(errors: Tensor, keep: float) -> int:
    """The smallest rank of a menu whose error is at most ``1 - keep``, 1 at least.

    errors : ``(n,)`` of a `Factorization`, at rank 1, 2, ...
    """
    if errors.ndim != 1 or len(errors) == 0:
        raise InputError(f"The errors have shape {tuple(errors.shape)}; one row is needed.")
    if not 0 < keep <= 1:
        raise InputError(f"keep is {keep}; a share of the energy is above 0 and at most 1.")
    allowed = 1 - keep + 1e-15
    fits = (errors <= allowed).nonzero()
    return int(fits[0]) + 1 if len(fits) else len(errors)


def rank_by_objective(matrix: Tensor, l1: float, l2: float) -> int:
    """The rank that the SFT objective chooses, 1 at least; see `choose_rank`."""
    return max(1, choose_rank(matrix, l1, l2))


def rank_by_evbmf(matrix: Tensor, noise_variance: float | None = None) -> int:
    """The rank of the global solution of empirical variational Bayes matrix factorisation.

    The matrix is taken as a low-rank one plus white noise; of the singular values those stay whose
    components lower the free energy. Analytic, but for the noise: if it is not given, it is found
    by minimising the free energy over one number. May be 0: nothing but noise.

    matrix : ``(m, n)``. Source: Nakajima, Sugiyama, Babacan, Tomioka, "Global analytic solution of
    fully-observed variational Bayesian matrix factorization", JMLR 14 (2013), theorem 2 (threshold)
    and theorem 3 with its corollary (noise).
    """
    if matrix.ndim != 2 or matrix.numel() == 0:
        raise InputError(f"EVBMF is for a matrix; the shape is {tuple(matrix.shape)}.")
    rows, columns = sorted(matrix.shape)
    squares = torch.linalg.svdvals(matrix.detach().double().cpu()).square()
    if not float(squares.sum()) > 0:
        return 0
    alpha = rows / columns
    if noise_variance is None:
        noise_variance = _noise_variance(squares, columns, alpha)
    threshold = columns * noise_variance * _smallest_signal(alpha)
    return int((squares > threshold).sum())


def _smallest_signal(alpha: float) -> float:
    """The squared singular value, in units of ``columns * noise``, above which a component stays.

    With t the zero of ``phi(t) + phi(t / alpha)``, ``phi(z) = log(z + 1) / z - 1/2``, it is
    ``(1 + t) (1 + alpha / t)``.
    """

    def both(t: float) -> float:
        return math.log1p(t) / t + math.log1p(t / alpha) * alpha / t - 1

    root = brentq(both, 1e-6 * math.sqrt(alpha), 100.0)
    return (1 + root) * (1 + alpha / root)


def _noise_variance(squares: Tensor, columns: int, alpha: float) -> float:
    """The variance that minimises the free energy, between the bounds of the corollary."""
    rows, smallest = len(squares), _smallest_signal(alpha)
    most = min(math.ceil(rows / (1 + alpha)) - 1, rows - 1)
    upper = float(squares.sum()) / (rows * columns)
    lower = max(float(squares[most]) / (columns * smallest), float(squares[most:].mean()) / columns)
    lower = max(lower, upper * 1e-14)
    if lower >= upper:
        return upper

    def energy(log_variance: float) -> float:
        x = squares / (columns * math.exp(log_variance))
        value = x - x.clamp_min(1e-300).log()
        shifted = (x - (1 + alpha)).clamp_min(2 * math.sqrt(alpha))
        t = (shifted + (shifted.square() - 4 * alpha).clamp_min(0).sqrt()) / 2
        gain = (t + 1).log() + alpha * (t / alpha + 1).log() - t
        return float((value + torch.where(x > smallest, gain, 0.0)).sum())

    bounds = (math.log(lower), math.log(upper))
    found = minimize_scalar(energy, bounds=bounds, method="bounded", options={"xatol": 1e-8})
    return math.exp(float(found.x))
