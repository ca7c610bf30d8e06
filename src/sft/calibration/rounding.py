"""Every weight to integers, layer by layer, fitted to what the layer will read in integers.

The walk has brought the layer its inputs twice: in float, and rounded by all that stands before
it. Its integers are chosen in the metric of the rounded inputs (their covariance), and its bias
takes up the mean of what its weights lost (Nagel et al. 2019, arXiv:1906.04721, section 4.2). The
mean that the rounding of activations took away is left alone: it is that of the most frequent
value, a background for one, and mending it moves all the others.
"""

import dataclasses
import math

import torch
from torch import Tensor
from torch.fx import Node

from sft.calibration.factors import factors_of
from sft.calibration.refit import refit
from sft.calibration.walk import Walk, weighted_user
from sft.core.geometry import Geometry
from sft.core.progress import track
from sft.profiling.reading import (
    Reading,
    geometry_of_node,
    kernel_rows,
    observe_reading,
    weight_of_rows,
)
from sft.quantizers.fake import WeightFakeQuantize
from sft.quantizers.grid import Grid, dequantize
from sft.quantizers.narrow import group_scales, round_groups
from sft.quantizers.ranges import weight_scale
from sft.quantizers.rounding import roundings
from sft.quantizers.scale import best_scale
from sft.surgery.quantize import QuantizedModel

COARSE = 6  # bits up to which the better rounding is always worth its time
UNSEEN = 0.03  # of the mean variance, added to a covariance: a sample shows too little of it
MANY, FEW = 256, 48  # samples
MANY_SCALES, FEW_SCALES = 36, 8  # that are tried for each row
MANY_GROUPS = 4  # of a grouped layer, from which they are rounded side by side
NARROW = 512  # numbers that an output reads, up to which it costs hardly any


@dataclasses.dataclass(frozen=True)
class How:
    """How weights are rounded.

    rounding : a name of `roundings`, or None for "nearest" where that is nearly as good: above 6
        bits, in wide layers and where few positions are seen, without saturating pairs; and "gptq"
        elsewhere. scale : "mse" in the metric of the data, or a name of `ranges`, of the weights
        alone. refit : solve the last factor of a split layer again before it is rounded (see
        `factors`), and layers of at most 6 bits.
    """

    rounding: str | None = None
    scale: str = "mse"
    correct_bias: bool = True
    refit: bool = True
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A weighted operator and its weight, which is rounded. refits : it is solved again before."""

    node: Node
    fake: Node
    weight: Tensor
    rounding: WeightFakeQuantize
    geometry: Geometry
    refits: bool

    @property
    def depth(self) -> int:
        """How many numbers an output reads."""
        return self.geometry.inputs // self.geometry.groups * self.geometry.taps

    def method(self, how: How, samples: int) -> str:
        """The name of the rounding where so many samples are seen."""
        if how.rounding is not None:
            return how.rounding
        fine = self.rounding.bits > COARSE and self.rounding.pair_sum is None
        positions = math.prod(self.node.meta["val"].shape[1:]) // self.geometry.outputs
        few = samples * positions < self.depth
        return "nearest" if fine and (self.depth > NARROW or few) else "gptq"


def samples_wanted(model: QuantizedModel, how: How) -> int:
    """How many samples to keep: few where they weigh errors, give means and small covariances."""
    for layer in _layers(model, how):
        wide = layer.depth > NARROW and layer.method(how, FEW) != "nearest"
        if layer.refits or layer.rounding.bits <= COARSE or wide:
            return MANY
    return FEW


@torch.no_grad()
def round_weights(model: QuantizedModel, batches: list[Tensor], how: How) -> Tensor:
    """Freeze the scales of all weights and put each weight on its grid, in place.

    batches : inputs that stand for the data. A weight that several operators use is rounded in no
    metric. Returns the network's (first) outputs ``(N, ...)`` for them, all rounded.
    """
    layers = {layer.node: layer for layer in _layers(model, how)}
    fakes = {layer.fake: layer.weight for layer in layers.values()}
    for parameter, fake, rounding in model.rounded_nodes():
        if fake not in fakes:
            _round_alone(model.graph_module.get_parameter(str(parameter.target)), rounding)
    generator = torch.Generator().manual_seed(how.seed)
    refitted = [layer.node for layer in layers.values() if layer.refits]
    walk = Walk(model.graph_module, batches, refitted[-1] if refitted else None)
    for node in track(walk, "nodes calibrated", len(model.graph_module.graph.nodes)):
        if node in fakes:
            walk.rounded[node] = [fakes[node]]
        if node in layers:
            _round_layer(walk, layers[node], how, generator)
    return walk.outputs()


def _layers(model: QuantizedModel, how: How) -> list[_Layer]:
    """Every operator whose weight is rounded for it alone, in the graph's order."""
    last = {names[-1] for names in factors_of(model, model.plan).values()}
    found: dict[Node, _Layer] = {}
    for parameter, fake, rounding in model.rounded_nodes():
        name, node = str(parameter.target), weighted_user(fake)
        weight = model.graph_module.get_parameter(name)
        geometry = None if node is None else geometry_of_node(node, weight)
        if node is not None and geometry is not None:
            refits = how.refit and (name in last or rounding.bits <= COARSE)
            found[node] = _Layer(node, fake, weight, rounding, geometry, refits)
    return [found[node] for node in model.graph_module.graph.nodes if node in found]


