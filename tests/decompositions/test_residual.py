"""A few-bit weight with a low-rank branch."""

import dataclasses
import itertools

import pytest
import torch
from torch import nn

from sft.core.geometry import Geometry
from sft.decompositions import Metric, decompositions, factorize
from sft.decompositions.residual import Residual
from sft.layers import ResidualSFT, compose
from sft.quantizers.linear import round_trip

GEOMETRY = Geometry(6, 8, (3, 3), (1, 1), (1, 1), (1, 1), groups=2)


def product(kernels: list[torch.Tensor], rank: int) -> torch.Tensor:
    branch = decompositions["channel_out"].factors(GEOMETRY, (rank,))
    return kernels[0] + compose(kernels[1:], branch, GEOMETRY)


@pytest.mark.parametrize("aware", ["plain", "patches", "channels", "gradients"])
def test_the_menu_is_that_of_what_rounding_left(aware: str, seen) -> None:
    case = seen(GEOMETRY, gradients=aware == "gradients")
    kernel = case.kernel
    statistics = None if aware == "plain" else case.statistics
    if aware == "channels":
        statistics = dataclasses.replace(statistics, patch_covariance=None)
    found = Residual(3).analyse(kernel, GEOMETRY, statistics)
    rounded = round_trip(kernel.flatten(0, 1).flatten(1), 3, symmetric=True, axis=0)
    lost = kernel - rounded.view(kernel.shape)
    if statistics is None or aware == "channels":
        metric = Metric.of(statistics, kernel)
        rows, whole = metric.whiten(lost).flatten(2), metric.whiten(kernel).flatten(2)
    else:
        root = torch.linalg.cholesky(statistics.patch_covariance)
        left = case.gradients.mT if aware == "gradients" else torch.eye(4).double()
        rows, whole = left @ lost.flatten(2) @ root, left @ kernel.flatten(2) @ root
    energies = torch.linalg.svdvals(rows).square()
    for rank, error in enumerate(found.errors.tolist(), start=1):
        wanted = float(energies[:, rank:].sum() / whole.square().sum())
        assert error == pytest.approx(wanted, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("aware", [False, True])
def test_alternation_never_does_worse_than_the_menu_and_at_times_better(aware: bool, seen) -> None:
    better = 0
    for seed in range(6):
        case = seen(GEOMETRY, seed)
        found = Residual(2).analyse(case.kernel, GEOMETRY, case.statistics if aware else None)
        for rank in (1, 2, 3):
            lost = case.kernel - product(found.factors((rank,)), rank)
            plain = float(lost.square().sum() / case.kernel.square().sum())
            measured = case.output_error(case.kernel - lost) if aware else plain
            assert measured <= float(found.errors[rank - 1]) * (1 + 1e-6)
            better += measured < 0.99 * float(found.errors[rank - 1])
    assert better >= 3


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_dense_part_is_on_the_grid_of_its_bits(bits: int, seen) -> None:
    case = seen(GEOMETRY)
    rounded, *_ = Residual(bits).analyse(case.kernel, GEOMETRY, case.statistics).factors((2,))
    for row in rounded.flatten(0, 1).flatten(1):
        assert len(row.unique()) <= 2**bits - 1
    assert len(rounded.flatten(0, 1).flatten(1)[0].unique()) > 2 ** (bits - 1)


def test_more_bits_leave_less() -> None:
    torch.manual_seed(0)
    kernel = torch.randn(1, 8, 8, 9, dtype=torch.float64)
    geometry = Geometry(8, 8, (3, 3), (1, 1), (0, 0), (1, 1))
    errors = [float(Residual(b).analyse(kernel, geometry, None).errors[0]) for b in range(2, 9)]
    assert all(fewer < 0.5 * more for more, fewer in itertools.pairwise(errors))


def test_the_cost_is_that_of_the_dense_layer_and_the_branch() -> None:
    method = decompositions["residual"]
    branch = decompositions["channel_out"]
    assert method.params(GEOMETRY, (2,)) == GEOMETRY.params + branch.params(GEOMETRY, (2,))
    size = (9, 11)
    assert method.macs(GEOMETRY, (2,), size) == GEOMETRY.macs(size) + branch.macs(
        GEOMETRY, (2,), size
    )
    assert method.factors(GEOMETRY, (2,))[0] == GEOMETRY


def test_it_builds_a_residual_layer_that_computes_what_its_kernels_say() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect").double()
    small = factorize(layer, "residual", 2)
    assert isinstance(small, ResidualSFT)
    x = torch.randn(2, 6, 7, 7, dtype=torch.float64)
    torch.testing.assert_close(small(x), small.merge()(x))
    lost = (small(x) - layer(x)).detach().square().mean() / layer(x).detach().var()
    assert float(lost) < 0.05
