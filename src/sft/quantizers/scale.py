"""The step of each row that serves its rounded weights best: clipping a little often pays."""

import torch
from torch import Tensor

from sft.core.errors import InputError
from sft.quantizers.grid import mend_pairs
from sft.quantizers.linear import symmetric_scale

CANDIDATES = 36
LOWEST = 0.3  # of the step that holds the row's greatest magnitude
HIGHEST, HIGHEST_OF_PAIRS = 1.0, 2.0
CHUNK = 1 << 18  # weights at a time: in cache, and far below 64 MB


def best_scale(
    rows: Tensor,
    qmax: int,
    moment_diagonal: Tensor | None = None,
    pair_sum: int | None = None,
    candidates: int = CANDIDATES,
) -> Tensor:
    """Scales ``(R,)`` of the symmetric grid ``[-qmax, qmax]``, for integers rounded to nearest.

    Minimises ``sum_d m_d (w_d - s q_d)^2`` for each row over evenly spaced scales, 0.3 to 1.0 of
    ``max |w| / qmax``; up to 2.0 where pairs are limited, as larger steps spare them.

    rows : ``(R, D)`` floating, finite. moment_diagonal : ``(D,)``, not negative; None weighs all
    alike. candidates : 1 or more; the last is the highest scale. A row of zeros has the scale 1.
    Raises `InputError` for rows that are not finite, and another shape.
    """
    _check(rows, moment_diagonal, candidates)
    highest = HIGHEST if pair_sum is None else HIGHEST_OF_PAIRS
    steps = torch.linspace(LOWEST, highest, candidates)
    if pair_sum is not None:
        steps = torch.cat([steps, torch.ones(1)])
    widest = symmetric_scale(rows.detach(), qmax, 0)
    weight = None if moment_diagonal is None else moment_diagonal.to(widest)
    count = max(1, CHUNK // max(rows.shape[1], 1))
    best = widest.clone()
    for start in range(0, len(rows), count):
        part = slice(start, start + count)
        chunk = rows[part].detach().to(widest)
        best[part] = _search(chunk, widest[part], qmax, weight, pair_sum, steps)
    return best


def _search(
    rows: Tensor,
    widest: Tensor,
    qmax: int,
    weight: Tensor | None,
    pair_sum: int | None,
    steps: Tensor,
) -> Tensor:
    """The best of ``widest * steps`` for each row of a chunk; of equals the one nearest to 1."""
    best, least = widest, torch.full_like(widest, torch.inf)
    levels = rows / widest[:, None]  # so that errors neither overflow nor vanish
    for step in sorted(steps.tolist(), key=lambda s: abs(s - 1)):
        wanted = levels / step
        q = torch.round(wanted).clamp_(-qmax, qmax)
        if pair_sum is not None:
            q = mend_pairs(q, pair_sum, wanted)
        lost = wanted.sub_(q).square_()
        found = (lost.sum(1) if weight is None else lost @ weight) * step**2
        better = found < least
        least = torch.where(better, found, least)
        best = torch.where(better, widest * step, best)
    return best.clamp_min(torch.finfo(best.dtype).tiny)


def _check(rows: Tensor, diagonal: Tensor | None, candidates: int) -> None:
    shape = tuple(rows.shape)
    if rows.ndim != 2 or not rows.is_floating_point() or not bool(torch.isfinite(rows).all()):
        raise InputError(
            f"The rows to scale have shape {shape} and dtype {rows.dtype}; "
            "give finite floating rows of shape (R, D)."
        )
    if candidates < 1:
        raise InputError(f"{candidates} candidate scales are too few; give 1 or more.")
    if diagonal is not None and (
        tuple(diagonal.shape) != shape[1:] or not bool(torch.isfinite(diagonal).all())
    ):
        raise InputError(
            f"The moment's diagonal has shape {tuple(diagonal.shape)}, for rows of shape {shape}; "
            "it must be (D,) and finite."
        )
