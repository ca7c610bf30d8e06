"""Codebooks: a weight as small indices into a table of levels that need not be evenly spaced.

They make files small; an integer runtime does not compute with them. Each method takes
``(weight, bits)`` and gives ``(indices, codebook)``: uint8 of the weight's shape, and the
levels in ascending order, of shape ``(2**bits,)`` and the weight's dtype (at least float32). Zero
is a level of each, and zero weights stay zero.
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from sft.core.registry import Registry
from sft.quantizers.linear import check_weight, widened

ROUNDS = 100
TOP_EXPONENTS = 16
CELLS = 1024


class CodebookMethod(Protocol):
    """``(weight, bits)`` to indices of the weight's shape and a codebook ``(2**bits,)``."""

    def __call__(self, weight: Tensor, bits: int) -> tuple[Tensor, Tensor]: ...


codebooks: Registry[CodebookMethod] = Registry("codebook")


class SortedValues:
    """The values of a weight, sorted and divided by a power of two (`unit`), with running sums.

    The greatest magnitude `peak` then lies in [0.5, 2), or is 0, and no square overflows. Any set
    of levels is then judged and improved without touching the single values again.
    """

    def __init__(self, weight: Tensor) -> None:
        flat = weight.detach().cpu().double().flatten()
        peak = float(flat.abs().max()) if flat.numel() else 0.0
        self.unit = 2.0 ** max(min(math.frexp(peak)[1], 1023), -1022)
        self.peak = peak / self.unit
        self.values = (flat / self.unit).sort().values
        self.sums = _running(self.values)
        self.squares = float(self.values.square().sum())

    def of_levels(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Count and sum of the values nearest to each of the ascending `levels` ``(k,)``."""
        cuts = torch.searchsorted(self.values, _midpoints(levels))
        ends = cuts.new_tensor([0, self.values.numel()])
        bounds = torch.cat([ends[:1], cuts, ends[1:]])
        return bounds.diff(), self.sums[bounds].diff()

    def error(self, levels: Tensor) -> float:
        """Sum of squared distances to the nearest of the ascending `levels` ``(k,)``."""
        counts, sums = self.of_levels(levels)
        return self.squares + float((levels * (counts * levels - 2 * sums)).sum())


def kmeans(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Levels of least squared error, by Lloyd's iterations: the weight sharing of Deep Compression
    (Han et al. 2016, arXiv:1510.00149).

    One level is held at zero, so the others are the best for that. Three starts are tried and the
    best end kept: the symmetric linear grid (the error is never above that of linear
    quantisation), quantiles, and levels as dense as the cube root of the density. Nothing is
    drawn. A weight of few different values is kept exactly.

    Raises `InputError` for what `quantize_weight` refuses: other bits, NaN, other dtypes.
    """
    check_weight(weight, bits)
    data = SortedValues(weight)
    ends = [_improve(data, start) for start in _starts(data, 2**bits)]
    return _assign(weight, min(ends, key=data.error) * data.unit)


def power_of_two(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Levels 0 and ``+-2^e`` for ``2^(bits-1) - 1`` consecutive exponents, so that products are
    shifts (INQ, Zhou et al. 2017, arXiv:1702.03044). Each weight takes the nearest level.

    The top exponent is the one of least squared error among 16 from the greatest weight downwards.
    Zero stands twice in the codebook, whose length is even.

    Raises `InputError` for what `quantize_weight` refuses: other bits, NaN, other dtypes.
    """
    check_weight(weight, bits)
    data, dtype = SortedValues(weight), widened(weight.detach()).dtype
    highest = math.frexp(torch.finfo(dtype).max)[1] - 1
    first = min(math.frexp(data.unit)[1] - 1, highest)

    def levels(top: int) -> Tensor:
        exponents = torch.arange(top, top - 2 ** (bits - 1) + 1, -1, dtype=torch.float64)
        powers = torch.exp2(exponents)
        return torch.cat([-powers, powers.new_zeros(2), powers.flip(0)])

    tops = range(first, first - TOP_EXPONENTS, -1)
    best = min(tops, key=lambda top: data.error(levels(top) / data.unit))
    return _assign(weight, levels(best))


def decode(indices: Tensor, codebook: Tensor) -> Tensor:
    """The weight that `indices` (any shape) stand for, in the codebook's dtype."""
    return codebook[indices.long()]


def _starts(data: SortedValues, size: int) -> list[Tensor]:
    """Sets of `size` ascending levels with zero among them."""
    different = torch.unique_consecutive(data.values)
    if different.numel() < size:
        return [_with_zero(torch.cat([different, different.new_zeros(size - different.numel())]))]
    whole = torch.arange(1 - size // 2, size // 2, dtype=torch.float64)
    spare = 0.5 if float(data.sums[-1]) >= 0 else -0.5
    linear = torch.cat([whole, whole.new_tensor([spare])]) * data.peak / (size // 2 - 1)
    quantiles = data.values[((torch.arange(size) + 0.5) / size * data.values.numel()).long()]
    return [_with_zero(start) for start in (linear, quantiles, _companded(data, size))]


def _companded(data: SortedValues, size: int) -> Tensor:
    """Levels as dense as the cube root of the values' density, which is best for many levels
    (Panter and Dite 1951)."""
    ends = float(data.values[0]), float(data.values[-1])
    edges = torch.linspace(*ends, CELLS + 1, dtype=torch.float64)
    inner = torch.searchsorted(data.values, edges[1:-1])
    counts = torch.cat([inner.new_zeros(1), inner, inner.new_tensor([data.values.numel()])]).diff()
    mass = _running(counts.double() ** (1 / 3))
    wanted = (torch.arange(size) + 0.5) / size * mass[-1]
    cell = torch.searchsorted(mass, wanted) - 1
    share = (wanted - mass[cell]) / (mass[cell + 1] - mass[cell])
    return edges[cell] + share * (edges[1] - edges[0])


def _with_zero(levels: Tensor) -> Tensor:
    levels = levels.clone()
    levels[levels.abs().argmin()] = 0
    return levels.sort().values


def _improve(data: SortedValues, levels: Tensor) -> Tensor:
    """Lloyd's iterations; levels at zero and those without values stay where they are."""
    for _ in range(ROUNDS):
        counts, sums = data.of_levels(levels)
        free = (counts > 0) & (levels != 0)
        moved = torch.where(free, sums / counts.clamp(min=1), levels).sort().values
        if torch.equal(moved, levels):
            break
        levels = moved
    return levels


def _assign(weight: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    codebook = levels.to(weight.device, widened(weight.detach()).dtype)
    places = torch.bucketize(weight.detach().double(), _midpoints(codebook.double()))
    return places.to(torch.uint8), codebook


def _midpoints(levels: Tensor) -> Tensor:
    return levels[:-1] / 2 + levels[1:] / 2


def _running(values: Tensor) -> Tensor:
    return torch.cat([values.new_zeros(1), values.cumsum(0)])


codebooks.add("kmeans", kmeans)
codebooks.add("power_of_two", power_of_two)
