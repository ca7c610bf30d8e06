"""The integers that rows of weights may become, and the plainest rounding to them.

Rows ``(R, D)`` are the R output channels of a layer and the D values that each of them reads. Row
r stands for ``scale[r] * q[r]``. The error of integers is measured at the layer's output:
``(w - s q)^T M (w - s q)`` for each row, with M the second moment ``(D, D)`` of what it reads.

Kernels of x86 processors without VNNI add the products of two neighbours (columns 2m and 2m + 1)
in 16 bits, and saturate. Activations are 0 to 255, so a pair ``a, b`` of one sign is safe where
``|a| + |b| <= 128`` (255 * 128 <= 32767), and one of two signs always is. As ``|q| <= 128``, both
cases say the same: ``|a + b| <= pair_sum``.
"""

import dataclasses

import torch
from torch import Tensor

from sft.core.errors import InputError
from sft.quantizers.linear import BITS
from sft.quantizers.metric import check_moment, energies


@dataclasses.dataclass(frozen=True)
class Grid:
    """The levels of R rows: ``scale[r] * q`` with ``qmin <= q <= qmax``.

    scale : ``(R,)``, positive. qmin, qmax : within int8, with zero between them.
    pair_sum : greatest ``|a + b|`` of the neighbours in columns 2m and 2m + 1, or None for no
        limit. The columns are in the kernel's order; a last odd column has no neighbour.
    Raises `InputError` for a scale or limits that no integers fit.
    """

    scale: Tensor
    qmin: int
    qmax: int
    pair_sum: int | None = None

    def __post_init__(self) -> None:
        scale = self.scale
        if scale.ndim != 1 or not scale.is_floating_point():
            raise InputError(
                f"The scale of a grid has shape {tuple(scale.shape)} and dtype {scale.dtype}; "
                "give one floating number for each row, of shape (R,)."
            )
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise InputError(
                f"The scale of a grid, of shape {tuple(scale.shape)}, has values that are not "
                "finite and positive; give a row of zeros the scale 1."
            )
        if not -128 <= self.qmin <= 0 < self.qmax <= 127:
            raise InputError(
                f"A grid from {self.qmin} to {self.qmax} does not fit; "
                "-128 <= qmin <= 0 < qmax <= 127 is needed."
            )
        if self.pair_sum is not None and self.pair_sum < max(-self.qmin, self.qmax):
            raise InputError(
                f"pair_sum={self.pair_sum} forbids single weights of a grid from {self.qmin} to "
                f"{self.qmax}; lower qmax, or raise pair_sum."
            )


def round_nearest(rows: Tensor, grid: Grid) -> Tensor:
    """The nearest integers ``(R, D)`` int8 within the grid; pairs that offend are mended.

    rows : ``(R, D)`` floating. Raises `InputError` for rows that are not finite, or another shape.
    """
    check_rows(rows, grid)
    return nearest_integers(levels_of(rows, grid), grid).to(torch.int8)


def dequantize(q: Tensor, grid: Grid) -> Tensor:
    """The rows ``(R, D)`` that integers stand for, in the scale's dtype."""
    return q.to(grid.scale.dtype) * grid.scale[:, None]


def error(rows: Tensor, q: Tensor, grid: Grid, moment: Tensor | None) -> Tensor:
    """Squared error ``(R,)`` float64 of each row at the layer's output; see the file's head.

    moment : ``(D, D)``, or None for the identity.
    """
    return energies(rows.double() - q.double() * grid.scale.double()[:, None], moment)


