"""A few-bit weight with a low-rank branch beside it: ``W ~ Q + A B``.

`Q` is the weight rounded to the nearest of its few levels, per output channel; ``A B`` is the
output-side split (`channel_out`) of what rounding left, in the norm of the data. The two are
alternated: `Q` rounds ``W - A B``, then ``A B`` splits ``W - Q``; the best round is kept.

The menu of ranks is that of the first round: error(r) is the tail of the energies of ``W - Q``
relative to the energy of `W`. Energies are exact where the covariance of patches is known, else
those of the whitened kernel (`metric`).
"""

import torch
from torch import Tensor, nn

from sft.core.geometry import Geometry, chain_macs, chain_params
from sft.core.kernels import compose, geometry_of
from sft.core.records import Target
from sft.core.statistics import Statistics
from sft.decompositions.base import (
    Chain,
    Factorization,
    Rank,
    corrected_bias,
    kernel_of,
)
from sft.decompositions.bases import relative_tails
from sft.decompositions.channel_out import split_outputs
from sft.decompositions.metric import Metric
from sft.layers.chains import CHAINS, CHANNEL_OUT
from sft.layers.like import residual_like
from sft.layers.residual import RESIDUAL
from sft.quantizers.linear import round_trip

ROUNDS = 3


class Residual(Chain):
    """The whole kernel at `bits`, and beside it the kernel ``I -> G r`` and pointwise ``G r -> O``.

    It costs all that the dense layer costs and the branch on top: a lever on size at 2 to 4 bits,
    never on multiply-accumulates.
    """

    name = RESIDUAL
    refinable = False

    def __init__(self, bits: int = 3) -> None:
        self.bits = bits

    def full_rank(self, geometry: Geometry) -> Rank:
        outputs, inputs = (n // geometry.groups for n in (geometry.outputs, geometry.inputs))
        return (min(outputs, inputs * geometry.taps),)

    def factors(self, geometry: Geometry, rank: Rank) -> tuple[Geometry, ...]:
        """The dense layer, then the two of the branch beside it."""
        return (geometry, *CHAINS[CHANNEL_OUT](geometry, rank))

    def params(self, geometry: Geometry, rank: Rank) -> int:
        return chain_params(self.factors(geometry, rank))

    def macs(self, geometry: Geometry, rank: Rank, size: Rank) -> int:
        dense, *branch = self.factors(geometry, rank)
        return dense.macs(size) + chain_macs(branch, size)

    def lane(self, target: Target) -> Rank:
        return (target.output_lane,)

    def analyse(
        self, kernel: Tensor, geometry: Geometry, statistics: Statistics | None
    ) -> Factorization:
        metric = Metric.of(statistics, kernel)
        rounded = self._round(kernel)
        first = _split(kernel - rounded, statistics, metric)
        energies = first.energies[0]
        total = _energy(kernel, statistics, metric)

        def assemble(rank: Rank) -> list[Tensor]:
            branch = first.factors(rank)
            best = [rounded, *branch]
            smallest = energies[:, rank[0] :].sum()
            for _ in range(ROUNDS - 1):
                again = self._round(kernel - _product(branch, geometry, rank))
                split = _split(kernel - again, statistics, metric)
                branch, left = split.factors(rank), split.energies[0][:, rank[0] :].sum()
                if left < smallest:
                    best, smallest = [again, *branch], left
            return best

        return Factorization(relative_tails(energies, total), (energies,), assemble)

    @torch.no_grad()
    def build(
        self,
        layer: nn.Module,
        rank: Rank,
        statistics: Statistics | None,
        *,
        refine: bool = False,
    ) -> nn.Module:
        geometry, kernel = geometry_of(layer), kernel_of(layer)
        rounded, *branch = self.analyse(kernel, geometry, statistics).factors(rank)
        lost = kernel - rounded - _product(branch, geometry, rank)
        small = residual_like(layer, rank)
        small.load_factors([rounded, *branch], corrected_bias(layer, lost, statistics))
        return small

    def _round(self, kernel: Tensor) -> Tensor:
        """The kernel on the grid of `bits`, symmetric, one scale an output channel."""
        rows = kernel.flatten(0, 1).flatten(1)
        return round_trip(rows, self.bits, symmetric=True, axis=0).view(kernel.shape)


def _product(branch: list[Tensor], geometry: Geometry, rank: Rank) -> Tensor:
    return compose(branch, CHAINS[CHANNEL_OUT](geometry, rank), geometry)


def _split(kernel: Tensor, statistics: Statistics | None, metric: Metric) -> Factorization:
    """Output-side split of a kernel that is not the layer's own."""
    return split_outputs(kernel, _output_covariance(kernel, statistics, metric), metric)


def _output_covariance(
    kernel: Tensor, statistics: Statistics | None, metric: Metric
) -> Tensor | None:
    """``(G, o, o)`` of the outputs that any kernel would have; None for white inputs."""
    if statistics is None:
        return None
    covariance = statistics.full_covariance()
    if covariance is not None:
        rows = kernel.flatten(2)
        return rows @ covariance.to(kernel) @ rows.mT
    rows = metric.on_inputs(metric.on_taps(kernel)).flatten(2)
    return rows @ rows.mT


def _energy(kernel: Tensor, statistics: Statistics | None, metric: Metric) -> Tensor:
    covariance = _output_covariance(kernel, statistics, metric)
    if covariance is None:
        return kernel.square().sum()
    covariance = metric.on_outputs(metric.on_outputs(covariance).mT)
    return covariance.diagonal(dim1=1, dim2=2).sum()
