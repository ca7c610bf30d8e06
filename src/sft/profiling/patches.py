"""What a layer reads at each output position, for every geometry: patches and sums of patches.

Where output `p` of an axis reads with tap `s` is one table per axis, whatever the stride, padding,
padding mode or dilation, and also for a transposed convolution: an index of the input, or -1 where
a zero is read. All patches of a batch are never formed at once.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from sft.core.geometry import Geometry, Sizes

CHUNK = 2**22  # numbers of patches formed at a time


def reads(geometry: Geometry, size: Sizes, out: Sizes, device: torch.device) -> list[Tensor]:
    """One table ``(out, kernel)`` per axis: the index of the input that is read, or -1.

    size, out : lengths of the axes of the input and of the output.
    """
    before = geometry.pads()[0]
    tables = []
    for axis in range(geometry.axes):
        position = torch.arange(out[axis], device=device)[:, None]
        tap = geometry.dilation[axis] * torch.arange(geometry.kernel[axis], device=device)[None]
        stride, length = geometry.stride[axis], size[axis]
        if geometry.transposed:
            at = position + before[axis] - tap
            index = torch.where(at % stride == 0, at.div(stride, rounding_mode="floor"), -1)
        else:
            index = _padded(position * stride - before[axis] + tap, length, geometry.padding_mode)
        tables.append(torch.where((index >= 0) & (index < length), index, -1))
    return tables


def _padded(index: Tensor, length: int, mode: str) -> Tensor:
    """Indices beyond the ends of an axis as the padding mode maps them; zeros stay outside."""
    if mode == "circular":
        return index % length
    if mode == "replicate":
        return index.clamp(0, length - 1)
    if mode == "reflect":
        index = index.abs()
        return torch.where(index < length, index, 2 * (length - 1) - index)
    return index


def patch_sum(image: Tensor, tables: list[Tensor]) -> Tensor:
    """Sum of all patches of an image ``(C, *size)`` -> ``(C, S)``.

    Each axis is contracted with how often each of its taps reads each of its pixels.
    """
    for table in tables:
        length, taps = image.shape[1], table.shape[1]
        cell = torch.arange(taps, device=table.device) * length + table
        counts = torch.bincount(cell[table >= 0], minlength=taps * length).view(taps, length)
        image = torch.tensordot(image, counts.to(image), dims=([1], [1]))
    return image.flatten(1) if image.ndim > 1 else image[:, None]


def pixels_read(x: Tensor, tables: list[Tensor]) -> Tensor:
    """What a pointwise layer reads: ``(N, C, *size)`` -> ``(N, C, *out)``; a view if it can be."""
    for axis, table in enumerate(tables, start=2):
        index = table[:, 0]
        if len(index) == x.shape[axis] and torch.equal(index, torch.arange(len(index)).to(index)):
            continue
        x = x.index_select(axis, index.clamp(min=0))
        if bool((index < 0).any()):
            beyond = (index < 0).view(-1, *[1] * (x.ndim - 1 - axis))
            x = x.masked_fill(beyond, 0)
    return x


def patches(x: Tensor, tables: list[Tensor], positions: Tensor | None) -> Iterator[Tensor]:
    """Patches of a batch ``(N, C, *size)`` in pieces ``(1, C*S, m)``.

    positions : sorted indices among the ``N * prod(out)`` output positions; None for all.
    """
    size, out = x.shape[2:], [len(table) for table in tables]
    taps, length = math.prod(table.shape[1] for table in tables), math.prod(out)
    width = max(1, CHUNK // (x.shape[1] * taps))
    total = len(x) * length if positions is None else len(positions)
    for start in range(0, total, width):
        stop = min(start + width, total)
        chosen = torch.arange(start, stop) if positions is None else positions[start:stop]
        parts = []
        for sample, own in _by_sample(chosen, length):
            index = _index(tables, size, out, own.to(x.device))
            columns = x[sample].flatten(1).index_select(1, index.clamp(min=0).flatten())
            if bool((index < 0).any()):
                columns.masked_fill_((index < 0).flatten(), 0)
            parts.append(columns.view(-1, len(own)))
        yield torch.cat(parts, dim=1)[None]


def picked(columns: Tensor, positions: Tensor) -> Iterator[Tensor]:
    """The columns ``(1, C, m)`` of ``(N, C, L)`` at sorted positions among ``N * L``."""
    if columns.shape[2] == 1:
        yield columns.index_select(0, positions.to(columns.device))
        return
    if not len(positions):
        return
    parts = [
        columns[sample].index_select(1, own.to(columns.device))
        for sample, own in _by_sample(positions, columns.shape[2])
    ]
    yield torch.cat(parts, dim=1)[None]


def draw(total: int, limit: int | None, generator: torch.Generator) -> Tensor | None:
    """At most `limit` of `total` positions, sorted; None if that is all.

    One out of each of `limit` equal stretches, so that every sample has its share; the stretches
    start anywhere, so that each position is equally likely.
    """
    if limit is None or limit >= total:
        return None
    edges = torch.arange(limit + 1) * total // limit
    inside = torch.rand(limit, generator=generator, dtype=torch.float64)
    start = torch.randint(total, (1,), generator=generator)
    position = edges[:-1] + (inside * edges.diff()).long()
    return ((position + start) % total).sort().values


def _by_sample(positions: Tensor, length: int) -> Iterator[tuple[int, Tensor]]:
    """Sorted positions of a batch as (sample, positions inside it), for samples that have any."""
    counts = torch.bincount(positions // length).tolist()
    for sample, own in enumerate(torch.split(positions, counts)):
        if len(own):
            yield sample, own - sample * length


def _index(tables: list[Tensor], size: Sizes, out: list[int], positions: Tensor) -> Tensor:
    """Flat input index ``(S, P)`` that each tap reads at each output position; -1 for a zero."""
    index = positions.new_zeros(1, len(positions))
    inside = torch.ones_like(index, dtype=torch.bool)
    for table, length, at in zip(tables, size, torch.unravel_index(positions, out), strict=True):
        row = table[at].T
        index = (index[:, None] * length + row[None]).flatten(0, 1)
        inside = (inside[:, None] & (row >= 0)[None]).flatten(0, 1)
    return index.where(inside, -1)
