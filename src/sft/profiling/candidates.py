"""The menu of one layer: keep, dense in integers, and each decomposition at each useful rank."""

import dataclasses

import torch
from torch import nn

from sft.core.copies import copy_module
from sft.core.records import DENSE, KEEP, Candidate, Layer, Option, Target
from sft.core.statistics import Statistics
from sft.decompositions import decompositions
from sft.profiling.cost import cost_of
from sft.quantizers.linear import symmetric_scale

WEIGHT_BITS = 8
QUANTISABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def schemes_for(layer: Layer, module: nn.Module) -> tuple[dict[str, str], list[str]]:
    """Why each scheme is refused (by name), and the schemes that remain."""
    shared = layer.refusals.get("*")
    refusals: dict[str, str] = {}
    for name in decompositions:
        reason = shared or layer.refusals.get(name) or decompositions[name].unsupported(module)
        if reason is not None:
            refusals[name] = reason
    return refusals, [name for name in decompositions if name not in refusals]


def menu(
    layer: Layer, module: nn.Module, statistics: Statistics | None, target: Target
) -> list[Candidate]:
    """All candidates of a layer with their error and cost; damage is still zero.

    Ranks stand on the target's lane multiple and stop where the factors would cost as many
    multiply-accumulates as the whole kernel. A layer that cannot be quantised can only be kept.
    """
    options: list[tuple[Option, float]] = [(Option(KEEP, weight_bits=None), 0.0)]
    if isinstance(module, QUANTISABLE) and "weight" in module._parameters:
        weight = module.weight.detach()
        rounding = rounding_error(weight, WEIGHT_BITS, target)
        options.append((Option(DENSE, weight_bits=WEIGHT_BITS), rounding))
    for scheme in schemes_for(layer, module)[1]:
        errors = decompositions[scheme].errors(weight, statistics)
        lane = decompositions[scheme].lane(target)
        for rank in range(lane, len(errors) + 1, lane):
            option = Option(scheme, (rank,), WEIGHT_BITS)
            if cost_of(layer, option, target).macs < layer.macs:
                options.append((option, float(errors[rank - 1]) + 2 * rounding))
    return [Candidate(o, error, 0.0, cost_of(layer, o, target)) for o, error in options]


def with_damage(candidates: list[Candidate], alphas: dict[str, float]) -> tuple[Candidate, ...]:
    """The same menu with damage = alpha of the scheme x error."""
    fallback = max(alphas.values(), default=1.0)
    return tuple(
        dataclasses.replace(c, damage=alphas.get(c.option.scheme, fallback) * c.error)
        for c in candidates
    )


def rounded_copy(module: nn.Module, target: Target) -> nn.Module:
    """The layer with its weight rounded as the target stores it."""
    rounded = copy_module(module)
    weight = rounded._parameters["weight"]
    assert weight is not None
    weight.data = _round(weight.detach(), WEIGHT_BITS, target)
    return rounded


def rounding_error(weight: torch.Tensor, bits: int, target: Target) -> float:
    """Relative squared error of rounding the weight per output channel, as the target stores it."""
    rounded = _round(weight, bits, target)
    return float((weight - rounded).square().sum() / weight.square().sum().clamp_min(1e-30))


def _round(weight: torch.Tensor, bits: int, target: Target) -> torch.Tensor:
    top = min(2 ** (bits - 1) - 1, target.layout.weight_max)
    scale = symmetric_scale(weight, top, 0).reshape([-1] + [1] * (weight.ndim - 1))
    return torch.round(weight / scale) * scale
