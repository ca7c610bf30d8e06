"""The metric in which a kernel is approximated: one code for plain, data-aware and loss-aware.

With inputs taken as stationary, the covariance of a patch is about ``C (x) T``: covariance of the
channels times covariance of the taps. Then the squared error of the output is

    || L^T (K - M) (C^(1/2) (x) T^(1/2)) ||^2        L L^T = second moment of the loss gradient

so the kernel is *whitened* on each of its modes, decomposed plainly, and the factors un-whitened.
Where something is unknown its root is the identity; with no statistics at all this is the plain
decomposition of the weight. The roots are symmetric and regularised, so that they can be inverted.
"""

import dataclasses

import torch
from torch import Tensor

from sft.core.statistics import Statistics
from sft.decompositions.bases import descending_eigh

REGULARISATION = 1e-6


@dataclasses.dataclass(frozen=True)
class Root:
    """Symmetric square root ``(..., n, n)`` of a covariance, and its inverse."""

    root: Tensor
    inverse: Tensor


def root_of(covariance: Tensor, regularisation: float = REGULARISATION) -> Root:
    """Root of ``covariance + regularisation * mean diagonal``; the identity for a zero covariance.

    covariance : ``(..., n, n)``; the mean is that over all leading axes.
    """
    mean = covariance.diagonal(dim1=-2, dim2=-1).mean()
    identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    if not float(mean) > 0:
        identity = identity.expand(covariance.shape).contiguous()
        return Root(identity, identity)
    values, vectors = descending_eigh(covariance / mean)
    values = ((values + regularisation) * mean).sqrt()[..., None, :]
    return Root((vectors * values) @ vectors.mT, (vectors / values) @ vectors.mT)


@dataclasses.dataclass(frozen=True)
class Metric:
    """Roots on the modes of a canonical kernel ``(G, o, i, S)``; None is the identity.

    outputs : ``(G, o, o)`` of the gradient's second moment. inputs : ``(G, i, i)`` of the channel
    covariance. taps : ``(S, S)`` of the tap covariance.
    """

    outputs: Root | None = None
    inputs: Root | None = None
    taps: Root | None = None

    @classmethod
    def of(cls, statistics: Statistics | None, kernel: Tensor) -> "Metric":
        """The metric of the data at a layer, on the device and in the dtype of its kernel."""
        if statistics is None:
            return cls()
        channels = channel_covariance(statistics)
        gradient = statistics.gradient_covariance
        return cls(
            None if gradient is None else root_of(gradient.to(kernel)),
            None if channels is None else root_of(channels.to(kernel)),
            root_of(statistics.tap_covariance.to(kernel)) if kernel.shape[-1] > 1 else None,
        )

    def on_outputs(self, kernel: Tensor) -> Tensor:
        """A kernel ``(G, o, ...)`` whitened on its outputs."""
        if self.outputs is None:
            return kernel
        return (self.outputs.root @ kernel.flatten(2)).view(kernel.shape)

    def on_inputs(self, kernel: Tensor) -> Tensor:
        """A kernel ``(G, o, i, S)`` whitened on its inputs."""
        if self.inputs is None:
            return kernel
        rows = self.inputs.root @ kernel.transpose(1, 2).flatten(2)
        return rows.reshape(kernel.transpose(1, 2).shape).transpose(1, 2)

    def on_taps(self, kernel: Tensor) -> Tensor:
        """A kernel ``(..., S)`` whitened on its taps."""
        return kernel if self.taps is None else kernel @ self.taps.root

    def whiten(self, kernel: Tensor) -> Tensor:
        """A kernel whitened on every mode."""
        return self.on_outputs(self.on_inputs(self.on_taps(kernel)))

    def off_outputs(self, vectors: Tensor) -> Tensor:
        """Columns ``(G, o, r)`` taken back from the whitened outputs."""
        return vectors if self.outputs is None else self.outputs.inverse @ vectors

    def off_inputs(self, vectors: Tensor) -> Tensor:
        """Rows ``(G, r, i)`` taken back from the whitened inputs."""
        return vectors if self.inputs is None else vectors @ self.inputs.inverse

    def off_taps(self, vectors: Tensor) -> Tensor:
        """Rows ``(..., S)`` taken back from the whitened taps."""
        return vectors if self.taps is None else vectors @ self.taps.inverse

    def error(self, kernel: Tensor, approximation: Tensor) -> float:
        """Squared error of an approximation relative to the kernel's energy, in this metric."""
        energy = self.whiten(kernel).square().sum().clamp_min(1e-300)
        return float(self.whiten(kernel - approximation).square().sum() / energy)


def channel_covariance(statistics: Statistics) -> Tensor | None:
    """``(G, i, i)`` covariance of the input channels, or None where nothing tells it."""
    if statistics.input_covariance is not None:
        return statistics.input_covariance
    patches = statistics.patch_covariance
    return None if patches is None else mean_over_taps(patches, len(statistics.tap_covariance))


def mean_over_taps(covariance: Tensor, taps: int) -> Tensor:
    """``(G, i, i)``: the covariance ``(G, D, D)`` of patches, averaged over the taps."""
    groups, entries, _ = covariance.shape
    blocks = covariance.reshape(groups, entries // taps, taps, entries // taps, taps)
    return blocks.diagonal(dim1=2, dim2=4).mean(-1)
