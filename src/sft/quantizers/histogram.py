"""A histogram that grows with what it sees: the values of an activation in constant memory.

Bins are ``2^e`` wide and their edges are multiples of that, so zero is always an edge. When values
fall outside, ``e`` grows and bins merge in pairs, which loses nothing: the histogram of many
batches is that of all their values at once, in any order, up to the rounding of sums.
"""

import math

import torch
from torch import Tensor

from sft.core.errors import InputError

BINS = 2048
CHUNK = 2**20
LEAST_EXPONENT = -1022


class Histogram:
    """Counts and means of the values of a tensor in `BINS` bins, exact zeros counted apart.

    low, high : the smallest and the greatest value seen, and zero (0 before any value).
    zeros : how many values were exactly zero (a ReLU makes many).
    count : how many values were seen, zeros included.
    """

    def __init__(self) -> None:
        self.low = self.high = 0.0
        self.zeros = 0
        self._exponent, self._first = LEAST_EXPONENT, 0  # bin i is (first + i, + 1) * 2^exponent
        self._counts = torch.zeros(BINS, dtype=torch.int64)
        self._sums = torch.zeros(BINS, dtype=torch.float64)  # of values over the bins' width

    @property
    def count(self) -> int:
        return self.zeros + int(self._counts.sum())

    def add(self, x: Tensor) -> None:
        """Count the values of `x`, of any shape and floating dtype, on any device.

        Raises `InputError` for values that are not finite; nothing is counted then.
        """
        if not x.is_floating_point() or not bool(torch.isfinite(x).all()):
            raise InputError(
                f"The observed tensor of shape {tuple(x.shape)} is {x.dtype} and holds NaN or "
                "infinite values, or is not floating. Check the model and its calibration data."
            )
        if x.numel() == 0:
            return
        low, high = torch.aminmax(x.detach())
        self._widen(float(low), float(high))
        for part in torch.split(x.detach().flatten(), CHUNK):
            self._count(part.to("cpu").double())

    def merge(self, other: "Histogram") -> None:
        """Count all that `other` has counted; `other` stays as it is."""
        self._widen(other.low, other.high)
        shift = self._exponent - other._exponent
        self._pour(other._counts, other._sums, other._first, shift)
        self.zeros += other.zeros

    def state(self) -> Tensor:
        """All of it as one float64 tensor ``(5 + 2 * BINS,)``, for `from_state`."""
        head = [self.low, self.high, float(self.zeros), float(self._exponent), float(self._first)]
        return torch.cat([self._sums.new_tensor(head), self._counts.double(), self._sums])

    @classmethod
    def from_state(cls, state: Tensor) -> "Histogram":
        """The histogram that gave this `state`."""
        histogram = cls()
        head, counts, sums = torch.split(state.double().cpu(), [5, BINS, BINS])
        histogram.low, histogram.high = float(head[0]), float(head[1])
        histogram.zeros, histogram._exponent, histogram._first = (int(v) for v in head[2:])
        histogram._counts, histogram._sums = counts.long(), sums.clone()
        return histogram

    def values_and_counts(self) -> tuple[Tensor, Tensor]:
        """Float64 values and counts, each ``(1, BINS + 3)``, as the `ranges` take them.

        The values are the bins' means, then zero, the smallest and the greatest value, which are
        taken out of their bins: a range that clips nothing is exact. Entries may have count 0.
        """
        width, ends = 2.0**self._exponent, (self.low, self.high)
        counts, sums = self._counts.double(), self._sums.clone()
        for end in ends:
            if end != 0:
                place = math.floor(end / width) - self._first
                counts[place] -= 1
                sums[place] -= end / width
        means = (sums / counts.clamp(min=1) * width).clamp(self.low, self.high)
        weights = [float(self.zeros), *(float(end != 0) for end in ends)]
        return (
            torch.cat([means, means.new_tensor([0.0, *ends])])[None],
            torch.cat([counts, counts.new_tensor(weights)])[None],
        )

    def _widen(self, low: float, high: float) -> None:
        """Make room for values from `low` to `high`."""
        self.low, self.high = min(self.low, low), max(self.high, high)
        exponent, first = _place(self.low, self.high)
        if (exponent, first) != (self._exponent, self._first):
            counts, sums, shift = self._counts, self._sums, exponent - self._exponent
            old, self._exponent, self._first = self._first, exponent, first
            self._counts, self._sums = torch.zeros_like(counts), torch.zeros_like(sums)
            self._pour(counts, sums, old, shift)

    def _pour(self, counts: Tensor, sums: Tensor, first: int, shift: int) -> None:
        """Add bins that start at `first` and are ``2^shift`` times narrower than those here."""
        places = (torch.arange(BINS) + first >> min(shift, 62)) - self._first
        places = places.clamp(0, BINS - 1)  # only empty bins lie outside
        self._counts.index_add_(0, places, counts)
        self._sums.index_add_(0, places, sums * 2.0**-shift)

    def _count(self, values: Tensor) -> None:
        """Count the float64 `values` ``(n,)``, which lie within the bins."""
        steps = values[values != 0] / 2.0**self._exponent
        places = steps.floor().long() - self._first
        self.zeros += values.numel() - steps.numel()
        self._counts += torch.bincount(places, minlength=BINS)
        self._sums += torch.bincount(places, weights=steps, minlength=BINS)


def _place(low: float, high: float) -> tuple[int, int]:
    """Exponent of the bins' width, and the first bin, for values from `low` <= 0 <= `high`."""
    peak = max(-low, high)
    exponent = max(math.frexp(peak)[1] - BINS.bit_length() + 1, LEAST_EXPONENT)
    if peak == 0:
        exponent = LEAST_EXPONENT
    while math.floor(high / 2.0**exponent) - math.floor(low / 2.0**exponent) >= BINS:
        exponent += 1
    return exponent, math.floor(low / 2.0**exponent)
