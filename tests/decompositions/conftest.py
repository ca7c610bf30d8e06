"""Made statistics of any geometry, with the very patches that they were taken from."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sft.core.geometry import Geometry
from sft.core.statistics import Statistics, normalize_taps


@dataclasses.dataclass(frozen=True)
class Seen:
    """Patches ``(G, D, N)`` of a layer with canonical kernel `kernel`, and their moments."""

    kernel: Tensor
    patches: Tensor
    gradients: Tensor
    statistics: Statistics

    def output_error(self, approximation: Tensor, weighted: bool = False) -> float:
        """Squared error of the outputs on the patches, relative to their variance.

        `approximation` is a canonical kernel; the mean error counts as mended by the bias.
        weighted : by the root of the gradients' second moment.
        """
        lost = self._outputs(self.kernel - approximation, weighted)
        return float(lost.square().sum() / self._outputs(self.kernel, weighted).square().sum())

    def _outputs(self, kernel: Tensor, weighted: bool) -> Tensor:
        outputs = kernel.flatten(2) @ (self.patches - self.patches.mean(2, keepdim=True))
        return self.gradients.mT @ outputs if weighted else outputs


def seen_by(
    geometry: Geometry, seed: int = 0, *, gradients: bool = False, separable: bool = False
) -> Seen:
    """A random kernel and correlated patches with a mean.

    gradients : with the second moment of made gradients. separable : the covariance of patches is
    exactly that of channels times that of taps.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    groups, taps = geometry.groups, geometry.taps
    outputs, inputs = geometry.outputs // groups, geometry.inputs // groups
    size = inputs * taps
    kernel = normal(groups, outputs, inputs, taps)
    spread = torch.logspace(0, -1.5, inputs, dtype=torch.float64)
    channels = normal(groups, inputs, inputs) * spread
    near = torch.arange(taps, dtype=torch.float64)
    smooth = torch.linalg.cholesky(0.8 ** (near[:, None] - near).abs())
    count = 4 * size + 5
    white = normal(groups, size, count)
    if separable:
        white = torch.linalg.qr((white - white.mean(2, keepdim=True)).mT).Q.mT * count**0.5
    mixed = torch.einsum(
        "gij,ts,gjsn->gitn", channels, smooth, white.view(groups, inputs, taps, -1)
    )
    if not separable:
        mixed = mixed + 0.1 * normal(groups, inputs, taps, count).cumsum(1)
    patches = mixed.reshape(groups, size, count) + normal(groups, size, 1)
    slopes = normal(groups, outputs, 3 * outputs) if gradients else None
    return Seen(kernel, patches, *_moments(kernel, patches, slopes))


def _moments(kernel: Tensor, patches: Tensor, slopes: Tensor | None) -> tuple[Tensor, Statistics]:
    groups, _, inputs, taps = kernel.shape
    count = patches.shape[2]
    centred = patches - patches.mean(2, keepdim=True)
    rows = kernel.flatten(2)
    covariance = centred @ centred.mT / count
    blocks = covariance.view(groups, inputs, taps, inputs, taps)
    tap_covariance, variance = normalize_taps(torch.einsum("gisit->st", blocks) / groups / inputs)
    second = None if slopes is None else slopes @ slopes.mT / slopes.shape[2]
    statistics = Statistics(
        output_mean=(rows @ patches).mean(2),
        output_covariance=rows @ covariance @ rows.mT,
        patch_mean=patches.mean(2),
        input_mean=patches.mean(2).view(groups, inputs, taps).mean(2),
        input_covariance=torch.einsum("gisjs->gij", blocks) / taps,
        tap_covariance=tap_covariance,
        patch_covariance=covariance,
        gradient_covariance=second,
        count=count,
        input_count=count,
        tap_variance=variance,
    )
    gradients = rows if second is None else torch.linalg.cholesky(second)
    return gradients, statistics


@pytest.fixture(scope="session")
def seen() -> Callable[..., Seen]:
    return seen_by
