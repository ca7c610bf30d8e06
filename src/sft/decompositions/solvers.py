"""Linear algebra of the alternating solvers: conjugate gradients, ridge, orthonormal gauge."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sft.core.geometry import Geometry

STEPS = 8
ENOUGH = 1e-2
RIDGE = 1e-9


def conjugate_gradients(hessian: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """The step that solves ``hessian(step) = start`` nearly; each iteration lowers the error."""
    step, residual, direction = torch.zeros_like(start), start, start
    first = size = residual.square().sum()
    for _ in range(STEPS):
        if not float(size) > ENOUGH**2 * float(first):
            break
        bent = hessian(direction)
        curvature = (direction * bent).sum()
        if not float(curvature) > 0:
            break
        length = size / curvature
        step, residual = step + length * direction, residual - length * bent
        before, size = size, residual.square().sum()
        direction = residual + (size / before) * direction
    return step


def solve_spd(matrix: Tensor, right: Tensor) -> Tensor:
    """``matrix^(-1) right`` for ``(G, n, n)``, positive semi-definite, with the least ridge.

    The ridge is relative to the mean diagonal, 1e-9 or more if rounding asks for it.
    """
    mean = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    ridge = RIDGE
    while True:
        lower, failed = torch.linalg.cholesky_ex(matrix + (ridge * mean + 1e-300) * identity)
        if not bool(failed.any()) or ridge > 1:
            return torch.cholesky_solve(right, lower)
        ridge *= 100


def orthonormal_but(
    kernels: Sequence[Tensor], factors: Sequence[Geometry], place: int
) -> list[Tensor]:
    """The same product, its factors but the one at `place` orthonormal where the gauge allows it.

    Between two factors that both mix channels any invertible matrix may stand: it moves towards
    `place`. At a depthwise factor, and where it would not be square, nothing is moved.
    """
    kernels = list(kernels)
    for j in range(place):
        if factors[j].depthwise or factors[j + 1].depthwise:
            continue
        rows = kernels[j].flatten(2)
        if rows.shape[1] <= rows.shape[2]:
            basis, rest = torch.linalg.qr(rows.mT)
            kernels[j] = basis.mT.reshape(kernels[j].shape)
            kernels[j + 1] = torch.einsum("grm,gorS->gomS", rest.mT, kernels[j + 1])
    for j in range(len(kernels) - 1, place, -1):
        if factors[j].depthwise or factors[j - 1].depthwise:
            continue
        columns = kernels[j].mT.flatten(1, 2)
        if columns.shape[1] >= columns.shape[2]:
            basis, rest = torch.linalg.qr(columns)
            kernels[j] = basis.reshape(kernels[j].mT.shape).mT
            before = kernels[j - 1].flatten(2)
            kernels[j - 1] = (rest @ before).reshape(kernels[j - 1].shape)
    return kernels
