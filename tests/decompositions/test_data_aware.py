"""The data-aware closed forms against what is measured on the data itself, in a real layer."""

import pytest
import torch
from torch import nn

from sft.core.statistics import Statistics
from sft.decompositions import decompositions, factorize
from sft.decompositions.base import kernel_of
from sft.layers import geometry_of
from sft.profiling.statistics import gather_statistics


def correlated_case() -> tuple[nn.Conv2d, torch.Tensor]:
    """A convolution whose inputs are far from white and have a mean."""
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 12, 3, padding=1).double()
    mixing = torch.randn(8, 8, dtype=torch.float64) @ torch.diag(torch.logspace(0, -2, 8).double())
    x = torch.einsum("ij,njhw->nihw", mixing, torch.randn(4, 8, 10, 10, dtype=torch.float64))
    return conv, x + torch.randn(8, 1, 1, dtype=torch.float64)


def known(conv: nn.Conv2d, x: torch.Tensor, patches: bool = False) -> Statistics:
    wanted = ["0"] if patches else []
    found, _ = gather_statistics(nn.Sequential(conv), ["0"], [x], patch_covariances=wanted)
    return found["0"]


def measured_error(small: nn.Module, conv: nn.Conv2d, x: torch.Tensor) -> float:
    y, z = conv(x).detach(), small(x).detach()
    centred = y - y.mean((0, 2, 3), keepdim=True)
    return float((y - z).square().sum() / centred.square().sum())


@pytest.mark.parametrize("rank", [1, 3, 6, 11])
def test_output_side_error_is_the_closed_form_one(rank: int) -> None:
    conv, x = correlated_case()
    statistics = known(conv, x)
    method = decompositions["channel_out"]
    predicted = method.analyse(kernel_of(conv), geometry_of(conv), statistics).errors[rank - 1]
    measured = measured_error(factorize(conv, "channel_out", rank, statistics), conv, x)
    assert measured == pytest.approx(float(predicted), rel=1e-6)


@pytest.mark.parametrize("rank", [1, 3, 6, 11])
def test_output_side_is_never_worse_than_plain_or_than_random_subspaces(rank: int) -> None:
    conv, x = correlated_case()
    best = measured_error(factorize(conv, "channel_out", rank, known(conv, x)), conv, x)
    assert best <= measured_error(factorize(conv, "channel_out", rank), conv, x) + 1e-12
    y = conv(x).detach()
    y = (y - y.mean((0, 2, 3), keepdim=True)).transpose(0, 1).flatten(1)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        basis = torch.linalg.qr(torch.randn(12, rank, dtype=torch.float64, generator=generator))[0]
        assert best <= float((y - basis @ (basis.T @ y)).square().sum() / y.square().sum()) + 1e-12


@pytest.mark.parametrize("scheme", ["channel_in", "separable", "spatial", "tucker2"])
@pytest.mark.parametrize("rank", [2, 4, 6])
def test_other_schemes_beat_plain_on_correlated_channels_and_refining_helps(
    scheme: str, rank: int
) -> None:
    conv, x = correlated_case()
    statistics = known(conv, x, patches=True)
    plain, aware, refined = (
        measured_error(factorize(conv, scheme, rank, s, refine=refine), conv, x)
        for s, refine in ((None, False), (statistics, False), (statistics, True))
    )
    assert refined < aware < plain


@pytest.mark.parametrize("scheme", list(decompositions))
@pytest.mark.parametrize("refine", [False, True])
def test_the_bias_takes_up_the_dropped_mean(scheme: str, refine: bool) -> None:
    conv, x = correlated_case()
    small = factorize(conv, scheme, 2, known(conv, x, patches=True), refine=refine)
    difference = (small(x) - conv(x)).detach().mean((0, 2, 3))
    assert float(difference.abs().max()) < 1e-9


@pytest.mark.parametrize("scheme", ["channel_in", "channel_out"])
def test_pointwise_layers_whose_outputs_alone_are_known(scheme: str) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(12, 5, 1).double()
    x = torch.randn(4, 12, 6, 6, dtype=torch.float64) * torch.logspace(0, -1, 12)[:, None, None]
    statistics = known(conv, x)
    method = decompositions[scheme]
    errors = method.analyse(kernel_of(conv), geometry_of(conv), statistics).errors
    for rank in (1, 3):
        small = factorize(conv, scheme, rank, statistics, refine=True)
        assert measured_error(small, conv, x) == pytest.approx(float(errors[rank - 1]), rel=1e-5)
