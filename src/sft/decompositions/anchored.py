"""Output-side split of a layer whose inputs have changed: reduced-rank regression.

Behind layers that are compressed already, a layer sees ``x^`` where the original network has `x`.
The best pair then maps ``x^`` to the *original* outputs ``y = W x``. With the centred moments
``X = E[y x^^T]`` and ``C^ = E[x^ x^^T]``

    M = [X C^^(-1/2)]_r C^^(-1/2) = U_r U_r^T X C^^(-1)

where `U` are the eigenvectors of ``X C^^(-1) X^T`` (Izenman 1975). The error is measured against
`y`, so errors of the prefix that this layer can mend are mended. The bias is
``b + mu_y - M mu_x^``.
"""

import dataclasses

import torch
from torch import Tensor

from sft.core.errors import InputError
from sft.decompositions.bases import principal_basis_of_gram, relative_tails
from sft.decompositions.solvers import solve_spd


@dataclasses.dataclass(frozen=True)
class AnchoredFactors:
    """``first (G, r, D)`` and ``second (G, o, r)`` of ``M = second first``, and the menu.

    errors : ``(k,)`` at rank 1, 2, ...: relative to the outputs' variance if that was given; else
        what is lost beside full rank, relative to what full rank explains.
    """

    first: Tensor
    second: Tensor
    errors: Tensor


def anchored_factors(
    cross: Tensor, covariance: Tensor, rank: int, variance: float | None = None
) -> AnchoredFactors:
    """The best rank-r map from the changed inputs to the original outputs, per group.

    cross : ``(G, o, D)`` centred cross moment of original outputs and changed patches.
    covariance : ``(G, D, D)`` centred covariance of changed patches.
    variance : sum of the variances of all original outputs.
    Raises `InputError` for shapes that do not fit and a rank above ``min(o, D)``.
    """
    _check(cross, covariance, rank)
    full = solve_spd(covariance, cross.mT).mT
    gram = full @ cross.mT
    energies, basis = principal_basis_of_gram((gram + gram.mT) / 2, full)
    kept = basis[..., :rank]
    return AnchoredFactors(kept.mT @ full, kept, _errors(energies, variance))


def restricted_anchored_factors(
    kernel: Tensor, cross: Tensor, covariance: Tensor, rank: int, variance: float | None = None
) -> AnchoredFactors:
    """As `anchored_factors`, restricted to maps of the layer's present outputs ``y^ = W x^``.

    Only ``(o, o)`` moments are needed, and the error is greater or equal: what `W` does not let
    through cannot be used.

    kernel : canonical ``(G, o, i, S)``. cross : ``(G, o, o)`` of y and y^. covariance :
    ``(G, o, o)`` of y^.
    """
    small = anchored_factors(cross, covariance, rank, variance)
    return dataclasses.replace(small, first=small.first @ kernel.flatten(2).to(small.first))


def _errors(energies: Tensor, variance: float | None) -> Tensor:
    if variance is None:
        return relative_tails(energies)
    explained = energies.sum(0).cumsum(0)
    return (1 - explained / max(variance, 1e-300)).clamp_min(0)


def _check(cross: Tensor, covariance: Tensor, rank: int) -> None:
    if cross.ndim != 3 or covariance.shape != (len(cross), cross.shape[2], cross.shape[2]):
        raise InputError(
            f"The cross moment has shape {tuple(cross.shape)} and the covariance "
            f"{tuple(covariance.shape)}; (G, o, D) and (G, D, D) belong together."
        )
    full = min(cross.shape[1:])
    if not 1 <= rank <= full:
        raise InputError(
            f"Rank {rank} does not fit a cross moment of shape {tuple(cross.shape)}: 1 to {full}."
        )
    if not bool(torch.isfinite(cross).all() and torch.isfinite(covariance).all()):
        raise InputError("The moments hold NaN or infinite values: check the calibration data.")
