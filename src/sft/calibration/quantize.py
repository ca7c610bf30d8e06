"""The verb `quantize`: a float network and unlabelled data in, a network in integers out."""

from typing import Any

import torch
from torch import nn

from sft.calibration.rounding import How, round_weights
from sft.calibration.samples import Reservoir, samples_that_fit
from sft.core.data import Loader
from sft.core.errors import InputError
from sft.core.records import Plan, Target
from sft.profiling.held_out import batches, device_of
from sft.quantizers.fake import Mode
from sft.quantizers.ranges import ranges as known_ranges
from sft.runtimes.targets import find_target
from sft.surgery.quantize import QuantizedModel, prepare


@torch.no_grad()
def quantize(
    small: nn.Module,
    plan: Plan,
    target: Target | str,
    calibration: Loader,
    *,
    ranges: str = "mse",
    rounding: str | None = None,
    weight_ranges: str = "mse",
    correct_bias: bool = True,
    seed: int = 0,
) -> QuantizedModel:
    """Round weights and activations as the plan and the target say, without labels or training.

    First the whole data passes in float: a histogram of every activation gives its range. Then
    the weights are rounded layer by layer on a few samples that are kept (at most 256, fewer where
    activations are large), each in the metric of what it will read in integers.

    target : a target or its name. calibration : batches of inputs, or of (inputs, targets).
    ranges : of activations, a name of `quantizers.ranges`. weight_ranges : the same for weights;
        "mse" weighs the error by the data. rounding : a name of `quantizers.roundings`; by default
        GPTQ up to 6 bits, nearest above. correct_bias : give each bias the mean error.
    `small` is not touched. Raises `InputError` if it cannot be captured or the data is empty.
    """
    found = find_target(target) if isinstance(target, str) else target
    choose = known_ranges[ranges]
    prepared = prepare(small, plan, found)
    prepared.set_modes(Mode.OBSERVE, Mode.PASS)
    kept = Reservoir(samples_that_fit(prepared.graph_module), seed)
    for x in batches(calibration, device_of(small), None, seed):
        prepared(x)
        kept.add(x)
    if kept.seen == 0:
        raise InputError("The calibration data is empty: activation ranges need at least a batch.")
    set_ranges(prepared, choose)
    prepared.set_modes(Mode.ROUND, Mode.ROUND)
    round_weights(prepared, kept.batches(), How(rounding, weight_ranges, correct_bias, seed))
    return prepared


def set_ranges(model: QuantizedModel, choose: Any) -> None:
    """Fix the grid of every activation by its histogram, and drop the histogram."""
    for activation in model.activations().values():
        if activation.histogram is None:
            continue
        values, counts = activation.histogram.values_and_counts()
        low, high = choose(values, counts, activation.quant_min, activation.quant_max, False)
        activation.set_range(low, high)
        activation.histogram = None
