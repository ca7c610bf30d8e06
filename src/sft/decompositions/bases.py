"""Orthonormal bases of batched matrices, through their smaller Gram matrix.

A singular value decomposition of an unfolded kernel is never taken: the eigenvectors of the smaller
of its two Gram matrices are enough, and are matrix products for the most part. Squaring halves the
digits of small singular values: shares of the energy below about 1e-15 are noise.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

Later = Callable[[], Tensor]


def descending_eigh(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``(..., n)``, descending and not negative, and eigenvectors ``(..., n, n)``.

    The vectors stand in columns; the largest entry of each is positive.
    """
    values, vectors = torch.linalg.eigh(symmetric)
    return values.flip(-1).clamp_min(0), fixed_signs(vectors.flip(-1))


def descending_eigvalsh(symmetric: Tensor) -> Tensor:
    """The eigenvalues of `descending_eigh` alone."""
    values: Tensor = torch.linalg.eigvalsh(symmetric)
    return values.flip(-1).clamp_min(0)


def fixed_signs(vectors: Tensor) -> Tensor:
    """The columns of ``(..., m, n)``, each with the sign that makes its largest entry positive."""
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    return torch.where(largest < 0, -vectors, vectors)


def principal_basis(matrix: Tensor, span: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Energies ``(..., k)`` and left singular vectors ``(..., m, k)`` of ``(..., m, n)``.

    ``k = min(m, n)``; the energies are the squared singular values, descending. The k vectors
    together span `span` (by default the matrix itself) to rounding, also where energies are zero.

    span : ``(..., m, n)`` of the same column space, better conditioned than `matrix`.
    """
    if matrix.shape[-2] <= matrix.shape[-1]:
        return descending_eigh(matrix @ matrix.mT)
    basis, inside = torch.linalg.qr(matrix if span is None else span)
    inside = inside if span is None else basis.mT @ matrix
    return _lifted(inside @ inside.mT, basis)


def principal(matrix: Tensor, span: Tensor | None = None) -> tuple[Tensor, Later]:
    """As `principal_basis`, but the basis is made when it is first called for.

    Energies alone tell all errors of a menu, and take a third of the time.
    """
    if matrix.shape[-2] <= matrix.shape[-1]:
        return _in_two_steps(matrix @ matrix.mT, None)
    energies = descending_eigvalsh(matrix.mT @ matrix)
    return energies, functools.cache(lambda: principal_basis(matrix, span)[1])


def principal_basis_of_gram(gram: Tensor, span: Tensor) -> tuple[Tensor, Tensor]:
    """As `principal_basis`, of a matrix ``A`` of which ``gram = A A^T`` (..., m, m) is known.

    span : ``(..., m, n)`` whose columns span those of ``A``.
    """
    return _lifted(*_projected(gram, span))


def principal_of_gram(gram: Tensor, span: Tensor) -> tuple[Tensor, Later]:
    """As `principal_basis_of_gram`, but the basis is made when it is first called for."""
    return _in_two_steps(*_projected(gram, span))


def _projected(gram: Tensor, span: Tensor) -> tuple[Tensor, Tensor | None]:
    """The Gram matrix within the span, and the span's basis; None if the span is the whole."""
    if span.shape[-2] <= span.shape[-1]:
        return gram, None
    basis = torch.linalg.qr(span).Q
    return basis.mT @ gram @ basis, basis


def _lifted(gram: Tensor, lift: Tensor | None) -> tuple[Tensor, Tensor]:
    values, vectors = descending_eigh(gram)
    return values, vectors if lift is None else fixed_signs(lift @ vectors)


def _in_two_steps(gram: Tensor, lift: Tensor | None) -> tuple[Tensor, Later]:
    return descending_eigvalsh(gram), functools.cache(lambda: _lifted(gram, lift)[1])


def by_inputs(kernel: Tensor) -> Tensor:
    """A canonical kernel ``(G, o, i, S)`` unfolded to ``(G, i, o S)``."""
    return kernel.transpose(1, 2).flatten(2)


def project(kernel: Tensor, outputs: Tensor | None, inputs: Tensor | None) -> Tensor:
    """``U^T K V``, ``(G, q, r, S)``, of bases ``(G, o, q)`` and ``(G, i, r)``; None: the whole."""
    if outputs is not None:
        rows = outputs.mT @ kernel.flatten(2)
        kernel = rows.view(len(kernel), -1, *kernel.shape[2:])
    if inputs is not None:
        rows = inputs.mT @ by_inputs(kernel)
        kernel = rows.view(*rows.shape[:2], kernel.shape[1], -1).transpose(1, 2)
    return kernel


def relative_tails(energies: Tensor, total: Tensor | None = None) -> Tensor:
    """Share of the energy that is dropped at rank 1, 2, ...: ``(k,)``, falling to 0.

    energies : ``(G, k)``, descending in each row; the rows share their rank.
    total : energy of the whole where it is more than that of `energies`.
    """
    energy = energies.sum(0)
    whole = energy.sum() if total is None else total
    if not float(whole) > 0:
        return torch.zeros_like(energy)
    tail = energy.flip(0).cumsum(0).flip(0)
    return torch.cat([tail[1:], tail.new_zeros(1)]) / whole


def balanced(kernels: list[Tensor]) -> list[Tensor]:
    """Factors that follow one another, scaled by numbers of product 1 to one root mean square."""
    levels = torch.stack([kernel.square().mean().sqrt() for kernel in kernels])
    if not bool((levels > 0).all()):
        return kernels
    scales = levels.log().mean().exp() / levels
    return [kernel * scale for kernel, scale in zip(kernels, scales, strict=True)]
