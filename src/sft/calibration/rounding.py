"""Every weight to integers, layer by layer, fitted to what the layer will read in integers.

The walk has brought the layer its inputs twice: in float, and rounded by all that stands before
it. Its integers are chosen in the metric of the rounded inputs (their covariance), and its bias
takes up the mean of what its weights lost (Nagel et al. 2019, arXiv:1906.04721, section 4.2). The
mean that the rounding of activations took away is left alone: it is that of the most frequent
value, a background for one, and mending it moves all the others.
"""

import dataclasses

import torch
from torch import Tensor
from torch.fx import Node

from sft.calibration.layer import (
    channel_means,
    geometry_of_node,
    in_tap_order,
    kernel_rows,
    moments_of,
    weight_of_rows,
)
from sft.calibration.walk import Walk, weighted_user
from sft.core.geometry import Geometry
from sft.core.progress import track
from sft.quantizers.fake import WeightFakeQuantize
from sft.quantizers.grid import Grid, dequantize
from sft.quantizers.ranges import weight_scale
from sft.quantizers.rounding import roundings
from sft.quantizers.scale import best_scale
from sft.surgery.quantize import QuantizedModel

COARSE = 6  # bits at which the better rounding is worth its time, unless one is asked for


@dataclasses.dataclass(frozen=True)
class How:
    """How weights are rounded.

    rounding : a name of `roundings`, or None for "gptq" up to 6 bits and "nearest" above, where the
        two can hardly be told apart. scale : "mse" in the metric of the data, or a name of
        `ranges`, of the weights alone.
    """

    rounding: str | None = None
    scale: str = "mse"
    correct_bias: bool = True
    seed: int = 0


@torch.no_grad()
def round_weights(model: QuantizedModel, batches: list[Tensor], how: How) -> dict[str, float]:
    """Freeze the scales of all weights and put each weight on its grid, in place.

    Returns, by weight, the relative error that rounding everything up to this layer leaves at its
    output. A weight that several operators use is rounded to nearest, in no metric.
    """
    layers = {weighted_user(node): (p, node, r) for p, node, r in model.rounded_nodes()}
    for node, (parameter, _, rounding) in list(layers.items()):
        weight = model.graph_module.get_parameter(str(parameter.target))
        if node is None or geometry_of_node(node, weight) is None:
            _round_alone(weight, rounding)
    errors: dict[str, float] = {}
    generator = torch.Generator().manual_seed(how.seed)
    walk = Walk(model.graph_module, batches)
    for node in track(walk, "nodes calibrated", len(model.graph_module.graph.nodes)):
        if node not in layers:
            continue
        parameter, fake, rounding = layers[node]
        weight = model.graph_module.get_parameter(str(parameter.target))
        geometry = geometry_of_node(node, weight)
        if geometry is None:
            continue
        _round_layer(walk, node, weight, rounding, geometry, how, generator)
        walk.rounded[fake] = [weight]
        errors[str(parameter.target)] = _finish(walk, node, geometry)
    return errors


def round_rows(
    rows: Tensor, moment: Tensor | None, rounding: WeightFakeQuantize, how: How
) -> tuple[Tensor, Tensor]:
    """Rows ``(R, D)`` in kernel order to the values of their grid, and the scales ``(R,)``."""
    top, pairs = rounding.quant_max, rounding.pair_sum
    if how.scale == "mse":
        weights = None if moment is None else moment.diagonal()
        scale = best_scale(rows, top, weights, pairs)
    else:
        scale = weight_scale(rows, top, how.scale)
    grid = Grid(scale, -top, top, pairs)
    name = how.rounding or ("gptq" if rounding.bits <= COARSE else "nearest")
    return dequantize(roundings[name](rows, grid, moment), grid), scale


def _round_layer(
    walk: Walk,
    node: Node,
    weight: Tensor,
    rounding: WeightFakeQuantize,
    geometry: Geometry,
    how: How,
    generator: torch.Generator,
) -> None:
    data = node.args[0]
    assert isinstance(data, Node)
    total = sum(len(b) for b in walk.batches)
    moments = moments_of(geometry, walk.rounded[data], generator, total)
    moment, mean = moments.covariance(), in_tap_order(moments.mean(), geometry)
    bias = node.args[2] if len(node.args) > 2 and how.correct_bias else None
    moment = in_tap_order(moment, geometry)
    if not isinstance(bias, Node):
        moment = moment + mean[:, :, None] * mean[:, None, :]
    rows = kernel_rows(weight, geometry)
    found = [round_rows(r, m, rounding, how) for r, m in zip(rows, moment, strict=True)]
    values = torch.stack([v for v, _ in found])
    weight.copy_(weight_of_rows(values, geometry))
    rounding.freeze(torch.cat([scale for _, scale in found]).to(weight))
    if isinstance(bias, Node):
        lost = (rows - values).to(mean) @ mean[:, :, None]
        walk.rounded[bias][0].add_(lost.flatten().to(weight))


def _finish(walk: Walk, node: Node, geometry: Geometry) -> float:
    """Run the layer on both paths; the relative error of what it gives."""
    walk.plain[node] = walk.run(node, walk.plain, rounding=False)
    walk.rounded[node] = walk.run(node, walk.rounded, rounding=True)
    return _relative_error(walk.plain[node], walk.rounded[node], 1 if geometry.axes else -1)


def _round_alone(weight: Tensor, rounding: WeightFakeQuantize) -> None:
    """Round a weight in no metric, along its own channel axis."""
    moved = weight.detach().movedim(rounding.ch_axis, 0)
    rounding.freeze(best_scale(moved.flatten(1), rounding.quant_max, None, None).to(weight))
    weight.copy_(rounding.on_grid(weight))


def _relative_error(plain: list[Tensor], rounded: list[Tensor], axis: int) -> float:
    mean = channel_means(plain, axis)
    count = sum(y.numel() for y in plain) / len(mean)
    energy = sum(float(y.double().square().sum()) for y in plain) - count * float((mean**2).sum())
    error = sum(float((a - b).double().square().sum()) for a, b in zip(plain, rounded, strict=True))
    return error / max(energy, 1e-30)
