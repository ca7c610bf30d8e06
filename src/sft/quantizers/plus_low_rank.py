"""A quantised weight plus a low-rank residual in float: ``W ~ Q + A B``, for 2 to 3 bits."""

import torch
from torch import Tensor

from sft.core.errors import InputError
from sft.quantizers.gptq import gptq_symmetric
from sft.quantizers.metric import bend, check_moment, energy

SWEEPS = 3


def quantized_plus_low_rank(
    weight: Tensor, moment: Tensor | None, bits: int, rank: int, sweeps: int = SWEEPS
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``W ~ Q + A B``: integers and a low-rank residual; no worse than GPTQ of W alone.

    weight : ``(O, D)``. moment : ``(D, D)`` or None. bits : 2 to 8. rank : 1 to min(O, D).

    Alternates GPTQ of ``W - A B`` and the best A, B for ``W - Q``; keeps the best.
    Returns ``(q, scale, a, b)``: ``(O, D)`` int8, ``(O,)``, ``(O, rank)``, ``(rank, D)`` float64.
    Raises `InputError`.
    """
    _check(weight, moment, rank)
    weight = weight.detach().double()
    moment = None if moment is None else moment.double()
    best, least = None, float("inf")
    low_rank = torch.zeros_like(weight)
    for _ in range(1 + sweeps):
        q, scale = gptq_symmetric(weight - low_rank, bits, moment)
        residual = weight - q.double() * scale[:, None]
        a, b = _low_rank(residual, moment, rank)
        low_rank = a @ b
        found = energy(residual - low_rank, moment)
        if best is None or found < least:
            best, least = (q, scale, a, b), found
    assert best is not None
    return best


def _low_rank(residual: Tensor, moment: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """The best A ``(O, rank)`` and B ``(rank, D)`` for a residual, in the metric of its output."""
    vectors = torch.linalg.eigh(bend(residual, moment) @ residual.mT)[1]
    a = vectors[:, -rank:].flip(-1)
    return a, a.mT @ residual


def _check(weight: Tensor, moment: Tensor | None, rank: int) -> None:
    shape = tuple(weight.shape)
    if weight.ndim != 2 or not bool(torch.isfinite(weight).all()):
        raise InputError(f"The weight has shape {shape}; give a finite matrix (O, D).")
    if not 1 <= rank <= min(shape):
        raise InputError(
            f"The rank {rank} does not fit a weight of shape {shape}; 1 to {min(shape)}."
        )
    check_moment(moment, shape[1])
