"""A layer as an option would leave it: split, rounded, reading integers. For measuring only."""

import torch
from torch import Tensor, nn

from sft.core.copies import copy_module
from sft.core.errors import InputError
from sft.core.geometry import Geometry
from sft.core.kernels import bias_of, geometry_of, weight_of
from sft.core.records import KEEP, STORED, Option, Target
from sft.core.statistics import Statistics
from sft.decompositions import factorize
from sft.layers import FactorizedSFT
from sft.profiling.reading import kernel_rows, observe_reading, weight_of_rows
from sft.profiling.regression import solve_rows
from sft.quantizers.grid import Grid, dequantize
from sft.quantizers.linear import symmetric_scale
from sft.quantizers.ranges import ranges
from sft.quantizers.rounding import roundings
from sft.quantizers.scale import best_scale

UNSEEN = 0.03  # of the mean variance, added to a covariance: a sample shows too little of it
COARSE = 6  # bits up to which the better rounding changes what is measured
SAMPLE = 2**13  # numbers that show the range of an activation


@torch.no_grad()
def stand_in(
    module: nn.Module,
    option: Option,
    inputs: list[Tensor],
    statistics: Statistics | None,
    target: Target,
    seed: int = 0,
    wanted: list[Tensor] | None = None,
) -> nn.Module:
    """A module that computes what `module` would under `option`; the module is not changed.

    Weights of at most 6 bits are rounded in the metric of what the layer reads (`inputs`, batch by
    batch) and the last factor of a split layer is solved again behind the rounded ones, as
    `quantize` does; wider ones, and factors that are no chain, to nearest. Activations are rounded
    to the target's integers where the option multiplies in integers. `inputs` may be empty for an
    option in float.

    wanted : the outputs to aim at where the inputs are not those of the original any more; by
    default what the layer gives for them.
    """
    small = copy_module(module)
    if option.rank:
        small = factorize(module, option.scheme, option.rank, statistics)
    if option.scheme == KEEP or option.weight_bits is None:
        return small
    if isinstance(small, FactorizedSFT) and type(small).forward is FactorizedSFT.forward:
        _round_chain(small, option.weight_bits, inputs, wanted, target, seed)
    else:
        if wanted and option.weight_bits <= COARSE and _geometry(small) is not None:
            _solve_again(small, geometry_of(small), inputs, wanted, seed)
        for part in _weighted(small):
            _round_one(part, option.weight_bits, inputs if part is small else [], target, seed)
    if option.scheme == STORED or not inputs:
        return small
    return Integers(small, inputs, target)


class Integers(nn.Module):
    """A module whose input is rounded to the target's activations, by its mean-squared range."""

    def __init__(self, module: nn.Module, inputs: list[Tensor], target: Target) -> None:
        super().__init__()
        self.module, layout = module, target.layout
        self.low, self.high = layout.activation_min, layout.activation_max
        every = max(1, sum(x.numel() for x in inputs) // SAMPLE) | 1  # odd: meets every channel
        flat = torch.cat([x.flatten()[::every] for x in inputs])
        bottom, top = ranges["mse"](flat[None], None, self.low, self.high, False)
        self.scale = max(float(top - bottom) / (self.high - self.low), 1e-12)
        self.zero = round(self.low - float(bottom) / self.scale)

    def forward(self, x: Tensor) -> Tensor:
        rounded = torch.fake_quantize_per_tensor_affine(
            x, self.scale, min(max(self.zero, self.low), self.high), self.low, self.high
        )
        outputs: Tensor = self.module(rounded)
        return outputs


def _round_chain(
    small: FactorizedSFT,
    bits: int,
    inputs: list[Tensor],
    wanted: list[Tensor] | None,
    target: Target,
    seed: int,
) -> None:
    """Round the factors one after the other, each behind the rounded ones before it."""
    if wanted is None:
        wanted = [small(x) for x in inputs] if bits <= COARSE else []
    read = inputs
    for factor, part in zip(small.factors, small.parts, strict=True):
        if wanted and factor is small.factors[-1]:
            _solve_again(factor, part, read, wanted, seed)
        _round_one(factor, bits, read, target, seed)
        read = [factor(x) for x in read]


def _solve_again(
    factor: nn.Module, part: Geometry, inputs: list[Tensor], wanted: list[Tensor], seed: int
) -> None:
    weight, bias = weight_of(factor), bias_of(factor)
    if part.transposed or bias is None:
        return
    solved = solve_rows(kernel_rows(weight, part), part, inputs, wanted, seed)
    if solved is not None:
        rows, offset = solved
        weight.copy_(weight_of_rows(rows.to(weight), part))
        bias.copy_(offset)


def _round_one(
    module: nn.Module, bits: int, inputs: list[Tensor], target: Target, seed: int
) -> None:
    """Round the weight of a dense layer in place; its bias takes up the mean of what is lost."""
    weight, layout = weight_of(module), target.layout
    top = min(2 ** (bits - 1) - 1, layout.weight_max)
    part = _geometry(module)
    if part is None or part.transposed or not inputs:
        axis = 1 if part is not None and part.transposed else 0
        shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
        scale = symmetric_scale(weight.detach(), top, axis).reshape(shape)
        weight.copy_(torch.round(weight / scale) * scale)
        return
    fine = bits > COARSE
    generator = torch.Generator().manual_seed(seed)
    total = sum(len(x) for x in inputs)
    read = observe_reading(part, inputs, generator, total, covariance=not fine)
    rows = kernel_rows(weight, part).double()
    values = torch.empty_like(rows)
    pairs = None if part.depthwise else layout.pair_sum
    for group, own in enumerate(rows):
        variance = read.variance[group].to(own)
        grid = Grid(best_scale(own, top, variance, pairs).to(own), -top, top, pairs)
        moment = None
        if read.covariance is not None:
            moment = read.covariance[group] + UNSEEN * variance.mean() * torch.eye(len(variance))
        q = roundings["nearest" if fine else "gptq"](own, grid, moment)
        values[group] = dequantize(q, grid)
    bias = bias_of(module)
    if bias is not None:
        bias.add_(((rows - values) @ read.mean[:, :, None].to(rows)).flatten().to(bias))
    weight.copy_(weight_of_rows(values.to(weight), part))


def _weighted(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m._parameters.get("weight"), nn.Parameter)]


def _geometry(module: nn.Module) -> Geometry | None:
    try:
        return geometry_of(module)
    except InputError:
        return None
