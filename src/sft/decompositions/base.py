"""What every decomposition answers, and the table of them."""

from typing import Protocol

import torch
from torch import nn

from sft.core.records import Target
from sft.core.registry import Registry
from sft.core.statistics import Statistics


class Decomposition(Protocol):
    """A way to split one kernel ``(O, I, kh, kw)`` into two smaller ones.

    `errors` and `build` use the statistics of the data where they are given, and the weight alone
    (plain SVD) where they are None.
    """

    name: str

    def unsupported(self, layer: nn.Module) -> str | None:
        """Why this layer cannot be split this way, or None."""

    def full_rank(self, weight_shape: tuple[int, ...]) -> int:
        """The rank at which the split is exact."""

    def params(self, weight_shape: tuple[int, ...], rank: int) -> int:
        """Weights of both factors, without the bias."""

    def macs(
        self, weight_shape: tuple[int, ...], rank: int, input_pixels: int, output_pixels: int
    ) -> int:
        """Multiply-accumulates of both factors for one sample."""

    def lane(self, target: Target) -> int:
        """The multiple on which this scheme's rank runs well on a target."""

    def errors(self, weight: torch.Tensor, statistics: Statistics | None) -> torch.Tensor:
        """Relative output error ``(full_rank,)`` at rank 1, 2, ...; one factorisation for all."""

    def build(self, layer: nn.Module, rank: int, statistics: Statistics | None) -> nn.Module:
        """A factorised layer that stands in for `layer`; `layer` is not touched."""


decompositions: Registry[Decomposition] = Registry("decomposition")


def unsupported_convolution(layer: nn.Module) -> str | None:
    """The refusals that all two-factor channel schemes share."""
    if type(layer) is not nn.Conv2d:
        return f"{type(layer).__name__} is not an nn.Conv2d; only those are split yet"
    if layer.groups != 1:
        return f"it has {layer.groups} groups; grouped convolutions are not split yet"
    if layer.kernel_size == (1, 1):
        return "its kernel is 1x1; a channel scheme would only add a second 1x1"
    return None


def shift_bias(second: nn.Conv2d, bias: torch.Tensor | None, lost: torch.Tensor | None) -> None:
    """Give the last factor the dense layer's bias plus the mean output that was lost.

    lost : ``(O,)``, or None without statistics. A split layer always has a bias, zero where there
    is nothing to put in, so that its form depends on nothing but scheme and rank.
    """
    whole = torch.zeros(second.out_channels, dtype=torch.float64)
    whole = whole if bias is None else whole + bias.detach().double().cpu()
    whole = whole if lost is None else whole + lost
    second.bias = nn.Parameter(whole.to(second.weight))


def relative_tail(spectrum: torch.Tensor) -> torch.Tensor:
    """Share of the energy that is dropped at rank 1, 2, ...

    spectrum : ``(n,)`` energies, descending. Returns ``(n,)``, not increasing, 0 at full rank.
    """
    energy = spectrum.clamp_min(0)
    total = energy.sum()
    if total == 0:
        return torch.zeros_like(energy)
    tail = energy.flip(0).cumsum(0).flip(0)
    return torch.cat([tail[1:], tail.new_zeros(1)]) / total


def descending_eigh(symmetric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues ``(n,)``, descending, and eigenvectors ``(n, n)`` in columns of fixed sign."""
    values, vectors = torch.linalg.eigh(symmetric)
    values, vectors = values.flip(0), vectors.flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return values, vectors * torch.where(largest < 0, -1.0, 1.0)
