"""The output-side channel scheme: the kernel to r channels, then a pointwise layer to all outputs.

Data-aware form (Zhang et al. 2015): the best rank-r subspace of the *outputs* is spanned by the
first r eigenvectors `U` of their centred covariance `Cy`, or of ``L^T Cy L`` where the second
moment ``L L^T`` of the loss gradient is known. It is exact, the optimum over all such pairs:

    first = U_r^T L^T K        second = L^(-T) U_r        error(r) = tail of the eigenvalues

The bias takes up the mean of what is dropped. Without statistics it is the truncated singular value
decomposition of `K` as an ``o x i S`` matrix.
"""

from torch import Tensor

from sft.core.geometry import Geometry
from sft.core.records import Target
from sft.core.statistics import Statistics
from sft.decompositions.base import Chain, Factorization, Rank
from sft.decompositions.bases import principal, principal_of_gram, relative_tails
from sft.decompositions.metric import Metric, root_of
from sft.layers.chains import CHANNEL_OUT


class ChannelOut(Chain):
    """The kernel ``I -> G r`` with stride, padding and dilation, then pointwise ``G r -> O``."""

    name = CHANNEL_OUT
    refinable = False

    def full_rank(self, geometry: Geometry) -> Rank:
        outputs, inputs = (n // geometry.groups for n in (geometry.outputs, geometry.inputs))
        return (min(outputs, inputs * geometry.taps),)

    def lane(self, target: Target) -> Rank:
        return (target.output_lane,)

    def analyse(
        self, kernel: Tensor, geometry: Geometry, statistics: Statistics | None
    ) -> Factorization:
        return analyse_outputs(kernel, statistics)


def analyse_outputs(kernel: Tensor, statistics: Statistics | None) -> Factorization:
    """The pairs with the first r principal directions of the outputs, for every r."""
    if statistics is None:
        return split_outputs(kernel, None, Metric())
    gradient = statistics.gradient_covariance
    left = Metric(None if gradient is None else root_of(gradient.to(kernel)))
    return split_outputs(kernel, statistics.covariance_of_outputs(kernel).to(kernel), left)


def split_outputs(kernel: Tensor, covariance: Tensor | None, metric: Metric) -> Factorization:
    """As `analyse_outputs`, in the root on outputs of a metric.

    covariance : ``(G, o, o)`` of the outputs; None for white inputs.
    """
    rows = metric.on_outputs(kernel).flatten(2)
    if covariance is None:
        energies, basis = principal(rows)
    else:
        covariance = metric.on_outputs(metric.on_outputs(covariance).mT)
        energies, basis = principal_of_gram(covariance, rows)

    def assemble(rank: Rank) -> list[Tensor]:
        kept = basis()[..., : rank[0]]
        first = (kept.mT @ rows).reshape(len(kernel), rank[0], *kernel.shape[2:])
        return [first, metric.off_outputs(kept)[..., None]]

    return Factorization(relative_tails(energies), (energies,), assemble)
