"""The depthwise-separable scheme: pointwise, one small kernel a channel, pointwise.

That is a canonical polyadic (CP) decomposition of the kernel into r terms ``tap (x) output (x)
input``, in its stable, nested form. The whitened kernel `Kw` (`metric`) is first split along its
taps, by the left singular vectors `c_j` of its ``(S, o i)`` unfolding, then each part by itself:

    Kw = sum_j c_j (x) M_j        M_j = sum_k s_jk u_jk v_jk^T

The terms ``s_jk c_j (x) u_jk (x) v_jk`` are orthogonal to one another, so the r largest make a
nested decomposition whose squared error is the sum of the others, for every r at once, and no terms
grow and cancel as in a best CP approximation, which need not exist (Phan et al. 2020). It is exact
at rank ``min(S, o i) min(o, i)``. Network Decoupling (Guo et al. 2018) splits in this way. Terms
that need not be orthogonal fit better: `polyadic` without statistics, `refine` with them.
"""

import functools

from torch import Tensor

from sft.core.geometry import Geometry
from sft.core.statistics import Statistics
from sft.decompositions.base import Chain, Factorization, Rank
from sft.decompositions.bases import (
    descending_eigh,
    descending_eigvalsh,
    principal_basis,
    relative_tails,
)
from sft.decompositions.metric import Metric
from sft.decompositions.polyadic import fit_terms
from sft.decompositions.refine import data_error
from sft.layers.chains import SEPARABLE


class Separable(Chain):
    """Pointwise ``I -> G r``, depthwise kernel on ``G r``, pointwise ``G r -> O``."""

    name = SEPARABLE

    def _refusal(self, geometry: Geometry) -> str | None:
        if geometry.pointwise:
            return "its kernel has one tap; two factors say all there is (channel_out)"
        return None

    def full_rank(self, geometry: Geometry) -> Rank:
        outputs, inputs = (n // geometry.groups for n in (geometry.outputs, geometry.inputs))
        return (min(geometry.taps, outputs * inputs) * min(outputs, inputs),)

    def analyse(
        self, kernel: Tensor, geometry: Geometry, statistics: Statistics | None
    ) -> Factorization:
        metric = Metric.of(statistics, kernel)
        half = metric.on_taps(kernel)
        whitened = metric.on_outputs(metric.on_inputs(half))
        _, taps = principal_basis(_by_taps(whitened), _by_taps(half))
        parts = (taps.mT @ _by_taps(half)).reshape(len(kernel), -1, *kernel.shape[1:3])
        energies = descending_eigvalsh(_grams(_on_both(parts, metric)))
        terms = functools.cache(lambda: _terms(parts, metric))
        ranked, order = energies.flatten(1).sort(dim=1, descending=True, stable=True)

        def assemble(rank: Rank) -> list[Tensor]:
            inputs, outputs = terms()
            chosen = order[:, : rank[0]]
            index = chosen[..., None]
            last = outputs.flatten(1, 2).gather(1, index.expand(-1, -1, outputs.shape[-1]))
            first = inputs.flatten(1, 2).gather(1, index.expand(-1, -1, inputs.shape[-1]))
            part = (chosen // energies.shape[2])[:, None].expand(-1, kernel.shape[3], -1)
            tap = metric.off_taps(taps.gather(2, part).mT)
            first, tap, last = _balanced_terms(first, tap, last)
            depthwise = tap.reshape(-1, 1, 1, tap.shape[2])
            return [first[..., None], depthwise, last.mT[..., None]]

        return Factorization(relative_tails(ranked), (ranked,), assemble)

    def _refined(
        self,
        kernel: Tensor,
        geometry: Geometry,
        rank: Rank,
        kernels: list[Tensor],
        statistics: Statistics | None,
    ) -> list[Tensor]:
        if statistics is not None:
            return super()._refined(kernel, geometry, rank, kernels, statistics)
        parts = self.factors(geometry, rank)
        free = fit_terms(kernel, rank[0])
        return min(
            (free, kernels), key=lambda chain: data_error(kernel, chain, parts, geometry, None)
        )


def _terms(parts: Tensor, metric: Metric) -> tuple[Tensor, Tensor]:
    """The terms of each part, largest first: rows ``(G, J, n, i)`` and ``(G, J, n, o)``.

    parts : ``(G, J, o, i)``. The side that is complete carries the orthonormal basis, the other
    what the part makes of it: no small singular value is divided by, so all terms sum to the part.
    """
    vectors = descending_eigh(_grams(_on_both(parts, metric)))[1]
    if parts.shape[2] <= parts.shape[3]:
        rows = vectors.mT
        rows = rows if metric.outputs is None else rows @ metric.outputs.root[:, None]
        outputs = metric.off_outputs(vectors.transpose(1, 2).flatten(2))
        outputs = outputs.reshape(vectors.transpose(1, 2).shape)
        return rows @ parts, outputs.permute(0, 2, 3, 1)
    columns = vectors if metric.inputs is None else metric.inputs.root[:, None] @ vectors
    inputs = metric.off_inputs(vectors.mT.flatten(1, 2)).reshape(vectors.mT.shape)
    return inputs, (parts @ columns).mT


def _grams(parts: Tensor) -> Tensor:
    """The smaller Gram matrix of each part."""
    return parts @ parts.mT if parts.shape[2] <= parts.shape[3] else parts.mT @ parts


def _on_both(parts: Tensor, metric: Metric) -> Tensor:
    """Parts ``(G, J, o, i)`` whitened on outputs and inputs."""
    if metric.inputs is not None:
        parts = parts @ metric.inputs.root[:, None]
    return parts if metric.outputs is None else metric.outputs.root[:, None] @ parts


def _balanced_terms(*factors: Tensor) -> list[Tensor]:
    """The factors ``(G, r, n)`` of each term scaled to one norm; a term of zero stays as it is."""
    norms = [factor.norm(dim=2, keepdim=True) for factor in factors]
    product = norms[0] * norms[1] * norms[2]
    level = product.pow(1 / len(factors))
    return [
        (factor * (level / norm)).where(product > 0, factor)
        for factor, norm in zip(factors, norms, strict=True)
    ]


def _by_taps(kernel: Tensor) -> Tensor:
    """``(G, o, i, S)`` to ``(G, S, o i)``."""
    return kernel.flatten(1, 2).mT
