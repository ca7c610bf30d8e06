"""The input-side channel scheme: a pointwise layer to r channels, then the kernel to all outputs.

This is the order of the published `Conv2dSFT`. With the kernel `Kw` whitened on its modes
(`metric`) and unfolded to ``(i, o S)``, the best projection of the input channels has the first r
left singular vectors `V` of it:

    first = V_r^T C^(-1/2)        second = K C^(1/2) V_r

and the error at rank r is the tail of its squared singular values. The second factor is the least
squares solution in the metric, whatever the roots on outputs and taps are. The bias takes up the
mean of what is dropped. A pointwise kernel has one split at all, that of `channel_out`.
"""

from torch import Tensor

from sft.core.geometry import Geometry
from sft.core.statistics import Statistics
from sft.decompositions.base import Chain, Factorization, Rank
from sft.decompositions.bases import balanced, by_inputs, principal, relative_tails
from sft.decompositions.channel_out import analyse_outputs
from sft.decompositions.metric import Metric
from sft.layers.chains import CHANNEL_IN


class ChannelIn(Chain):
    """Pointwise ``I -> G r``, then the kernel ``G r -> O`` with stride, padding and dilation."""

    name = CHANNEL_IN

    def full_rank(self, geometry: Geometry) -> Rank:
        outputs, inputs = (n // geometry.groups for n in (geometry.outputs, geometry.inputs))
        return (min(inputs, outputs * geometry.taps),)

    def analyse(
        self, kernel: Tensor, geometry: Geometry, statistics: Statistics | None
    ) -> Factorization:
        if geometry.pointwise:
            return analyse_outputs(kernel, statistics)
        metric = Metric.of(statistics, kernel)
        half = metric.on_inputs(kernel)
        whitened = metric.on_outputs(metric.on_taps(half))
        energies, basis = principal(by_inputs(whitened), by_inputs(half))
        rows = by_inputs(half).mT

        def assemble(rank: Rank) -> list[Tensor]:
            kept = basis()[..., : rank[0]]
            first = metric.off_inputs(kept.mT)[..., None]
            second = rows @ kept
            second = second.reshape(*kernel.shape[:2], kernel.shape[3], rank[0])
            return balanced([first, second.mT])

        return Factorization(relative_tails(energies), (energies,), assemble)
