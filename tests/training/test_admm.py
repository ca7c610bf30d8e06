"""ADMM: the nearest kernel of low rank, the penalty by its formula, and kernels that get there."""

import pytest
import torch
from torch import nn

from sft.core.data import Batches
from sft.training.admm import Nearness
from sft.training.loop import Settings, run_steps

RANKS = {"0": ("channel_in", (2,))}


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(5, 6, 3))


def lost(weight: torch.Tensor) -> float:
    """The share of a kernel's energy beyond rank 2, by numpy's way of unfolding."""
    matrix = weight.detach().transpose(0, 1).flatten(1).double()
    values = torch.linalg.svdvals(matrix).square()
    return float(values[2:].sum() / values.sum())


def test_the_distance_is_the_energy_beyond_the_rank(net) -> None:
    part = Nearness({"0": net[0]}, RANKS)
    assert part.distance() == pytest.approx(lost(net[0].weight), rel=1e-6)


def test_the_penalty_at_the_start_is_rho_half_of_that_share(net) -> None:
    part = Nearness({"0": net[0]}, RANKS, rho=0.3)
    wanted = 0.5 * 0.3 * lost(net[0].weight)
    assert float(part.penalty().detach()) == pytest.approx(wanted, rel=1e-4)


def test_kernels_are_drawn_to_low_rank_and_a_greater_rho_draws_more(net) -> None:
    x = torch.randn(64, 5, 6, 6, generator=torch.Generator().manual_seed(1))
    left = []
    for rho in (0.0, 0.1, 1.0):
        torch.manual_seed(0)
        student = nn.Sequential(nn.Conv2d(5, 6, 3))
        with torch.no_grad():
            wanted = net(x)
        part = Nearness({"0": student[0]}, RANKS, rho)

        def objective(batch: object, _: float, student=student, wanted=wanted) -> torch.Tensor:
            return 0.01 * (student(x) - wanted).square().mean()

        run_steps(student, objective, Batches(x), [part], Settings(60, learning_rate=1e-2))
        left.append(lost(student[0].weight))
    assert left[2] < left[1] < left[0]
    assert left[2] < 0.2 * left[0]
