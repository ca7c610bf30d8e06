"""Terms of a separable kernel fitted freely in the plain norm: bounded CP decomposition, fast.

Minimises, over r terms ``a (x) b (x) c`` (outputs, inputs, taps),

    || K - sum_r a_r (x) b_r (x) c_r ||^2 + penalty sum_r |a_r|^2 |b_r|^2 |c_r|^2

A best CP approximation need not exist: without the penalty terms grow and cancel one another, and
alternating least squares crawls. With it the sum of the terms' energies stays bounded (4 times the
kernel's at a penalty of 1e-3, 20 times at 1e-4, on kernels of the spectrum of trained ones), each
step is a regression whose ``r x r`` normal matrix is well conditioned, and single precision is
enough for all but the last sweep.

* Where r is below the channels, terms are fitted to the core of a Tucker-2 split of that rank first
  (Bro and Andersson 1998), and to the kernel itself in the last two sweeps only.
* The penalty falls from 0.1 in the first half of the sweeps, past poor solutions.
* Sweeps are extrapolated (Nesterov) and restarted where the objective rose (Mitchell, Ye and De
  Sterck 2020).
* A sweep is two products with the kernel in the order in which it lies in memory.
"""

import torch
from torch import Tensor

from sft.decompositions.bases import by_inputs, descending_eigh, project

PENALTY = 1e-3
SWEEPS = 100
FIRST_PENALTY = 0.1

Terms = tuple[Tensor, Tensor, Tensor]  # (G, o, r), (G, i, r), (G, S, r)


def fit_terms(
    kernel: Tensor,
    rank: int,
    penalty: float = PENALTY,
    sweeps: int = SWEEPS,
    tolerance: float = 1e-4,
) -> list[Tensor]:
    """Canonical kernels of the three factors of `separable` (in the order of application).

    kernel : canonical ``(G, o, i, S)``, float64.
    penalty : on the energies of the terms, relative to the squared error; above 0.
    sweeps, tolerance : stop after so many sweeps over the core, or when one lowers the objective by
        less than this share of it.
    """
    energy = kernel.square().sum((1, 2, 3), keepdim=True)
    scale = energy.clamp_min(1e-300).sqrt()
    kernel = kernel / scale
    short = kernel.to(torch.float32)
    outputs, inputs = _basis(short.flatten(2), rank), _basis(by_inputs(short), rank)
    core = project(short, outputs, inputs).contiguous()
    a, b, c = _fit(core, _start(core, rank), penalty, sweeps, tolerance)
    terms = (a if outputs is None else outputs @ a, b if inputs is None else inputs @ b, c)
    a, b, c = (t.to(kernel) for t in _sweep(short, terms, penalty)[0])
    a, b, c = _sweep(kernel, (a, b, c), penalty)[0]
    last, first, taps = _even((a * scale[..., 0], b, c))
    return [first.mT[..., None], taps.mT.reshape(-1, 1, 1, kernel.shape[3]), last[..., None]]


@torch.inference_mode()
def _fit(kernel: Tensor, terms: Terms, penalty: float, sweeps: int, tolerance: float) -> Terms:
    """Extrapolated sweeps from `terms`; the best ones found. The kernel has energy 1 a group."""
    terms, objective = _sweep(kernel, terms, max(penalty, FIRST_PENALTY))
    best = ahead = _even(terms)
    age = 0
    for index in range(1, sweeps):
        fallen = min(1.0, 2 * index / sweeps)
        present = max(penalty, FIRST_PENALTY * (penalty / FIRST_PENALTY) ** fallen)
        terms, value = _sweep(kernel, ahead, present)
        if not value < objective and age:
            age = 0
            terms, value = _sweep(kernel, best, present)
        if not value < objective:
            break
        before, best = best, terms
        ahead = _ahead(best, before, age / (age + 2))
        age += 1
        gain, objective = objective - value, value
        if fallen == 1.0 and gain < tolerance * objective:
            break
    return best


def _sweep(kernel: Tensor, terms: Terms, penalty: float) -> tuple[Terms, float]:
    """Inputs, taps and outputs solved in turn, and the objective there."""
    a, _, c = terms
    groups, _, inputs, taps = kernel.shape
    rows = kernel.flatten(2)
    partial = (rows.mT @ a).view(groups, inputs, taps, -1)
    gram_a = a.mT @ a
    b = _solve(gram_a * (c.mT @ c), (partial * c[:, None]).sum(2), penalty)
    gram_b = b.mT @ b
    c = _solve(gram_a * gram_b, (partial * b[:, :, None]).sum(1), penalty)
    seen = rows @ (b[:, :, None] * c[:, None]).flatten(1, 2)
    a = _solve(gram_b * (c.mT @ c), seen, penalty)
    return (a, b, c), groups - float((seen * a).sum())


def _solve(normal: Tensor, right: Tensor, penalty: float) -> Tensor:
    """``right (normal + penalty diagonal)^(-1)`` for right ``(G, n, r)``; `normal` is used up."""
    diagonal = normal.diagonal(dim1=1, dim2=2)
    least = 8 * torch.finfo(normal.dtype).eps * diagonal.mean(1, keepdim=True) + 1e-30
    diagonal.mul_(1 + penalty).add_(least)
    lower = torch.linalg.cholesky_ex(normal).L
    half = torch.linalg.solve_triangular(lower.mT, right, upper=True, left=False)
    solved: Tensor = torch.linalg.solve_triangular(lower, half, upper=False, left=False)
    return solved


def _basis(rows: Tensor, rank: int) -> Tensor | None:
    """The first `rank` left singular vectors of ``(G, n, m)``; None where that would be all."""
    if rank >= rows.shape[1]:
        return None
    return descending_eigh(rows @ rows.mT)[1][..., :rank]


def _start(core: Tensor, rank: int) -> Terms:
    """Channels paired in their order, with random taps; beyond the channels all is random."""
    groups, outputs, inputs, taps = core.shape
    generator = torch.Generator().manual_seed(0)

    def drawn(length: int) -> Tensor:
        found: Tensor = torch.randn(length, rank, generator=generator).to(core) / length**0.5
        return found

    def columns(length: int) -> Tensor:
        found, count = drawn(length), min(length, rank)
        found[:, :count] = torch.eye(length, count).to(core)
        return found.expand(groups, -1, -1)

    return columns(outputs), columns(inputs), drawn(taps).expand(groups, -1, -1)


def _even(terms: Terms) -> Terms:
    """The three vectors of each term scaled to one norm; a term of zero stays as it is."""
    norms = [vector.norm(dim=1, keepdim=True) for vector in terms]
    product = norms[0] * norms[1] * norms[2]
    level = product.pow(1 / 3)
    a, b, c = (
        (vector * (level / norm)).where(product > 0, vector)
        for vector, norm in zip(terms, norms, strict=True)
    )
    return a, b, c


def _ahead(found: Terms, before: Terms, share: float) -> Terms:
    """A step further in the direction of the last one."""
    a, b, c = (f + share * (f - p) for f, p in zip(found, before, strict=True))
    return a, b, c
