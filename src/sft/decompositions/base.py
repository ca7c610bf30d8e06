"""What every decomposition answers, the table of them, and what those that make a chain share."""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from sft.core.geometry import Geometry, chain_macs, chain_params
from sft.core.kernels import KINDS, bias_of, compose, geometry_of, to_canonical, weight_of
from sft.core.records import Target
from sft.core.registry import Registry
from sft.core.statistics import Statistics
from sft.decompositions.refine import data_error, refine
from sft.layers.chains import CHAINS
from sft.layers.like import factorized_like

Rank = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Factorization:
    """The whole menu of ranks of one kernel.

    errors : of shape ``full_rank``: relative squared error at rank 1, 2, ... along each axis, in
        the metric of the scheme. It does not rise along an axis and is 0 at the end.
    energies : for each axis of `errors`, ``(G, n)`` squared singular values that stand behind it,
        descending in each group.
    assemble : from a rank to the canonical kernels of the factors.
    """

    errors: Tensor
    energies: tuple[Tensor, ...]
    assemble: Callable[[Rank], list[Tensor]] = dataclasses.field(repr=False)

    def factors(self, rank: Rank) -> list[Tensor]:
        """Canonical kernels of the factors of one rank, in the order in which they are applied."""
        return self.assemble(rank)


class Decomposition(Protocol):
    """A way to split one layer into smaller ones; the ranks are per group.

    `analyse` and `build` use the statistics of the data where they are given, and the weight alone
    (plain) where they are None.
    """

    name: str
    refinable: bool

    def unsupported(self, layer: nn.Module) -> str | None:
        """Why this layer cannot be split this way, or None."""

    def full_rank(self, geometry: Geometry) -> Rank:
        """The ranks at which the split is exact."""

    def factors(self, geometry: Geometry, rank: Rank) -> tuple[Geometry, ...]:
        """The layers that the split is made of."""

    def params(self, geometry: Geometry, rank: Rank) -> int:
        """Weights of all factors, without the bias."""

    def macs(self, geometry: Geometry, rank: Rank, size: Rank) -> int:
        """Multiply-accumulates of all factors for a sample whose axes have lengths `size`."""

    def lane(self, target: Target) -> Rank:
        """The multiple on which each rank runs well on a target."""

    def analyse(
        self, kernel: Tensor, geometry: Geometry, statistics: Statistics | None
    ) -> Factorization:
        """All ranks of a canonical kernel (float64) from one factorisation."""

    def build(
        self,
        layer: nn.Module,
        rank: Rank,
        statistics: Statistics | None,
        *,
        refine: bool = False,
    ) -> nn.Module:
        """A factorised layer that stands in for `layer`; `layer` is not touched.

        With `refine` the factors are fitted further to the data (or, without statistics, to the
        weight) where the closed form is not the optimum yet.
        """


decompositions: Registry[Decomposition] = Registry("decomposition")


class Chain:
    """What the schemes share whose factors follow one another."""

    name: str
    refinable = True

    def unsupported(self, layer: nn.Module) -> str | None:
        return unsupported_layer(layer) or self._refusal(geometry_of(layer))

    def _refusal(self, geometry: Geometry) -> str | None:
        """Why this scheme in particular does not split such a layer."""
        return None

    def full_rank(self, geometry: Geometry) -> Rank:
        raise NotImplementedError

    def factors(self, geometry: Geometry, rank: Rank) -> tuple[Geometry, ...]:
        return CHAINS[self.name](geometry, rank)

    def params(self, geometry: Geometry, rank: Rank) -> int:
        return chain_params(self.factors(geometry, rank))

    def macs(self, geometry: Geometry, rank: Rank, size: Rank) -> int:
        return chain_macs(self.factors(geometry, rank), size)

    def lane(self, target: Target) -> Rank:
        return (target.lane,)

    def analyse(
        self, kernel: Tensor, geometry: Geometry, statistics: Statistics | None
    ) -> Factorization:
        raise NotImplementedError

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
        kernels = self.analyse(kernel, geometry, statistics).factors(rank)
        parts = self.factors(geometry, rank)
        if refine and self.refinable and not geometry.pointwise:
            kernels = self._refined(kernel, geometry, rank, kernels, statistics)
        small = factorized_like(layer, rank, self.name)
        product = compose(kernels, parts, geometry)
        small.load_factors(kernels, corrected_bias(layer, kernel - product, statistics))
        return small

    def _refined(
        self,
        kernel: Tensor,
        geometry: Geometry,
        rank: Rank,
        kernels: list[Tensor],
        statistics: Statistics | None,
    ) -> list[Tensor]:
        """Refined from the better of two starts, so that it is never worse than plain."""
        parts = self.factors(geometry, rank)
        if statistics is not None:
            plain = self.analyse(kernel, geometry, None).factors(rank)
            kernels = min(
                (kernels, plain), key=lambda k: data_error(kernel, k, parts, geometry, statistics)
            )
        return refine(kernel, kernels, parts, geometry, statistics)[0]


def kernel_of(layer: nn.Module) -> Tensor:
    """The canonical kernel of a dense layer, in float64."""
    return to_canonical(weight_of(layer).detach().double(), geometry_of(layer))


def unsupported_layer(layer: nn.Module) -> str | None:
    """The refusals that all schemes share: what is no dense layer with a finite kernel of its own.

    The reason goes on from "this layer cannot be split: ".
    """
    kind = type(layer).__name__
    if nn.utils.parametrize.is_parametrized(layer):
        return (
            f"{kind} computes its weight by a parametrisation, which factors cannot carry over; "
            "call torch.nn.utils.parametrize.remove_parametrizations first"
        )
    if type(layer) not in KINDS.values():
        return f"{kind} is no dense convolution or linear layer of torch.nn"
    if not isinstance(layer._parameters.get("weight"), nn.Parameter):
        return (
            "its weight is computed from other parameters (weight norm, spectral norm, pruning); "
            "remove that first"
        )
    weight = weight_of(layer)
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}; only floating kernels are split"
    if geometry_of(layer).depthwise:
        return "depthwise: nothing lies between its channels; it is only quantised"
    if not bool(torch.isfinite(weight).all()):
        return "its weight holds NaN or infinite values; repair or retrain the model"
    return None


def corrected_bias(layer: nn.Module, lost: Tensor, statistics: Statistics | None) -> Tensor:
    """The bias ``(O,)`` of a split layer: the dense layer's plus the mean output that was lost.

    lost : canonical kernel of what the split leaves out. Without statistics nothing is added; a
    split layer always has a bias, so that its form depends on nothing but scheme and rank.
    """
    own = bias_of(layer)
    bias = lost.new_zeros(lost.shape[0] * lost.shape[1])
    bias = bias if own is None else bias + own.detach().to(lost)
    if statistics is not None:
        mean = statistics.patch_mean.to(lost)
        bias = bias + (lost.flatten(2) @ mean[..., None]).flatten()
    return bias
