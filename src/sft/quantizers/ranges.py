"""Which range of values the integers shall cover: one method, one entry of the registry `ranges`.

Each takes ``(values (R, N), counts (R, N) or None, qmin, qmax, symmetric)`` and gives ``low`` and
``high`` of shape ``(R,)`` for each row, with ``low <= 0 <= high``, in the values' dtype (at least
float32). ``counts`` weigh the values (None: 1 each), so that a histogram is as good as the data.

Symmetric: ``low == -high``, the integers are ``-qmax .. qmax`` and ``scale = high / qmax``.
Affine: the grid is that of `linear.affine_parameters`, its zero point rounded. A row without
values, or with zeros only, has the range (0, 0). Values that are not finite, and counts that are
negative or of another shape, are an `InputError`.
"""

from collections.abc import Callable
from functools import wraps
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from sft.core.errors import InputError
from sft.core.registry import Registry
from sft.quantizers.clipping import Problem, least_error_factors
from sft.quantizers.linear import usable_scale, widened

KEPT_SHARE = 0.9999
NEWTON_STEPS = 40
TINY = 1e-300
BLOCK = 2**20

Pair = tuple[Tensor, Tensor]


class Rows(NamedTuple):
    """Checked input of a method: floating values ``(R, N)`` with N > 0 (zero where the count is
    zero), counts of that shape or None, and the integers."""

    values: Tensor
    counts: Tensor | None
    qmin: int
    qmax: int
    symmetric: bool


class Range(Protocol):
    """An entry of `ranges`; the module's docstring says what comes in and out."""

    def __call__(
        self, values: Tensor, counts: Tensor | None, qmin: int, qmax: int, symmetric: bool
    ) -> Pair: ...


ranges: Registry[Range] = Registry("range")


def weight_scale(rows: Tensor, qmax: int, name: str = "mse") -> Tensor:
    """Symmetric scale ``(R,)`` of each of the `rows` ``(R, N)``, from the named range; never zero.

    Raises `InputError` for an unknown name and for rows that are not finite.
    """
    _, high = ranges[name](rows, None, -qmax, qmax, True)
    return usable_scale(high / qmax)


