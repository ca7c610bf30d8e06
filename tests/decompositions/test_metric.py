"""Whitening against the covariance written out."""

import dataclasses

import pytest
import torch

from sft.core.geometry import Geometry
from sft.decompositions.metric import Metric, channel_covariance, root_of

GEOMETRY = Geometry(6, 8, (2, 3), (1, 1), (0, 0), (1, 1), groups=2)


def test_root_and_inverse() -> None:
    torch.manual_seed(0)
    factor = torch.randn(2, 5, 5, dtype=torch.float64)
    covariance = factor @ factor.mT
    found = root_of(covariance, 0.0)
    torch.testing.assert_close(found.root @ found.root, covariance)
    identity = torch.eye(5, dtype=torch.float64).expand(2, -1, -1)
    torch.testing.assert_close(found.root @ found.inverse, identity)


@pytest.mark.parametrize("factor", [0.0, 1e-300])
def test_a_covariance_of_nothing_has_the_identity_as_root(factor: float) -> None:
    found = root_of(factor * torch.eye(3, dtype=torch.float64)[None])
    assert bool(torch.isfinite(found.root).all() and torch.isfinite(found.inverse).all())
    torch.testing.assert_close(
        found.root @ found.inverse, torch.eye(3, dtype=torch.float64)[None], rtol=1e-9, atol=1e-9
    )


def test_a_dead_channel_is_regularised() -> None:
    found = root_of(torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))[None])
    assert float(found.inverse.max()) < 2e3


def test_error_is_that_of_the_kronecker_covariance_on_both_sides(seen) -> None:
    case = seen(GEOMETRY, gradients=True)
    statistics, kernel = case.statistics, case.kernel
    other = kernel + torch.randn_like(kernel)

    def energy(k: torch.Tensor) -> float:
        total = 0.0
        for g in range(2):
            channels, taps = statistics.input_covariance[g], statistics.tap_covariance
            covariance = torch.kron(channels, taps)
            rows = k[g].flatten(1)
            total += float(
                torch.trace(statistics.gradient_covariance[g] @ rows @ covariance @ rows.T)
            )
        return total

    metric = Metric.of(statistics, kernel)
    wanted = energy(kernel - other) / energy(kernel)
    assert metric.error(kernel, other) == pytest.approx(wanted, rel=1e-4)
    assert Metric.of(None, kernel).error(kernel, 0 * kernel) == pytest.approx(1)


def test_factors_come_back_from_the_whitened_modes(seen) -> None:
    case = seen(GEOMETRY, gradients=True)
    metric, kernel = Metric.of(case.statistics, case.kernel), case.kernel
    back = metric.off_outputs(metric.on_outputs(kernel).flatten(2)).view_as(kernel)
    torch.testing.assert_close(back, kernel, rtol=1e-9, atol=1e-9)
    back = metric.off_inputs(metric.on_inputs(kernel).mT.flatten(1, 2)).view_as(kernel.mT).mT
    torch.testing.assert_close(back, kernel, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(metric.off_taps(metric.on_taps(kernel)), kernel)


def test_channels_are_known_from_patches_too(seen) -> None:
    statistics = seen(GEOMETRY).statistics
    only_patches = dataclasses.replace(statistics, input_covariance=None)
    torch.testing.assert_close(channel_covariance(only_patches), statistics.input_covariance)
    nothing = dataclasses.replace(only_patches, patch_covariance=None)
    assert channel_covariance(nothing) is None
