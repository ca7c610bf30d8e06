"""Bases through Gram matrices against `torch.linalg.svd`."""

import pytest
import torch

from sft.decompositions.bases import (
    balanced,
    descending_eigh,
    fixed_signs,
    principal,
    principal_basis,
    principal_basis_of_gram,
    principal_of_gram,
    project,
    relative_tails,
)


@pytest.mark.parametrize("shape", [(2, 5, 9), (2, 9, 5), (1, 1, 4), (3, 4, 1), (1, 6, 6)])
def test_energies_and_vectors_are_those_of_the_svd(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    u, s, _ = torch.linalg.svd(matrix, full_matrices=False)
    for energies, basis in (
        principal_basis(matrix),
        principal_basis(matrix, matrix @ torch.randn(shape[0], shape[2], shape[2]).double()),
        principal_basis_of_gram(matrix @ matrix.mT, matrix),
    ):
        torch.testing.assert_close(energies[:, : s.shape[1]], s.square())
        torch.testing.assert_close(basis[..., : s.shape[1]], fixed_signs(u))
        identity = torch.eye(basis.shape[2], dtype=torch.float64).expand(shape[0], -1, -1)
        torch.testing.assert_close(basis.mT @ basis, identity)


@pytest.mark.parametrize("shape", [(2, 5, 9), (2, 9, 5), (1, 1, 4), (1, 6, 6)])
def test_a_basis_made_later_is_the_one_made_at_once(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    at_once, gram = principal_basis(matrix), matrix @ matrix.mT
    solved = []
    monkeypatch.setattr(
        torch.linalg, "eigh", lambda m, eigh=torch.linalg.eigh: solved.append(m) or eigh(m)
    )
    for energies, basis in (principal(matrix), principal_of_gram(gram, matrix)):
        assert not solved
        torch.testing.assert_close(energies[:, : at_once[0].shape[1]], at_once[0])
        torch.testing.assert_close(basis()[..., : at_once[1].shape[2]], at_once[1])
        assert basis() is basis()
        assert len(solved) == 1
        solved.clear()


def test_a_kernel_is_projected_on_outputs_inputs_both_or_neither() -> None:
    torch.manual_seed(0)
    kernel, u, v = (torch.randn(2, *s).double() for s in ((5, 4, 3), (5, 2), (4, 3)))
    whole = torch.einsum("gois,goq,gir->gqrs", kernel, u, v)
    torch.testing.assert_close(project(kernel, u, v), whole)
    torch.testing.assert_close(project(project(kernel, u, None), None, v), whole)
    assert project(kernel, None, None) is kernel


def test_the_basis_spans_a_matrix_of_lower_rank_and_one_of_zeros() -> None:
    torch.manual_seed(0)
    low = torch.randn(1, 9, 2, dtype=torch.float64) @ torch.randn(1, 2, 5, dtype=torch.float64)
    for matrix in (low, low.mT, torch.zeros(1, 7, 3, dtype=torch.float64)):
        energies, basis = principal_basis(matrix)
        torch.testing.assert_close(basis @ (basis.mT @ matrix), matrix)
        assert bool((energies >= 0).all())


def test_the_span_is_kept_where_the_gram_matrix_is_blind_to_it() -> None:
    torch.manual_seed(0)
    span = torch.randn(1, 6, 3, dtype=torch.float64)
    blind = span @ torch.diag(torch.tensor([1.0, 0.0, 0.0]).double()) @ span.mT
    basis = principal_basis_of_gram(blind, span)[1]
    torch.testing.assert_close(basis @ (basis.mT @ span), span)


def test_eigenvectors_do_not_depend_on_the_sign_of_the_solver() -> None:
    torch.manual_seed(0)
    symmetric = torch.randn(4, 4, dtype=torch.float64)
    values, vectors = descending_eigh(symmetric @ symmetric.T)
    assert bool((values[:-1] >= values[1:]).all())
    torch.testing.assert_close(fixed_signs(-vectors), vectors)
    assert bool((vectors.max(0).values >= vectors.min(0).values.abs()).all())


def test_tails_of_groups_share_their_rank() -> None:
    energies = torch.tensor([[4.0, 1.0], [3.0, 2.0]])
    torch.testing.assert_close(relative_tails(energies), torch.tensor([0.3, 0.0]))
    whole = relative_tails(energies, torch.tensor(20.0))
    torch.testing.assert_close(whole, torch.tensor([0.15, 0.0]))
    assert not relative_tails(torch.zeros(1, 3)).any()


def test_balanced_factors_have_one_size_and_the_same_product() -> None:
    torch.manual_seed(0)
    factors = [torch.randn(3, 3).double() * scale for scale in (1e-3, 2.0, 1e4)]
    sizes = torch.stack([f.square().mean() for f in balanced(factors)])
    torch.testing.assert_close(sizes, sizes[:1].expand(3))
    first, second, third = balanced(factors)
    torch.testing.assert_close(first @ second @ third, factors[0] @ factors[1] @ factors[2])
    zero = [torch.zeros(2), torch.ones(2)]
    assert balanced(zero)[1].equal(zero[1])
