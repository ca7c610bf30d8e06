"""The closed form of the SFT objective against alternating minimisation from random starts."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from sft.core.errors import InputError
from sft.decompositions import solve_regularized


def objective(k: torch.Tensor, a: torch.Tensor, b: torch.Tensor, l1: float, l2: float) -> float:
    return float((k - a @ b).square().sum() / 2 + l1 * a.square().sum() + l2 * b.square().sum())


def alternate(k: torch.Tensor, l1: float, l2: float, width: int, seed: int) -> float:
    """Exact minimisation over A, then B, in turn."""
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(width, k.shape[1], dtype=torch.float64, generator=generator)
    eye = torch.eye(width, dtype=torch.float64)
    for _ in range(3000):
        a = torch.linalg.solve(b @ b.T + 2 * l1 * eye, b @ k.T).T
        b = torch.linalg.solve(a.T @ a + 2 * l2 * eye, a.T @ k)
    return objective(k, a, b, l1, l2)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_equals_alternating_minimisation(seed: int) -> None:
    torch.manual_seed(seed)
    k = torch.randn(7, 11, dtype=torch.float64)
    found = solve_regularized(k, 0.7, 0.9)
    assert alternate(k, 0.7, 0.9, 7, seed) == pytest.approx(found.value, rel=1e-8)


@given(
    l1=st.floats(0.01, 2), l2=st.floats(0.01, 2), rows=st.integers(1, 8), columns=st.integers(1, 8),
    seed=st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_value_is_that_of_the_factors_and_no_neighbour_is_better(
    l1: float, l2: float, rows: int, columns: int, seed: int
) -> None:
    torch.manual_seed(seed)
    k = torch.randn(rows, columns, dtype=torch.float64)
    found = solve_regularized(k, l1, l2)
    assert found.a.shape == (rows, found.rank)
    value = objective(k, found.a, found.b, l1, l2)
    assert value == pytest.approx(found.value, rel=1e-9, abs=1e-12)
    step = 1e-3
    nudged_a = found.a + step * torch.randn_like(found.a)
    nudged_b = found.b + step * torch.randn_like(found.b)
    assert objective(k, nudged_a, nudged_b, l1, l2) >= value - 1e-12


def test_width_limit_keeps_the_largest_shrunk_values() -> None:
    torch.manual_seed(0)
    k = torch.randn(6, 6, dtype=torch.float64)
    found = solve_regularized(k, 0.05, 0.05, max_rank=2)
    assert found.rank == 2
    assert alternate(k, 0.05, 0.05, 2, 3) == pytest.approx(found.value, rel=1e-7)


@pytest.mark.parametrize(("l1", "l2"), [(0.8, 0.8), (0.4, 1.8)])
def test_debiased_factors_are_the_best_approximation_of_the_chosen_rank(
    l1: float, l2: float
) -> None:
    torch.manual_seed(0)
    k = torch.randn(7, 11, dtype=torch.float64)
    shrunk, free = solve_regularized(k, l1, l2), solve_regularized(k, l1, l2, debias=True)
    assert 1 <= free.rank == shrunk.rank < 7
    dropped = torch.linalg.svdvals(k)[free.rank :].square().sum()
    assert float((k - free.a @ free.b).square().sum()) == pytest.approx(float(dropped), rel=1e-9)
    assert objective(k, free.a, free.b, l1, l2) == pytest.approx(free.value, rel=1e-9)
    assert free.value > shrunk.value


@pytest.mark.parametrize(("l1", "l2"), [(0.0, 1.0), (1.0, -1.0)])
def test_weights_must_be_positive(l1: float, l2: float) -> None:
    with pytest.raises(InputError, match="above 0"):
        solve_regularized(torch.eye(3), l1, l2)


def test_a_kernel_must_be_unfolded_first() -> None:
    with pytest.raises(InputError, match="matrix"):
        solve_regularized(torch.randn(2, 3, 3, 3), 1.0, 1.0)
