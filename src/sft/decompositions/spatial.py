"""The spatial scheme: one axis of the kernel alone, then all the others.

The whitened kernel (`metric`) is unfolded to ``(i a, o b)``, with `a` the taps along the first axis
that has several and `b` those along the others. With its first r left singular vectors `V`

    first = V_r^T (C (x) Ta)^(-1/2)        second = K (C (x) Ta)^(1/2) V_r

and the error at rank r is the tail of its squared singular values. The covariance of the taps is
used as the product of its two marginals `Ta` and `Tb`, since only those can be taken out of one
factor each.
"""

import math

import torch
from torch import Tensor

from sft.core.geometry import Geometry
from sft.core.records import Target
from sft.core.statistics import Statistics
from sft.decompositions.base import Chain, Factorization, Rank
from sft.decompositions.bases import balanced, principal, relative_tails
from sft.decompositions.metric import Metric, Root, root_of
from sft.layers.chains import SPATIAL

REGULARISATION = 1e-5  # of the taps: their root is inverted together with that of the channels


class Spatial(Chain):
    """The first long axis ``I -> G r``, then the other axes ``G r -> O``."""

    name = SPATIAL

    def _refusal(self, geometry: Geometry) -> str | None:
        if sum(extent > 1 for extent in geometry.kernel) < 2:
            return "its kernel has fewer than two axes with more than one tap"
        return None

    def full_rank(self, geometry: Geometry) -> Rank:
        outputs, inputs = (n // geometry.groups for n in (geometry.outputs, geometry.inputs))
        lead = geometry.kernel[lead_axis(geometry)]
        return (min(inputs * lead, outputs * (geometry.taps // lead)),)

    def lane(self, target: Target) -> Rank:
        return (target.output_lane,)

    def analyse(
        self, kernel: Tensor, geometry: Geometry, statistics: Statistics | None
    ) -> Factorization:
        metric = Metric.of(statistics, kernel)
        lead, others = _marginal_roots(geometry, statistics, kernel)
        half = _split_taps(metric.on_inputs(kernel), geometry)
        half = half if lead is None else lead.root @ half
        whitened = metric.on_outputs(half if others is None else half @ others.root)
        energies, basis = principal(_unfold(whitened), _unfold(half))
        groups, _, inputs, taps, _ = half.shape
        rows = _unfold(half).mT

        def assemble(rank: Rank) -> list[Tensor]:
            kept = basis()[..., : rank[0]]
            first = kept.mT.reshape(groups, rank[0], inputs, taps)
            first = first if lead is None else first @ lead.inverse
            first = metric.off_inputs(first.transpose(2, 3).flatten(1, 2))
            first = first.reshape(groups, rank[0], taps, inputs).transpose(2, 3)
            second = (rows @ kept).reshape(groups, half.shape[1], half.shape[4], rank[0])
            return balanced([first, second.mT])

        return Factorization(relative_tails(energies), (energies,), assemble)


def lead_axis(geometry: Geometry) -> int:
    """The axis that stands alone: the first with more than one tap."""
    return next(axis for axis, extent in enumerate(geometry.kernel) if extent > 1)


def _split_taps(kernel: Tensor, geometry: Geometry) -> Tensor:
    """``(G, o, i, S)`` to ``(G, o, i, a, b)``."""
    opened = kernel.reshape(*kernel.shape[:3], *geometry.kernel)
    return opened.movedim(3 + lead_axis(geometry), 3).flatten(4)


def _unfold(kernel: Tensor) -> Tensor:
    """``(G, o, i, a, b)`` to ``(G, i a, o b)``."""
    groups, outputs, inputs, lead, others = kernel.shape
    return kernel.permute(0, 2, 3, 1, 4).reshape(groups, inputs * lead, outputs * others)


def _marginal_roots(
    geometry: Geometry, statistics: Statistics | None, like: Tensor
) -> tuple[Root | None, Root | None]:
    """Roots of the covariances of the taps along the lead axis ``(a, a)`` and the others."""
    if statistics is None:
        return None, None
    lead, axes = lead_axis(geometry), geometry.axes
    covariance = statistics.tap_covariance.to(like).reshape(*geometry.kernel, *geometry.kernel)
    covariance = covariance.movedim((lead, axes + lead), (0, axes))
    a = geometry.kernel[lead]
    b = math.prod(geometry.kernel) // a
    covariance = covariance.reshape(a, b, a, b)
    along = torch.einsum("abcb->ac", covariance) / b
    across = torch.einsum("abad->bd", covariance) / a
    return root_of(along, REGULARISATION), root_of(across, REGULARISATION)
