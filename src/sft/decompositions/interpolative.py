"""The interpolative scheme: r outputs of the kernel, and all others as combinations of those.

A kernel of rank r, ``K = A B`` with ``A (o, r)`` and ``B (r, i S)``, is the same for ``A R`` and
``R^-1 B`` whatever R. With R the inverse of r independent rows of A, those rows become the
identity: the r outputs that they stand for are computed by the kernel itself and need no second
layer. That leaves ``r (i S + o - r)`` weights, exactly the degrees of freedom of such a kernel, so
the split is cheaper than the dense layer at *every* rank below full, where ``r (i S + o)`` of
`channel_out` breaks even only far below. The error is that of `channel_out` at the same rank.

The rows are those of a QR decomposition of ``A^T`` with column pivoting (Gu and Eisenstat 1996;
interpolative decomposition: Cheng, Gimbutas, Martinsson and Rokhlin 2005), exchanged while an
entry of ``A R`` is large (maximum volume: Goreinov et al. 1997), which bounds the second factor.
"""

import scipy.linalg
import torch
from torch import Tensor, nn

from sft.core.geometry import Geometry
from sft.core.records import Target
from sft.core.statistics import Statistics
from sft.decompositions.base import Chain, Factorization, Rank, corrected_bias, kernel_of
from sft.decompositions.channel_out import analyse_outputs
from sft.layers.interpolative import INTERPOLATIVE, interpolative_parts
from sft.layers.like import interpolative_like

LARGEST = 1.5  # entry of the second factor that is not exchanged away
EXCHANGES = 200


class Interpolative(Chain):
    """The kernel ``I -> G r``, then pointwise ``G r -> O - G r``, side by side and in order."""

    name = INTERPOLATIVE
    refinable = False

    def full_rank(self, geometry: Geometry) -> Rank:
        outputs, inputs = (n // geometry.groups for n in (geometry.outputs, geometry.inputs))
        return (min(outputs, inputs * geometry.taps),)

    def factors(self, geometry: Geometry, rank: Rank) -> tuple[Geometry, ...]:
        return interpolative_parts(geometry, rank)

    def lane(self, target: Target) -> Rank:
        return (target.output_lane,)

    def analyse(
        self, kernel: Tensor, geometry: Geometry, statistics: Statistics | None
    ) -> Factorization:
        outputs = analyse_outputs(kernel, statistics)

        def assemble(rank: Rank) -> list[Tensor]:
            _, first, second = _interpolate(*outputs.factors(rank))
            return [first, second] if second.shape[1] else [first]

        return Factorization(outputs.errors, outputs.energies, assemble)

    @torch.no_grad()
    def build(
        self,
        layer: nn.Module,
        rank: Rank,
        statistics: Statistics | None,
        *,
        refine: bool = False,
    ) -> nn.Module:
        kernel = kernel_of(layer)
        chosen, first, second = _interpolate(*analyse_outputs(kernel, statistics).factors(rank))
        small = interpolative_like(layer, rank)
        small.select(chosen)
        kernels = [first, second] if second.shape[1] else [first]
        lost = kernel - small.product(kernels)
        small.load_factors(kernels, corrected_bias(layer, lost, statistics))
        return small


def _interpolate(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Chosen outputs ``(G, r)``; kernels that compute them ``(G, r, i, S)`` and the rest
    ``(G, o - r, r, 1)``, of a pair ``first (G, r, i, S)``, ``second (G, o, r, 1)``.
    """
    picked, computed, mixing = [], [], []
    for basis, kernel in zip(second[..., 0], first, strict=True):
        rows = choose_rows(basis)
        rest = torch.ones(len(basis), dtype=torch.bool)
        rest[rows] = False
        square = basis[rows]
        picked.append(rows)
        computed.append((square @ kernel.flatten(1)).view_as(kernel))
        mixing.append(torch.linalg.solve(square.T, basis[rest].T).T)
    return torch.stack(picked), torch.stack(computed), torch.stack(mixing)[..., None]


def choose_rows(basis: Tensor) -> Tensor:
    """Indices ``(r,)`` of rows of ``(o, r)`` that span it well: no row needs large weights."""
    _, pivots = scipy.linalg.qr(basis.T.cpu().numpy(), mode="r", pivoting=True)
    order = torch.from_numpy(pivots.astype("int64"))
    rows, rank = order[: basis.shape[1]].clone(), basis.shape[1]
    mixing = torch.linalg.solve(basis[rows].T, basis.T).T
    for _ in range(EXCHANGES):
        worst = int(mixing.abs().argmax())
        row, place = divmod(worst, rank)
        if float(mixing[row, place].abs()) <= LARGEST:
            break
        step = mixing[row].clone()
        step[place] -= 1
        mixing -= torch.outer(mixing[:, place] / mixing[row, place], step)
        rows[place] = row
    return rows.sort().values