def _register(method: Callable[[Rows], Pair]) -> Range:
    """Add `method` to `ranges` behind what all share: checks, blocks of rows, empty rows."""

    @wraps(method)
    def checked(
        values: Tensor, counts: Tensor | None, qmin: int, qmax: int, symmetric: bool
    ) -> Pair:
        _check(values, counts, qmin, qmax)
        values = widened(values.detach())
        if values.numel() == 0:
            return values.new_zeros(len(values)), values.new_zeros(len(values))
        lows, highs = [], []
        for start in range(0, len(values), max(1, BLOCK // values.shape[1])):
            part = slice(start, start + max(1, BLOCK // values.shape[1]))
            rows = Rows(values[part], None, -qmax if symmetric else qmin, qmax, symmetric)
            if counts is not None:
                weights = counts[part].to(values.dtype)
                rows = rows._replace(values=rows.values * (weights > 0), counts=weights)
            low, high = method(rows)
            lows.append(low)
            highs.append(high)
        return torch.cat(lows), torch.cat(highs)

    ranges.add(method.__name__, checked)
    return checked


@_register
def minmax(rows: Rows) -> Pair:
    """From the smallest to the greatest value: nothing is clipped."""
    return _ends_of(rows)


@_register
def percentile(rows: Rows) -> Pair:
    """The interval that holds `KEPT_SHARE` of the mass; the two tails lose half of the rest each.

    Symmetric: the magnitude that this share does not exceed. Quantiles are values of the row
    (the smallest whose cumulated share reaches the level), never interpolated.
    """
    if rows.symmetric:
        high = _quantile(rows.values.abs(), rows.counts, KEPT_SHARE)
        return -high, high
    tail = (1 - KEPT_SHARE) / 2
    low, high = (_quantile(rows.values, rows.counts, share) for share in (tail, 1 - tail))
    return _around_zero(low, high, False)


@_register
def mse(rows: Rows) -> Pair:
    """The range of least squared rounding and clipping error on the grid; the default.

    Symmetric ranges shrink by one factor, affine ones by one factor for each end, found by
    coordinate descent over a grid of factors that is refined twice. The error is never above that
    of `minmax`. The idea is that of Banner et al. 2019 (arXiv:1810.05723) and Nagel et al. 2021
    (arXiv:2106.08295, section 2.3), on the data instead of a fitted distribution.
    """
    low, high = _ends_of(rows)
    factors = least_error_factors(
        Problem(rows.values, rows.counts, low, high, rows.qmin, rows.qmax, rows.symmetric)
    )
    return low * factors[0], high * factors[1]


@_register
def octav(rows: Rows) -> Pair:
    """The fixed point of OCTAV (Sakr et al. 2022, arXiv:2206.06501), without a grid of candidates.

    A step ``d`` costs ``d^2 / 12`` for each value that is not clipped and not zero, a clipped value
    its squared distance to the end. The derivative is zero where an end is the sum of the values
    beyond it over their number plus ``k`` times the number of values inside (equation 8 there).
    An affine range has two ends that share the step: each is iterated with the other in
    ``d = (high - low) / (qmax - qmin)``, which is the published rule for one-signed rows.
    """
    unit = rows.values.abs().amax(dim=1, keepdim=True)
    unit = torch.where(unit > 0, unit, torch.ones_like(unit)).double()
    values = rows.values.double() / unit
    values, order = (values.abs() if rows.symmetric else values).sort(dim=1)
    counts = (values != 0).double()
    if rows.counts is not None:
        counts *= rows.counts.gather(1, order)
    low, high = _fixed_ends(values, counts, rows)
    low, high = ((end * unit[:, 0]).to(rows.values.dtype) for end in (low, high))
    low, high = _around_zero(low, high, rows.symmetric)
    least, most = _ends_of(rows)
    return torch.maximum(low, least), torch.minimum(high, most)


def _fixed_ends(values: Tensor, counts: Tensor, rows: Rows) -> Pair:
    """Both ends ``(R,)`` after `NEWTON_STEPS` rounds, for sorted float64 values ``(R, N)``.

    Starts from the means of the negative and of the positive values. In a symmetric range, whose
    values are magnitudes, the low end stays 0 and the step depends on the high one alone.
    """
    noise = 1 / (12 * (rows.qmax if rows.symmetric else rows.qmax - rows.qmin) ** 2)
    mass, sums = (pad(v, (1, 0)).cumsum(dim=1) for v in (counts, counts * values))
    low = high = values.new_zeros(len(values))
    inside = torch.zeros_like(low)  # no noise in the first round: it gives the means
    for _ in range(NEWTON_STEPS):
        below = torch.searchsorted(values, low[:, None])
        above = torch.searchsorted(values, high[:, None], right=True)
        under, over = mass.gather(1, below)[:, 0], mass[:, -1] - mass.gather(1, above)[:, 0]
        beneath, beyond = sums.gather(1, below)[:, 0], sums[:, -1] - sums.gather(1, above)[:, 0]
        moved = (
            (beneath + inside * high) / (inside + under).clamp(min=TINY),
            (beyond + inside * low) / (inside + over).clamp(min=TINY),
        )
        low = torch.where(under > 0, moved[0].clamp(max=0), low)
        high = torch.where(over > 0, moved[1].clamp(min=0), high)
        inside = noise * (mass[:, -1] - under - over)
    return low, high


def _quantile(values: Tensor, counts: Tensor | None, share: float) -> Tensor:
    """The smallest value of each row whose cumulated count reaches `share` of the whole."""
    ordered, order = values.sort(dim=1)
    weights = torch.ones_like(values) if counts is None else counts.gather(1, order)
    mass = weights.double().cumsum(dim=1)
    wanted = mass[:, -1:] * (share * (1 - 1e-12))  # a share that is met exactly is met
    place = torch.searchsorted(mass, wanted).clamp(max=values.shape[1] - 1)
    return ordered.gather(1, place)[:, 0]


def _ends_of(rows: Rows) -> Pair:
    return _around_zero(*torch.aminmax(rows.values, dim=1), rows.symmetric)


def _around_zero(low: Tensor, high: Tensor, symmetric: bool) -> Pair:
    """The range widened to hold zero, and to equal ends where it is symmetric."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    return low, high


def _check(values: Tensor, counts: Tensor | None, qmin: int, qmax: int) -> None:
    shape = tuple(values.shape)
    if values.ndim != 2 or not values.is_floating_point():
        raise InputError(f"The values are {values.dtype} of shape {shape}; give floats (R, N).")
    if not qmin < qmax or qmax < 1:
        raise InputError(f"The integers {qmin} to {qmax} are no range; give qmin < qmax, qmax > 0.")
    ends = torch.stack(torch.aminmax(values.detach())) if values.numel() else values.new_zeros(2)
    if not bool(torch.isfinite(ends).all()):  # NaN is both; so no table of the values' size is made
        where = tuple((~torch.isfinite(values)).nonzero()[0].tolist())
        raise InputError(
            f"The values of shape {shape} hold NaN or infinite ones, the first at index {where}. "
            "They have no range: repair or retrain the model, or check its input."
        )
    if counts is None:
        return
    if counts.shape != values.shape:
        raise InputError(f"The counts have shape {tuple(counts.shape)}, the values {shape}.")
    if not bool((torch.isfinite(counts) & (counts >= 0)).all()):
        raise InputError(f"The counts of shape {shape} must be finite and not negative.")
