"""Rank helpers against planted ranks and against the free energy written out."""

import math

import pytest
import torch
from scipy.optimize import minimize

from sft.core.errors import InputError
from sft.core.geometry import Geometry
from sft.decompositions import (
    choose_rank,
    decompositions,
    rank_by_energy,
    rank_by_error,
    rank_by_evbmf,
    rank_by_objective,
)


def planted(rows: int, columns: int, rank: int, signal: float, seed: int) -> torch.Tensor:
    """A matrix of low rank, its singular values `signal` noise levels high, and unit noise."""
    torch.manual_seed(seed)
    u = torch.linalg.qr(torch.randn(rows, rank, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(columns, rank, dtype=torch.float64)).Q
    noise = torch.randn(rows, columns, dtype=torch.float64)
    return signal * (rows**0.5 + columns**0.5) * u @ v.T + noise


@pytest.mark.parametrize(("keep", "rank"), [(1e-9, 1), (0.6, 1), (0.8, 2), (0.91, 3), (1.0, 3)])
def test_energy(keep: float, rank: int) -> None:
    assert rank_by_energy(torch.tensor([2.0, 1.0, 6.0]).sqrt(), keep) == rank


def test_the_menu_of_a_kernel_and_its_singular_values_say_the_same() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(9, 7).double()
    method = decompositions["channel_out"]
    kernel = layer.weight.detach()[None, ..., None]
    errors = method.analyse(kernel, Geometry(9, 7), None).errors
    values = torch.linalg.svdvals(layer.weight.detach())
    for keep in (0.3, 0.6, 0.9, 1.0):
        assert rank_by_error(errors, keep) == rank_by_energy(values, keep)


def test_objective_is_never_below_one() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(5, 8)
    assert rank_by_objective(matrix, 0.5, 0.7) == choose_rank(matrix, 0.5, 0.7) > 1
    assert choose_rank(matrix, 100, 100) == 0
    assert rank_by_objective(matrix, 100, 100) == 1


@pytest.mark.parametrize(("rows", "columns"), [(40, 100), (100, 40), (60, 60)])
@pytest.mark.parametrize("rank", [1, 4, 9])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_evbmf_finds_the_planted_rank(rows: int, columns: int, rank: int, scale: float) -> None:
    matrix = scale * planted(rows, columns, rank, 2.0, seed=rank)
    assert rank_by_evbmf(matrix) == rank
    assert rank_by_evbmf(matrix, scale**2) == rank


def test_evbmf_of_noise_and_of_nothing_is_zero() -> None:
    assert rank_by_evbmf(planted(50, 80, 1, 0.0, 0)) == 0
    assert rank_by_evbmf(torch.zeros(4, 6)) == 0
    assert rank_by_evbmf(torch.ones(1, 9)) in (0, 1)


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_evbmf_threshold_is_where_the_free_energy_of_a_component_falls_below_zero(
    alpha: float,
) -> None:
    """The empirical variational free energy of one component, minimised numerically."""
    columns, noise = 60, 1.0
    rows = round(alpha * columns)

    def excess(gamma: float) -> float:
        def energy(logs: list[float]) -> float:
            a, b, sa, sb, c = (math.exp(value) for value in logs)
            va, vb = a * a + columns * sa, b * b + rows * sb
            prior = columns * math.log(c / sa) + rows * math.log(c / sb) + va / c + vb / c
            return prior - (rows + columns) + (va * vb - 2 * gamma * a * b) / noise

        start = [0.5 * math.log(gamma)] * 2 + [math.log(noise / gamma)] * 2
        ends = [
            minimize(
                energy,
                [*start, math.log(c)],
                method="Nelder-Mead",
                options={"maxiter": 20000, "maxfev": 20000, "xatol": 1e-9, "fatol": 1e-10},
            ).fun
            for c in (0.3, 1.0)
        ]
        return min(ends)

    matrix = torch.zeros(rows, columns, dtype=torch.float64)
    low, high = 1.0, 10.0 * columns
    for _ in range(60):
        middle = (low + high) / 2
        matrix[0, 0] = middle
        low, high = (low, middle) if rank_by_evbmf(matrix, noise) else (middle, high)
    assert excess(1.01 * high) < 0
    assert excess(0.99 * high) > -1e-6


@pytest.mark.parametrize("keep", [0.0, 1.1, -1.0])
def test_shares_are_shares(keep: float) -> None:
    with pytest.raises(InputError, match="keep"):
        rank_by_energy(torch.ones(3), keep)


def test_shapes() -> None:
    for call in (
        lambda: rank_by_energy(torch.ones(2, 2), 0.5),
        lambda: rank_by_error(torch.ones(0), 0.5),
        lambda: rank_by_evbmf(torch.ones(3)),
    ):
        with pytest.raises(InputError, match="shape"):
            call()
