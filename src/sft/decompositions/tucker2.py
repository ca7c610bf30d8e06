"""The Tucker-2 scheme: pointwise, the kernel between fewer channels on both sides, pointwise.

Higher-order singular value decomposition of the whitened kernel `Kw` (`metric`) on its inputs and
outputs: with the left singular vectors `V` of its ``(i, o S)`` and `U` of its ``(o, i S)``
unfoldings

    first = V_r^T C^(-1/2)     core = U_q^T L^T K C^(1/2) V_r     last = L^(-T) U_q
    error(r, q) = 1 - || U_q^T Kw V_r ||^2 / || Kw ||^2

so one core, its energies summed up along both axes, tells the error of every pair of ranks.
"""

import torch
from torch import Tensor

from sft.core.geometry import Geometry
from sft.core.records import Target
from sft.core.statistics import Statistics
from sft.decompositions.base import Chain, Factorization, Rank
from sft.decompositions.bases import balanced, by_inputs, principal_basis, project
from sft.decompositions.metric import Metric
from sft.layers.chains import TUCKER2

SWEEPS, POWERS = 2, 2


class Tucker2(Chain):
    """Pointwise ``I -> G r``, the kernel ``G r -> G q``, pointwise ``G q -> O``: two ranks."""

    name = TUCKER2

    def _refusal(self, geometry: Geometry) -> str | None:
        if geometry.pointwise:
            return "its kernel has one tap; two factors say all there is (channel_out)"
        return None

    def full_rank(self, geometry: Geometry) -> Rank:
        outputs, inputs = (n // geometry.groups for n in (geometry.outputs, geometry.inputs))
        return min(inputs, outputs * geometry.taps), min(outputs, inputs * geometry.taps)

    def lane(self, target: Target) -> Rank:
        return target.lane, target.output_lane

    def analyse(
        self, kernel: Tensor, geometry: Geometry, statistics: Statistics | None
    ) -> Factorization:
        metric = Metric.of(statistics, kernel)
        half = metric.on_outputs(metric.on_inputs(kernel))
        whitened = metric.on_taps(half)
        inner, v = principal_basis(by_inputs(whitened), by_inputs(half))
        outer, u = principal_basis(whitened.flatten(2), half.flatten(2))
        core = project(half, u, v)
        energy = metric.on_taps(core).square().sum((0, 3)).mT

        def assemble(rank: Rank) -> list[Tensor]:
            r, q = rank
            first = metric.off_inputs(v[..., :r].mT)[..., None]
            last = metric.off_outputs(u[..., :q])[..., None]
            return balanced([first, core[:, :q, :r], last])

        return Factorization(_errors(energy), (inner, outer), assemble)

    def _refined(
        self,
        kernel: Tensor,
        geometry: Geometry,
        rank: Rank,
        kernels: list[Tensor],
        statistics: Statistics | None,
    ) -> list[Tensor]:
        if statistics is None:
            return rotate_subspaces(kernel, kernels)
        return super()._refined(kernel, geometry, rank, kernels, statistics)


def rotate_subspaces(
    kernel: Tensor, kernels: list[Tensor], sweeps: int = SWEEPS, powers: int = POWERS
) -> list[Tensor]:
    """Factors of a plain Tucker-2 split whose subspaces are fitted to one another further.

    Higher-order orthogonal iteration (De Lathauwer et al. 2000), with `powers` steps of subspace
    iteration from the present basis for each eigenproblem: products of matrices only, and the error
    does not rise.

    kernel : canonical ``(G, o, i, S)``. kernels : those of the three factors to start from.
    """
    v = torch.linalg.qr(kernels[0][..., 0].mT).Q
    u = torch.linalg.qr(kernels[2][..., 0]).Q
    for _ in range(sweeps):
        u = _turned(u, project(kernel, None, v).flatten(2), powers)
        outputs = project(kernel, u, None)
        v = _turned(v, by_inputs(outputs), powers)
    return balanced([v.mT[..., None], project(outputs, None, v), u[..., None]])


def _turned(basis: Tensor, rows: Tensor, powers: int) -> Tensor:
    """A basis ``(G, n, k)`` turned towards the principal subspace of rows ``(G, n, m)``."""
    for _ in range(powers):
        basis = torch.linalg.qr(rows @ (rows.mT @ basis)).Q
    return basis


def _errors(energy: Tensor) -> Tensor:
    """Relative error at each pair of ranks from the core's energies ``(r, q)``."""
    kept = energy.cumsum(0).cumsum(1)
    total = kept[-1, -1]
    return (total - kept).clamp_min(0) / total if float(total) > 0 else torch.zeros_like(kept)
