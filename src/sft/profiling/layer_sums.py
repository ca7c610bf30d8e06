"""The running sums of one layer: which moments are gathered, and from which positions."""

import dataclasses
import math
import zlib

import torch
from torch import Tensor, nn

from sft.core.distributed import all_reduce_sum_
from sft.core.errors import InputError
from sft.core.kernels import bias_of, geometry_of, to_canonical, weight_of
from sft.core.shards import Part
from sft.core.statistics import Statistics, normalize_taps
from sft.profiling.moments import Moments, pieces
from sft.profiling.patches import draw, patch_sum, patches, picked, pixels_read, reads

COSTLY_POSITIONS = 4096
TAP_POSITIONS, TAP_NUMBERS = 1024, 2**22


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is gathered beyond the usual. positions : at most so many of a batch; None for all."""

    patches: bool = False
    gradients: bool = False
    positions: int | None = None
    seed: int = 0


class LayerSums:
    """Sums over all calls of one layer: means from all positions, moments from the chosen ones.

    Of a pointwise layer only the narrower side's moments are gathered. Where patches are no wider
    than the output, their covariance is gathered in place of the outputs'.
    part : where what is added next stands in a batch that several processes share. Positions are
        then drawn from the whole batch, alike in all, and each process takes those in its slice.
    """

    def __init__(self, name: str, layer: nn.Module, wanted: Wanted) -> None:
        self.name, self.layer, self.wanted = name, layer, wanted
        self.geometry = geometry = geometry_of(layer)
        self.groups, self.taps = geometry.groups, geometry.taps
        self.inputs, self.outputs = geometry.inputs // self.groups, geometry.outputs // self.groups
        weight = weight_of(layer)
        self.device = weight.device
        self.work = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.count = self.input_count = self.graded = 0
        depth = self.inputs * self.taps
        self.patch_sum = torch.zeros(self.groups, depth, dtype=torch.float64, device=weight.device)
        self._tables: tuple[object, list[Tensor]] = (None, [])
        self.part: Part | None = None
        self._random = torch.Generator().manual_seed(zlib.crc32(f"{wanted.seed} {name}".encode()))
        narrow, pointwise = depth <= self.outputs, geometry.pointwise
        self.pixels = self._moments(self.inputs, not pointwise or narrow or wanted.patches)
        self.patches = self._moments(depth, not pointwise and (narrow or wanted.patches))
        self.produced = self._moments(self.outputs, not narrow)
        self.between = None
        if not pointwise:
            self.between = Moments(geometry.inputs, self.taps, self.device, self.work, pooled=True)
        self.gradients = self._moments(self.outputs, wanted.gradients, centred=False)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add what one call of the layer read and returned."""
        x, y = self._channels_second(x), self._channels_second(y)
        if not y.numel():
            return
        tables = self._reads(tuple(x.shape[2:]), tuple(y.shape[2:]))
        image = x.sum(0, dtype=self.work).double()
        total = patch_sum(image, tables).view_as(self.patch_sum)
        positions = len(y) * math.prod(y.shape[2:])
        self.patch_sum += total
        self.count += positions
        mean = total / positions
        if self.geometry.pointwise:
            self._add_columns(self.pixels, pixels_read(x, tables), mean)
            self.input_count = self.count
        else:
            seen = len(x) * math.prod(x.shape[2:])
            self.input_count += seen
            pixel = (image.flatten(1).sum(1) / seen).view(self.groups, self.inputs)
            self._add_columns(self.pixels, x, pixel)
            self._add_patches(x, tables, mean, positions)
        if self.produced is not None:
            self._add_columns(self.produced, y, self._outputs(mean, self.work))

    def add_gradient(self, gradient: Tensor, scale: float) -> None:
        """Add the gradient at an output of the layer; it is `scale` times the true one."""
        assert self.gradients is not None
        gradient = self._channels_second(gradient)
        columns = _columns(gradient)
        total = len(columns) * columns.shape[2]
        chosen = self._draw(total, max(COSTLY_POSITIONS, 2 * self.outputs))
        found = pieces(columns) if chosen is None else picked(columns, chosen)
        unscaled = found if scale == 1 else (piece.to(self.work) / scale for piece in found)
        self.gradients.add(unscaled)
        self.graded += total

    def share(self) -> None:
        """Make the sums those over all processes; called once, before `finish`."""
        counts = torch.tensor([self.count, self.input_count, self.graded], device=self.device)
        all_reduce_sum_([counts, self.patch_sum])
        self.count, self.input_count, self.graded = counts.tolist()
        for moments in (self.pixels, self.patches, self.produced, self.between, self.gradients):
            if moments is not None:
                moments.share()

    def finish(self) -> Statistics:
        """The moments; raises `InputError` if the layer was never run or saw infinite values."""
        if not self.count:
            raise InputError(
                f"The layer '{self.name}' was not run on the calibration data, so nothing is known "
                "about what it sees. Leave it out, or give data that reach it."
            )
        patch_mean = self.patch_sum / self.count
        taps, variance = torch.ones(1, 1, dtype=torch.float64), 1.0
        if self.between is not None:
            taps, variance = normalize_taps(self.between.covariance()[0].cpu())
        found = Statistics(
            output_mean=self._outputs(patch_mean, torch.float64, bias=False).cpu(),
            output_covariance=_covariance(self.produced),
            patch_mean=patch_mean.cpu(),
            input_mean=self._input_mean(patch_mean).cpu(),
            input_covariance=_covariance(self.pixels),
            tap_covariance=taps,
            tap_variance=variance,
            patch_covariance=_covariance(self.patches),
            gradient_covariance=self._gradient_covariance(),
            count=self.count,
            input_count=self.input_count,
        )
        self._check(found)
        return found

    def _moments(self, width: int, wanted: bool, centred: bool = True) -> Moments | None:
        if not wanted:
            return None
        return Moments(self.groups, width, self.device, self.work, centred=centred)

    def _add_columns(self, moments: Moments | None, x: Tensor, mean: Tensor) -> None:
        if moments is None:
            return
        columns = _columns(x)
        chosen = self._draw(len(columns) * columns.shape[2], None)
        moments.add(pieces(columns) if chosen is None else picked(columns, chosen), mean)

    def _add_patches(self, x: Tensor, tables: list[Tensor], mean: Tensor, total: int) -> None:
        assert self.between is not None
        sparse = max(16, min(TAP_POSITIONS, TAP_NUMBERS // (self.geometry.inputs * self.taps)))
        chosen = self._draw(total, sparse)
        self.between.add(patches(x, tables, chosen), mean.view(-1, self.taps))
        if self.patches is not None:
            depth = self.inputs * self.taps
            all_of_them = depth <= self.outputs
            chosen = self._draw(total, None if all_of_them else max(COSTLY_POSITIONS, 2 * depth))
            self.patches.add(patches(x, tables, chosen), mean)

    def _draw(self, total: int, default: int | None) -> Tensor | None:
        limit = default if self.wanted.positions is None else self.wanted.positions
        if self.part is None or total % self.part.count:
            return draw(total, limit, self._random)
        each = total // self.part.count
        chosen = draw(each * self.part.whole, limit, self._random)
        first = each * self.part.first
        if chosen is None:
            return None
        return chosen[(chosen >= first) & (chosen < first + total)] - first

    def _reads(self, size: tuple[int, ...], out: tuple[int, ...]) -> list[Tensor]:
        """The tables of `reads`; those of the last size are kept."""
        if self._tables[0] != (size, out):
            self._tables = ((size, out), reads(self.geometry, size, out, self.device))
        return self._tables[1]

    def _channels_second(self, x: Tensor) -> Tensor:
        """``(N, C, *size)``; every position of a linear layer is a sample of its own."""
        if not self.geometry.axes:
            return x.reshape(-1, x.shape[-1])
        return x[None] if x.ndim == self.geometry.axes + 1 else x

    def _outputs(self, patch_mean: Tensor, dtype: torch.dtype, bias: bool = True) -> Tensor:
        """``(G, o)`` the mean output that goes with a mean patch."""
        kernel = to_canonical(weight_of(self.layer).detach(), self.geometry).flatten(2).to(dtype)
        mean = (kernel @ patch_mean.to(dtype)[:, :, None])[:, :, 0].double()
        own = bias_of(self.layer)
        return mean if own is None or not bias else mean + own.detach().double().view_as(mean)

    def _input_mean(self, patch_mean: Tensor) -> Tensor:
        if self.geometry.pointwise:
            return patch_mean
        assert self.pixels is not None
        return self.pixels.mean()

    def _gradient_covariance(self) -> Tensor | None:
        """The second moment over all positions; one that no gradient reached counts as zero."""
        if self.gradients is None:
            return None
        return self.gradients.covariance().cpu() * (self.graded / self.count)

    def _check(self, found: Statistics) -> None:
        for field in dataclasses.fields(found):
            value = getattr(found, field.name)
            if isinstance(value, Tensor) and not bool(value.sum().isfinite()):
                raise InputError(
                    f"The layer '{self.name}' sees NaN or infinite values on the calibration data "
                    f"(its {field.name} of shape {tuple(value.shape)} is not finite). Calibrate in "
                    "a wider dtype, such as float32."
                )


def _columns(x: Tensor) -> Tensor:
    """``(N, C, *size)`` as columns ``(N', C, L)``; a view where memory allows it."""
    last = x.movedim(1, -1)
    if last.is_contiguous():
        return last.reshape(-1, x.shape[1], 1)
    return x.reshape(len(x), x.shape[1], -1)


def _covariance(moments: Moments | None) -> Tensor | None:
    return None if moments is None else moments.covariance().cpu()
