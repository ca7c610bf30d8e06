"""The metric in which a layer's rows are rounded: the second moment of what the layer reads.

A moment is ``(D, D)``, symmetric positive semi-definite, singular or not; None is the identity.
"""

import torch
from torch import Tensor

from sft.core.errors import InputError


def bend(rows: Tensor, moment: Tensor | None) -> Tensor:
    """Rows ``(R, D)`` times the moment."""
    return rows if moment is None else rows @ moment


def energies(rows: Tensor, moment: Tensor | None) -> Tensor:
    """``row^T M row`` for each of the rows ``(R, D)``: ``(R,)`` float64, not negative."""
    rows = rows.detach().double()
    bent = bend(rows, None if moment is None else moment.double())
    return (bent * rows).sum(1).clamp_min(0)


def energy(rows: Tensor, moment: Tensor | None) -> float:
    """The sum of `energies`."""
    return float(energies(rows, moment).sum())


def check_moment(moment: Tensor | None, entries: int) -> None:
    """Raises `InputError` unless the moment is None, or finite and of shape ``(D, D)``."""
    if moment is None:
        return
    if tuple(moment.shape) != (entries, entries) or not bool(torch.isfinite(moment).all()):
        raise InputError(
            f"The moment has shape {tuple(moment.shape)}, for rows of {entries} values; it must "
            f"be {(entries, entries)} and finite. Gather it from inputs without NaN or infinity."
        )
