"""Reduced-rank regression on changed inputs, against the data themselves."""

import pytest
import torch
from torch import Tensor

from sft.core.errors import InputError
from sft.decompositions import anchored_factors, restricted_anchored_factors


def changed() -> tuple[Tensor, Tensor, Tensor]:
    """Centred original outputs ``(2, 6, N)``, changed patches ``(2, 10, N)``, and the kernel."""
    torch.manual_seed(0)
    kernel = torch.randn(2, 6, 5, 2, dtype=torch.float64)
    mixing = torch.randn(2, 10, 10, dtype=torch.float64) * torch.logspace(0, -1, 10).double()
    x = mixing @ torch.randn(2, 10, 400, dtype=torch.float64)
    seen = 0.7 * x + 0.4 * torch.randn(2, 10, 400, dtype=torch.float64) * x.roll(1, 1)
    y, seen = kernel.flatten(2) @ x, seen
    return y - y.mean(2, keepdim=True), seen - seen.mean(2, keepdim=True), kernel


def error_of(y: Tensor, prediction: Tensor) -> float:
    return float((y - prediction).square().sum() / y.square().sum())


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_it_is_the_best_map_of_that_rank(rank: int) -> None:
    y, seen, kernel = changed()
    variance = float(y.square().sum() / 400)
    found = anchored_factors(y @ seen.mT / 400, seen @ seen.mT / 400, rank, variance)
    error = error_of(y, found.second @ (found.first @ seen))
    assert float(found.errors[rank - 1]) == pytest.approx(error, rel=1e-6)
    wanted = 0.0
    for g in range(2):
        fit = torch.linalg.lstsq(seen[g].T, y[g].T).solution.T @ seen[g]
        s = torch.linalg.svdvals(fit).square()
        wanted += float((y[g] - fit).square().sum() + s[rank:].sum())
    assert error == pytest.approx(wanted / float(y.square().sum()), rel=1e-6)
    basis = torch.linalg.eigh(y @ y.mT)[1].flip(2)[..., :rank]
    symmetric = basis @ (basis.mT @ kernel.flatten(2) @ seen)
    assert error < error_of(y, symmetric)


def test_the_restricted_form_is_its_own_optimum_and_not_better() -> None:
    y, seen, kernel = changed()
    own = kernel.flatten(2) @ seen
    found = restricted_anchored_factors(kernel, y @ own.mT / 400, own @ own.mT / 400, 3)
    free = anchored_factors(y @ seen.mT / 400, seen @ seen.mT / 400, 3)
    assert found.first.shape == free.first.shape
    error = error_of(y, found.second @ (found.first @ seen))
    assert error >= error_of(y, free.second @ (free.first @ seen))
    direct = anchored_factors(y @ own.mT / 400, own @ own.mT / 400, 3)
    assert error == pytest.approx(error_of(y, direct.second @ (direct.first @ own)), rel=1e-9)


def test_unchanged_inputs_give_the_principal_outputs() -> None:
    torch.manual_seed(0)
    kernel = torch.randn(1, 4, 6, 1, dtype=torch.float64)
    x = torch.randn(1, 6, 50, dtype=torch.float64)
    y = kernel.flatten(2) @ x
    found = anchored_factors(y @ x.mT, x @ x.mT, 2)
    basis = torch.linalg.eigh(y @ y.mT)[1].flip(2)[..., :2]
    torch.testing.assert_close(
        found.second @ found.first, basis @ (basis.mT @ kernel.flatten(2)), rtol=1e-6, atol=1e-6
    )
    assert float(found.errors[-1]) == 0


@pytest.mark.parametrize(
    ("cross", "covariance", "rank", "words"),
    [
        (torch.ones(1, 3, 4), torch.ones(1, 3, 3), 1, "belong together"),
        (torch.ones(3, 4), torch.ones(1, 4, 4), 1, "belong together"),
        (torch.ones(1, 3, 4), torch.eye(4)[None], 4, "Rank 4"),
        (torch.ones(1, 3, 4), torch.eye(4)[None], 0, "Rank 0"),
        (torch.ones(1, 3, 4), torch.full((1, 4, 4), torch.nan), 1, "NaN"),
    ],
)
def test_moments_that_do_not_fit(cross: Tensor, covariance: Tensor, rank: int, words: str) -> None:
    with pytest.raises(InputError, match=words):
        anchored_factors(cross, covariance, rank)