def _round_layer(walk: Walk, layer: _Layer, how: How, generator: torch.Generator) -> None:
    node, weight, geometry = layer.node, layer.weight, layer.geometry
    rounding = layer.rounding
    data = node.args[0]
    assert isinstance(data, Node)
    bias = node.args[2] if len(node.args) > 2 and how.correct_bias else None
    rows = kernel_rows(weight, geometry).clone()
    solved = refit(walk, node, rows, geometry, how.seed) if layer.refits else None
    if solved is not None and isinstance(bias, Node):
        rows, offset = solved
        walk.rounded[bias][0].copy_(offset)
    total = sum(len(b) for b in walk.batches)
    name = layer.method(how, total)
    read = observe_reading(
        geometry, walk.rounded[data], generator, total, covariance=name != "nearest"
    )
    if not isinstance(bias, Node):
        read = _about_zero(read)
    scales = _scales(rows, read, rounding, how)
    top, pairs = rounding.quant_max, rounding.pair_sum
    if len(rows) > MANY_GROUPS and pairs is None and name == "gptq":
        assert read.covariance is not None
        q = round_groups(rows, scales, _with_ridge(read.covariance), top)
        values = q.to(rows) * scales.to(rows)[:, :, None]
    else:
        values = torch.empty_like(rows)
        for group, own in enumerate(rows):
            grid = Grid(scales[group], -top, top, pairs)
            moment = None if read.covariance is None else _with_ridge(read.covariance[group])
            values[group] = dequantize(roundings[name](own, grid, moment), grid)
    weight.copy_(weight_of_rows(values, geometry))
    rounding.freeze(scales.flatten().to(weight))
    if isinstance(bias, Node):
        lost = (rows - values).to(read.mean) @ read.mean[:, :, None]
        walk.rounded[bias][0].add_(lost.flatten().to(weight))


def _scales(rows: Tensor, read: Reading, rounding: WeightFakeQuantize, how: How) -> Tensor:
    """``(G, o)`` the scale of each row."""
    if how.scale != "mse":
        return torch.stack([weight_scale(own, rounding.quant_max, how.scale) for own in rows])
    if len(rows) > MANY_GROUPS and rounding.pair_sum is None:
        return group_scales(rows, read.variance, rounding.quant_max, MANY_SCALES)
    few = rounding.bits > COARSE and rounding.pair_sum is None  # clipping hardly pays there
    count = FEW_SCALES if few else MANY_SCALES
    return torch.stack(
        [
            best_scale(own, rounding.quant_max, variance, rounding.pair_sum, count)
            for own, variance in zip(rows, read.variance, strict=True)
        ]
    )


def _with_ridge(covariance: Tensor) -> Tensor:
    """``(..., D, D)`` with a share of its mean variance added to the diagonal."""
    level = UNSEEN * covariance.diagonal(dim1=-2, dim2=-1).mean(-1)
    unit = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    return covariance + level[..., None, None] * unit


def _about_zero(read: Reading) -> Reading:
    """The moments about zero: without a bias to take up the mean, the mean counts as well."""
    square = read.mean[:, :, None] * read.mean[:, None, :]
    full = None if read.covariance is None else read.covariance + square
    return Reading(read.mean, read.variance + read.mean.square(), full)


def _round_alone(weight: Tensor, rounding: WeightFakeQuantize) -> None:
    """Round a weight in no metric, along its own channel axis."""
    moved = weight.detach().movedim(rounding.ch_axis, 0)
    rounding.freeze(best_scale(moved.flatten(1), rounding.quant_max, None, None).to(weight))
    weight.copy_(rounding.on_grid(weight))
