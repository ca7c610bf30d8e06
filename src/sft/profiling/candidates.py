"""The menu of one layer: keep, dense in integers, and each decomposition at each useful rank."""

import dataclasses
import itertools
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import nn

from sft.core.records import DENSE, KEEP, STORED, Candidate, Layer, Option, Target
from sft.core.statistics import Statistics
from sft.decompositions import decompositions
from sft.decompositions.base import kernel_of
from sft.profiling.cost import cost_of
from sft.quantizers.linear import symmetric_scale

WEIGHT_BITS = 8
RANKS = 16  # of a scheme, on a menu
QUANTISABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
STORABLE = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)  # no integer kernels
TWINS = {"channel_in": "channel_out"}  # the same split where the kernel has one tap


def schemes_for(
    layer: Layer, module: nn.Module, schemes: Collection[str]
) -> tuple[dict[str, str], list[str]]:
    """Why each scheme is refused (by name), and those of `schemes` that remain."""
    shared = layer.refusals.get("*")
    refusals: dict[str, str] = {}
    for name in decompositions:
        reason = shared or layer.refusals.get(name) or decompositions[name].unsupported(module)
        if reason is not None:
            refusals[name] = reason
    remain = [name for name in schemes if name not in refusals]
    pointwise = layer.geometry is not None and layer.geometry.pointwise
    return refusals, [n for n in remain if not (pointwise and TWINS.get(n) in remain)]


def menu(
    layer: Layer,
    module: nn.Module,
    statistics: Statistics | None,
    target: Target,
    schemes: Collection[str],
    weight_bits: Sequence[int] = (WEIGHT_BITS,),
    rank_multiple: int | None = None,
) -> list[Candidate]:
    """All candidates of a layer with their error and cost; damage is still zero.

    Every scheme and rank at each of `weight_bits`, or in float without any. Ranks stand on
    `rank_multiple`, or on the target's lanes, and stop where the factors would cost as many
    multiply-accumulates as the whole kernel; of a scheme's ranks only those are kept that no
    cheaper one beats in error, and at most `RANKS`, close at low ranks and far apart at high ones.
    A transposed convolution, for which no runtime has an integer kernel, can be stored in integers
    and is split in float; any other layer that cannot be quantised is kept, or split in float.
    """
    found = [_candidate(layer, Option(KEEP, weight_bits=None), 0.0, target)]
    scheme_of_whole = _whole(module)
    rounding: dict[int | None, float] = {None: 0.0}
    if scheme_of_whole is not None:
        assert isinstance(module.weight, torch.Tensor)
        for bits in weight_bits:
            axis = channel_axis(module)
            error = rounding_error(module.weight.detach(), bits, target, axis)
            rounding[bits] = error
            for whole in (scheme_of_whole, STORED)[: 1 if bits < WEIGHT_BITS else 2]:
                option = Option(whole, weight_bits=bits)
                if option not in [c.option for c in found]:
                    found.append(_candidate(layer, option, error, target))
    widths: Sequence[int | None] = weight_bits if scheme_of_whole == DENSE else ()
    for scheme in schemes_for(layer, module, schemes)[1]:
        own = []
        for rank, error in _ranks(scheme, layer, module, statistics, target, rank_multiple):
            own.append(_candidate(layer, Option(scheme, rank, None), error, target))
        for split in _thinned(_cheapest([c for c in own if c.cost.macs < layer.macs])):
            for width in widths or (None,):
                option = dataclasses.replace(split.option, weight_bits=width)
                error = split.error + 2 * rounding[width]
                found.append(_candidate(layer, option, error, target))
    return found


def channel_axis(module: nn.Module) -> int:
    """The axis of a weight that has a scale for each index: that of the output channels."""
    return 1 if isinstance(module, STORABLE) else 0


def rounding_error(weight: torch.Tensor, bits: int, target: Target, axis: int = 0) -> float:
    """Relative squared error of rounding the weight along `axis`, as the target stores it."""
    rounded = _round(weight, bits, target, axis)
    return float((weight - rounded).square().sum() / weight.square().sum().clamp_min(1e-30))


def _whole(module: nn.Module) -> str | None:
    """What the whole kernel can become in integers: `dense`, only `stored`, or nothing."""
    if "weight" not in module._parameters:
        return None
    if isinstance(module, QUANTISABLE):
        return DENSE
    return STORED if isinstance(module, STORABLE) else None


def _candidate(layer: Layer, option: Option, error: float, target: Target) -> Candidate:
    return Candidate(option, error, 0.0, cost_of(layer, option, target))


def _ranks(
    scheme: str,
    layer: Layer,
    module: nn.Module,
    statistics: Statistics | None,
    target: Target,
    multiple: int | None,
) -> Iterator[tuple[tuple[int, ...], float]]:
    """Ranks on the target's multiples, with their errors, from one factorisation."""
    assert layer.geometry is not None
    method = decompositions[scheme]
    errors = method.analyse(kernel_of(module).cpu(), layer.geometry, statistics).errors
    lanes = [multiple or lane for lane in method.lane(target)]
    sides = zip(errors.shape, lanes, strict=True)
    for rank in itertools.product(*(range(lane, full + 1, lane) for full, lane in sides)):
        yield rank, float(errors[tuple(r - 1 for r in rank)])


def _cheapest(candidates: list[Candidate]) -> list[Candidate]:
    """Those that no other beats in error at as few multiply-accumulates and parameters."""
    kept: list[Candidate] = []
    for c in sorted(candidates, key=lambda c: (c.cost.macs, c.cost.size, c.error)):
        if not any(k.error <= c.error and k.cost.size <= c.cost.size for k in kept):
            kept.append(c)
    return kept


def _thinned(candidates: list[Candidate]) -> list[Candidate]:
    """At most `RANKS` of them, by rising cost: even steps in the logarithm of their place."""
    count = len(candidates)
    if count <= RANKS:
        return candidates
    places = {round(count ** (i / (RANKS - 1))) - 1 for i in range(RANKS)}
    free = (i for i in range(count) if i not in places)
    while len(places) < RANKS:
        places.add(next(free))
    return [candidates[i] for i in sorted(places)]


def _round(weight: torch.Tensor, bits: int, target: Target, axis: int) -> torch.Tensor:
    top = min(2 ** (bits - 1) - 1, target.layout.weight_max)
    shape = [1] * weight.ndim
    shape[axis] = -1
    scale = symmetric_scale(weight, top, axis).reshape(shape)
    return torch.round(weight / scale) * scale
