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

from sft.calibration.factors import factors_of
from sft.profiling.reading import (
    Reading,
    geometry_of_node,
    kernel_rows,
    observe_reading,
    weight_of_rows,
)
from sft.calibration.refit import refit
from sft.calibration.walk import Walk, weighted_user
from sft.core.geometry import Geometry
from sft.core.progress import track
from sft.quantizers.fake import WeightFakeQuantize
from sft.quantizers.grid import Grid, dequantize
from sft.quantizers.narrow import group_scales, round_groups
from sft.quantizers.ranges import weight_scale
from sft.quantizers.rounding import roundings
from sft.quantizers.scale import best_scale
from sft.surgery.quantize import QuantizedModel

COARSE = 6  # bits up to which the better rounding is always worth its time
UNSEEN = 0.03  # of the mean variance, added to a covariance: a sample shows too little of it
MANY, FEW = 36, 8  # scales that are tried for each row
MANY_GROUPS = 4  # of a grouped layer, from which they are rounded side by side
NARROW = 512  # numbers that an output reads, up to which it costs hardly any


@dataclasses.dataclass(frozen=True)
class How:
    """How weights are rounded.

    rounding : a name of `roundings`, or None for "nearest" where that is nearly as good: above 6
        bits, in wide layers, without saturating pairs; and "gptq" elsewhere. scale : "mse" in the
        metric of the data, or a name of `ranges`, of the weights alone. refit :
        solve the last factor of a split layer again before it is rounded (see `factors`).
    """

    rounding: str | None = None
    scale: str = "mse"
    correct_bias: bool = True
    refit: bool = True
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Rounded:
    """What the walk showed: by weight, the relative error that rounding everything up to its layer
    leaves at the layer's output; and the network's (first) outputs ``(N, ...)`` on both paths.
    """

    errors: dict[str, float]
    plain: Tensor
    rounded: Tensor


@torch.no_grad()
def round_weights(model: QuantizedModel, batches: list[Tensor], how: How) -> Rounded:
    """Freeze the scales of all weights and put each weight on its grid, in place.

    batches : inputs that stand for the data. A weight that several operators use is rounded in no
    metric.
    """
    found = list(model.rounded_nodes())
    layers = {weighted_user(node): (p, node, r) for p, node, r in found}
    for parameter, fake, rounding in found:
        node = weighted_user(fake)
        weight = model.graph_module.get_parameter(str(parameter.target))
        if node is None or geometry_of_node(node, weight) is None:
            _round_alone(weight, rounding)
    last = {names[-1] for names in factors_of(model, model.plan).values()}
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
        refits = how.refit and (str(parameter.target) in last or rounding.bits <= COARSE)
        _round_layer(walk, node, weight, rounding, geometry, how, generator, refits)
        walk.rounded[fake] = [weight]
        errors[str(parameter.target)] = _finish(walk, node)
    return Rounded(errors, *walk.outputs())


def method_for(rounding: WeightFakeQuantize, depth: int, how: How) -> str:
    """The name of the rounding for rows of `depth` weights."""
    easy = rounding.bits > COARSE and depth > NARROW and rounding.pair_sum is None
    return how.rounding or ("nearest" if easy else "gptq")


def _round_layer(
    walk: Walk,
    node: Node,
    weight: Tensor,
    rounding: WeightFakeQuantize,
    geometry: Geometry,
    how: How,
    generator: torch.Generator,
    refits: bool,
) -> None:
    data = node.args[0]
    assert isinstance(data, Node)
    bias = node.args[2] if len(node.args) > 2 and how.correct_bias else None
    rows = kernel_rows(weight, geometry).clone()
    solved = refit(walk, node, rows, geometry, how.seed) if refits else None
    if solved is not None and isinstance(bias, Node):
        rows, offset = solved
        walk.rounded[bias][0].copy_(offset)
    name = method_for(rounding, rows.shape[2], how)
    total = sum(len(b) for b in walk.batches)
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
        return group_scales(rows, read.variance, rounding.quant_max, MANY)
    few = rounding.bits > COARSE and rounding.pair_sum is None  # clipping hardly pays there
    return torch.stack(
        [
            best_scale(own, rounding.quant_max, variance, rounding.pair_sum, FEW if few else MANY)
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


def _finish(walk: Walk, node: Node) -> float:
    """Run the layer on both paths; the relative error of what it gives."""
    walk.plain[node] = walk.run(node, walk.plain, rounding=False)
    walk.rounded[node] = walk.run(node, walk.rounded, rounding=True)
    return _relative_error(walk.plain[node], walk.rounded[node])


def _round_alone(weight: Tensor, rounding: WeightFakeQuantize) -> None:
    """Round a weight in no metric, along its own channel axis."""
    moved = weight.detach().movedim(rounding.ch_axis, 0)
    rounding.freeze(best_scale(moved.flatten(1), rounding.quant_max, None, None).to(weight))
    weight.copy_(rounding.on_grid(weight))


def _relative_error(plain: list[Tensor], rounded: list[Tensor]) -> float:
    error = sum(float((a - b).norm()) ** 2 for a, b in zip(plain, rounded, strict=True))
    return error / max(sum(float(a.norm()) ** 2 for a in plain), 1e-30)