def mend_pairs(q: Tensor, pair_sum: int, wanted: Tensor | None = None) -> Tensor:
    """Integers ``(R, D)`` of which no pair offends; other pairs are left as they are.

    A pair that offends becomes the admissible integer pair nearest to `wanted`, of those between
    zero and the pair itself. Where q is `wanted` rounded and clamped, these hold the best of all.

    q : integers, of any dtype, ``|q| <= pair_sum``. wanted : ``(R, D)`` real, in units of the
    scale; default q itself.
    """
    q = q.clone()
    index = _offending(q, pair_sum)
    if len(index[0]) == 0:
        return q
    row, column = index[0], 2 * index[1]
    first, second = q[row, column].double(), q[row, column + 1].double()
    aim = q if wanted is None else wanted
    sign = torch.sign(first + second)
    a, b = sign * first, sign * second
    x, y = sign * aim[row, column].double(), sign * aim[row, column + 1].double()
    a = torch.minimum(torch.round(x).clamp_min(0), a)
    b = torch.minimum(torch.round(y).clamp_min(0), b)
    along = torch.round((x - y + pair_sum) / 2)  # the best on the line a + b = pair_sum
    along = torch.maximum(torch.minimum(along, a), pair_sum - b)
    over = a + b > pair_sum
    a, b = torch.where(over, along, a), torch.where(over, pair_sum - along, b)
    q[row, column], q[row, column + 1] = (sign * a).to(q.dtype), (sign * b).to(q.dtype)
    return q


def offending_pairs(q: Tensor, pair_sum: int) -> int:
    """How many pairs of columns (2m, 2m + 1) of integers ``(R, D)`` could saturate."""
    return len(_offending(q, pair_sum)[0])


def nearest_integers(levels: Tensor, grid: Grid) -> Tensor:
    """Rows in units of their scale, rounded, clamped and mended; of their dtype."""
    q = torch.round(levels).clamp(grid.qmin, grid.qmax)
    return q if grid.pair_sum is None else mend_pairs(q, grid.pair_sum, levels)


def levels_of(rows: Tensor, grid: Grid) -> Tensor:
    """Rows ``(R, D)`` in units of their scale, float64."""
    return rows.detach().double() / grid.scale.detach().double()[:, None]


def clamp_levels(q: Tensor, grid: Grid, partner: Tensor | None = None) -> Tensor:
    """Levels ``(R,)`` clamped to the grid, and to what a pair's other integer leaves."""
    q = q.clamp(grid.qmin, grid.qmax)
    if partner is None or grid.pair_sum is None:
        return q
    return torch.maximum(torch.minimum(q, grid.pair_sum - partner), -grid.pair_sum - partner)


def keep_better(
    rows: Tensor, grid: Grid, moment: Tensor | None, q: Tensor, other: Tensor
) -> Tensor:
    """For each row its integers in `other` where their error is lower, else those in `q`."""
    better = error(rows, other, grid, moment) < error(rows, q, grid, moment)
    return torch.where(better[:, None], other, q)


def top_of(bits: int) -> int:
    """The greatest symmetric integer of 2 to 8 bits: ``2^(bits-1) - 1``. Raises `InputError`."""
    if bits not in BITS:
        raise InputError(f"{bits} bits do not fit; weights take {BITS[0]} to {BITS[-1]}.")
    return int(2 ** (bits - 1) - 1)


def check_rows(rows: Tensor, grid: Grid, moment: Tensor | None = None) -> None:
    """Raises `InputError` unless rows, scales and moment are finite and fit one another."""
    shape = tuple(rows.shape)
    if rows.ndim != 2 or not rows.is_floating_point():
        raise InputError(
            f"The rows to round have shape {shape} and dtype {rows.dtype}; "
            "flatten the weight to floating rows of shape (R, D)."
        )
    if len(grid.scale) != rows.shape[0]:
        raise InputError(
            f"{len(grid.scale)} scales do not fit rows of shape {shape}; give one for each row."
        )
    if not bool(torch.isfinite(rows).all()):
        raise InputError(f"The rows to round, of shape {shape}, hold NaN or infinity; mend them.")
    check_moment(moment, shape[1])


def _offending(q: Tensor, pair_sum: int) -> tuple[Tensor, Tensor]:
    """Row and number of each pair that offends."""
    pairs = q[:, : q.shape[1] // 2 * 2]
    pairs = pairs if pairs.is_floating_point() else pairs.to(torch.int16)
    row, pair = ((pairs[:, ::2] + pairs[:, 1::2]).abs() > pair_sum).nonzero(as_tuple=True)
    return row, pair
