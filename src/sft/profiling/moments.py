"""Streaming first and second moments: sums about a shift, kept in float64, never the data.

Products run in float32 where the data is float32 or narrower. That costs no accuracy, because a
mean is taken off before: what is squared is of the size of the standard deviation, however large
the mean is. The shift is moved, and the sums with it, when a batch's mean lies further from it
than that.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from sft.core.distributed import all_reduce_sum_, is_distributed

CHUNK = 2**20  # numbers that are copied and multiplied at a time
BLOCK = 128  # rows of a product that are computed at a time, from the diagonal on
DRIFT = 1e-4  # a mean that moves by this share of itself does not move the shift


class Moments:
    """Running mean ``(G, n)`` and covariance ``(G, n, n)`` of columns of ``G*n`` channels.

    work : dtype of the products. centred : False for moments about zero. pooled : one covariance
        ``(1, n, n)``, averaged over the groups, each of which keeps its own mean.
    """

    def __init__(
        self,
        groups: int,
        width: int,
        device: torch.device,
        work: torch.dtype,
        *,
        centred: bool = True,
        pooled: bool = False,
    ) -> None:
        self.work, self.centred, self.pooled = work, centred, pooled
        self.count = 0
        self.shift = torch.zeros(groups, width, dtype=torch.float64, device=device)
        self.first = torch.zeros_like(self.shift)
        self.second = self.shift.new_zeros(1 if pooled else groups, width, width)  # upper half

    def add(self, chunks: Iterable[Tensor], mean: Tensor | None = None) -> None:
        """Add columns given in pieces ``(m, G*n, L)``, whose mean is about `mean` ``(G, n)``."""
        if mean is not None and self.centred:
            self._move(mean)
        shift = self.shift.to(self.work).flatten()
        for chunk in chunks:
            rows = self._rows(chunk, shift)
            self.count += rows.shape[2]
            self.first += rows.sum(2)
            if self.pooled:
                rows = rows.transpose(0, 1).flatten(1)[None]
            for start in range(0, rows.shape[1], BLOCK):  # products are symmetric: half will do
                block = rows[:, start : start + BLOCK] @ rows[:, start:].mT
                self.second[:, start : start + BLOCK, start:] += block

    def share(self) -> None:
        """Make the sums those over all processes, about the mean of all; no more is added then."""
        if not is_distributed():
            return
        count = torch.tensor([self.count], device=self.first.device)
        total = self.count * self.mean()
        all_reduce_sum_([count, total])
        if self.centred:
            self._shift_to(total / max(int(count), 1))
        all_reduce_sum_([self.first, self.second])
        self.count = int(count)

    def mean(self) -> Tensor:
        """``(G, n)`` the mean of all columns."""
        return self.shift + self.first / max(self.count, 1)

    def covariance(self) -> Tensor:
        """``(G, n, n)`` the covariance of all columns, or their second moment if not centred."""
        found = self.second / self._weight()
        if self.centred:
            offset = self.first / max(self.count, 1)
            found = found - self._outer(offset, offset) / self._share()
        return found.triu() + found.triu(1).mT

    def _rows(self, chunk: Tensor, shift: Tensor) -> Tensor:
        """``(m, G*n, L)`` -> ``(G, n, m*L)`` with the shift taken off, in one pass."""
        samples, channels, length = chunk.shape
        if length == 1:
            rows = (chunk[:, :, 0] - shift).T
        elif samples == 1:
            rows = chunk[0] - shift[:, None]
        else:
            rows = shift.new_empty(channels, samples, length)
            torch.sub(chunk.transpose(0, 1), shift[:, None, None], out=rows)
            rows = rows.flatten(1)
        return rows.reshape(*self.shift.shape, -1)

    def _move(self, mean: Tensor) -> None:
        """Make `mean` the shift unless the old one is near enough."""
        if self.count:
            offset = self.first / self.count
            square = self._outer_diagonal(offset) / self._share()
            variance = self.second.diagonal(dim1=1, dim2=2) / self._weight() - square
            near = variance.clamp(min=0) + (DRIFT * mean) ** 2
            if bool(((mean - self.shift) ** 2 <= near).all()):
                return
        self._shift_to(mean)

    def _shift_to(self, mean: Tensor) -> None:
        shift = mean.to(self.work).double()
        step = shift - self.shift
        cross = self._outer(self.first, step)
        self.second += self.count * self._outer(step, step) - cross - cross.mT
        self.first -= self.count * step
        self.shift = shift

    def _weight(self) -> int:
        return max(self.count, 1) * self._share()

    def _share(self) -> int:
        """How many groups one covariance stands for."""
        return len(self.shift) if self.pooled else 1

    def _outer(self, left: Tensor, right: Tensor) -> Tensor:
        if self.pooled:
            return (left.T @ right)[None]
        return left[:, :, None] * right[:, None, :]

    def _outer_diagonal(self, values: Tensor) -> Tensor:
        return (values**2).sum(0, keepdim=True) if self.pooled else values**2


def pieces(columns: Tensor) -> Iterator[Tensor]:
    """Columns ``(N, C, L)`` in pieces ``(m, C, L')`` of about `CHUNK` numbers; views."""
    channels, length = columns.shape[1:]
    width = max(1, CHUNK // channels)
    if length >= width:
        for sample in torch.split(columns, 1):
            yield from torch.split(sample, width, dim=2)
    else:
        yield from torch.split(columns, max(1, width // max(length, 1)))
