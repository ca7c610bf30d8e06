"""The data-aware closed forms against what is measured on the data itself."""

import pytest
import torch
from torch import nn

from sft.core.errors import InputError
from sft.decompositions import choose_rank, decompositions, factorize
from sft.profiling.statistics import gather_statistics


def correlated_case() -> tuple[nn.Conv2d, torch.Tensor]:
    """A convolution whose inputs are far from white and have a mean."""
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 12, 3, padding=1).double()
    mixing = torch.randn(8, 8, dtype=torch.float64) @ torch.diag(torch.logspace(0, -2, 8).double())
    x = torch.einsum("ij,njhw->nihw", mixing, torch.randn(4, 8, 10, 10, dtype=torch.float64))
    return conv, x + torch.randn(8, 1, 1, dtype=torch.float64)


def measured_error(small: nn.Module, conv: nn.Conv2d, x: torch.Tensor) -> float:
    y, z = conv(x).detach(), small(x).detach()
    centred = y - y.mean((0, 2, 3), keepdim=True)
    return float((y - z).square().sum() / centred.square().sum())


@pytest.mark.parametrize("rank", [1, 3, 6, 11])
def test_output_side_error_is_the_closed_form_one(rank: int) -> None:
    conv, x = correlated_case()
    statistics = gather_statistics(nn.Sequential(conv), ["0"], [x])[0]["0"]
    predicted = decompositions["channel_out"].errors(conv.weight, statistics)[rank - 1]
    measured = measured_error(factorize(conv, "channel_out", rank, statistics), conv, x)
    assert measured == pytest.approx(float(predicted), rel=1e-6)


@pytest.mark.parametrize("rank", [1, 3, 6, 11])
def test_output_side_is_never_worse_than_plain_or_than_random_subspaces(rank: int) -> None:
    conv, x = correlated_case()
    statistics = gather_statistics(nn.Sequential(conv), ["0"], [x])[0]["0"]
    best = measured_error(factorize(conv, "channel_out", rank, statistics), conv, x)
    assert best <= measured_error(factorize(conv, "channel_out", rank), conv, x) + 1e-12
    y = conv(x).detach()
    y = (y - y.mean((0, 2, 3), keepdim=True)).transpose(0, 1).flatten(1)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        basis = torch.linalg.qr(torch.randn(12, rank, dtype=torch.float64, generator=generator))[0]
        assert best <= float((y - basis @ (basis.T @ y)).square().sum() / y.square().sum()) + 1e-12


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_input_side_beats_plain_on_correlated_channels(rank: int) -> None:
    conv, x = correlated_case()
    statistics = gather_statistics(nn.Sequential(conv), ["0"], [x])[0]["0"]
    aware = measured_error(factorize(conv, "channel_in", rank, statistics), conv, x)
    assert aware < measured_error(factorize(conv, "channel_in", rank), conv, x)


@pytest.mark.parametrize("scheme", ["channel_in", "channel_out"])
def test_the_bias_takes_up_the_dropped_mean(scheme: str) -> None:
    conv, x = correlated_case()
    statistics = gather_statistics(nn.Sequential(conv), ["0"], [x])[0]["0"]
    small = factorize(conv, scheme, 2, statistics)
    difference = (small(x) - conv(x)).detach().mean((0, 2, 3))
    assert float(difference.abs().max()) < 1e-9


def test_l1_and_l2_choose_the_rank() -> None:
    conv = nn.Conv2d(6, 9, 3).double()
    loose, tight = (factorize(conv, "channel_out", l1=t, l2=t) for t in (0.01, 0.4))
    assert loose.rank > tight.rank
    assert tight.rank == max(1, choose_rank(conv.weight.detach().flatten(1), 0.4, 0.4))


def test_rank_and_objective_exclude_each_other() -> None:
    with pytest.raises(InputError, match="either"):
        factorize(nn.Conv2d(6, 9, 3), "channel_in", 3, l1=0.1, l2=0.1)
    with pytest.raises(InputError, match="rank="):
        factorize(nn.Conv2d(6, 9, 3), "channel_in")
