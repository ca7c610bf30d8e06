"""The verb `quantize`: a float network and unlabelled data in, a network in integers out."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from sft.calibration.blocks import HELD_OUT, reconstruct_blocks
from sft.calibration.equalize import equalize as equalize_channels
from sft.calibration.factors import orthonormalize
from sft.calibration.rounding import MANY, How, round_weights, samples_wanted
from sft.calibration.samples import Reservoir, quick_layout, samples_that_fit
from sft.calibration.sensitivity import find_sensitive, first_output, keep_in_float
from sft.core.allocator import kept_memory
from sft.core.data import Loader
from sft.core.distributed import broadcast_, gather_tensors
from sft.core.progress import say
from sft.core.randomness import forked_rng
from sft.core.records import Plan, Target
from sft.profiling.damage import divergence
from sft.profiling.held_out import batches, device_of
from sft.quantizers.fake import Mode
from sft.quantizers.histogram import Histogram
from sft.quantizers.ranges import ranges as known_ranges
from sft.runtimes.targets import find_target
from sft.surgery.quantize import QuantizedModel, prepare


@kept_memory()
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
    refit: bool = True,
    equalize: bool = False,
    spare_sensitive: bool = True,
    reconstruct: int = 0,
    seed: int = 0,
) -> QuantizedModel:
    """Round weights and activations as the plan and the target say, without labels.

    First the whole data passes in float: a histogram of every activation gives its range. Then
    the weights are rounded layer by layer on a few samples that are kept, each in the metric of
    what it will read in integers. They are at most 256: 48 where no layer of at most 6 bits, no
    refit and no large covariance asks for more, and fewer where activations are large.

    target : a target or its name. calibration : batches of inputs, or of (inputs, targets).
    ranges : of activations, a name of `quantizers.ranges`. weight_ranges : the same for weights;
        "mse" weighs the error by the data. rounding : a name of `quantizers.roundings`; by default
        GPTQ, but nearest in wide layers above 6 bits. correct_bias : give each bias the mean of
        what its weights lost.
    refit : solve layers of at most 6 bits, and last factors of split ones, again behind the rounded
        ones before them, and choose the gauge of split ones (`calibration.refit`, `factors`).
    equalize : bring the channels between two layers to like ranges before (`calibration.equalize`).
    spare_sensitive : leave a layer in float that integers would ruin; the result's `plan` says so.
    reconstruct : steps of block reconstruction after it, for each block (`calibration.blocks`).
        A large gain on GPTQ alone (`refit=False`); behind a refit none was found. It is dropped if
        the outputs for samples that it did not learn from are no closer.
    Where a process group of torch.distributed runs, each process gives its share of the data and
    all end with the same network.
    `small` is not touched. Raises `InputError` if it cannot be captured or the data is empty.
    """
    how = How(rounding, weight_ranges, correct_bias, refit, seed)
    found = find_target(target) if isinstance(target, str) else target
    for _ in range(2):
        result = _round(small, plan, found, calibration, ranges, equalize, how, reconstruct > 0)
        reasons = _sensitive(result) if spare_sensitive else {}
        if not reasons:
            break
        for name, reason in reasons.items():
            say(f"  {name}: {reason}")
        plan = keep_in_float(plan, reasons)
    if reconstruct:
        _reconstruct(result, reconstruct, seed)
    return result.model


@dataclasses.dataclass(frozen=True)
class Observed:
    """What a network showed in float.

    originals : its weights by parameter name. inputs : the samples that were kept, in batches.
    outputs : what it gave for them in float, ``(N, ...)``.
    """

    originals: dict[str, Tensor]
    inputs: list[Tensor]
    outputs: Tensor


def observe(
    model: QuantizedModel,
    device: torch.device,
    calibration: Loader,
    even: bool,
    how: How,
    samples: int,
) -> Observed:
    """Pass all data through a prepared network in float: histograms, and a few samples of it.

    even : equalise channels first, which takes one more pass. samples : at most so many are kept.
    """
    if how.refit:
        orthonormalize(model, model.plan)
    if even:
        model.set_modes(Mode.PASS, Mode.PASS)
        equalize_channels(model, lambda: batches(calibration, device, None, how.seed))
    model.set_modes(Mode.OBSERVE, Mode.PASS)
    limit = samples_that_fit(model.graph_module, samples)
    kept, given = Reservoir(limit, how.seed), Reservoir(limit, how.seed)
    arrange = quick_layout(model.graph_module)
    for x in batches(calibration, device, None, how.seed):
        kept.add(x)
        given.add(first_output(model(arrange(x))))
    kept.share()
    inputs = kept.batches()
    if given.seen == kept.seen:
        given.share()
        outputs = given.batches()
    else:  # they do not count samples along their first axis
        model.set_modes(Mode.PASS, Mode.PASS)
        outputs = [first_output(model(x)) for x in inputs]
    originals = {name: weight.detach().clone() for name, (weight, _) in model.weights().items()}
    return Observed(originals, inputs, torch.cat(outputs))


@dataclasses.dataclass(frozen=True)
class _Rounded:
    """A network in integers, beside what it was.

    shown : what it showed in float. floats : its parameters before rounding, where they are wanted.
    outputs : what it gives for the samples of `shown` in integers, ``(N, ...)``.
    """

    model: QuantizedModel
    shown: Observed
    floats: dict[str, Tensor]
    outputs: Tensor


def _round(
    small: nn.Module,
    plan: Plan,
    target: Target,
    calibration: Loader,
    ranges: str,
    even: bool,
    how: How,
    reconstructed: bool,
) -> _Rounded:
    """Pass all data in float, fix the activations' grids, round the weights; the same network in
    every process. reconstructed : blocks will be, which takes more samples and the floats.
    """
    choose = known_ranges[ranges]
    with forked_rng():
        model = prepare(small, plan, target)
        samples = MANY if reconstructed else samples_wanted(model, how)
        shown = observe(model, device_of(small), calibration, even, how, samples)
    set_ranges(model, choose)
    model.set_modes(Mode.ROUND, Mode.ROUND)
    floats = _floats(model) if reconstructed else {}
    outputs = round_weights(model, shown.inputs, how)
    broadcast_([*model.parameters(), *model.buffers()])
    return _Rounded(model, shown, floats, outputs)


def _sensitive(rounded: _Rounded) -> dict[str, str]:
    """Layers that integers would ruin, with the reason in words."""
    shown = rounded.shown
    return find_sensitive(
        rounded.model, shown.originals, shown.inputs, shown.outputs, rounded.outputs
    )


def _floats(model: QuantizedModel) -> dict[str, Tensor]:
    """A copy of every parameter, biases too, which the rounding of weights also changes."""
    return {name: p.detach().clone() for name, p in model.graph_module.named_parameters()}


def _reconstruct(rounded: _Rounded, steps: int, seed: int) -> None:
    """Reconstruct the blocks in place, if that helps the outputs for samples held out from it."""
    model, shown = rounded.model, rounded.shown
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reconstruct_blocks(model, shown.inputs, rounded.floats, steps=steps, seed=seed)
    judge, wanted = (x[::HELD_OUT] for x in (torch.cat(shown.inputs), shown.outputs))
    reached = divergence(wanted, first_output(model(judge)))
    if reached >= divergence(wanted, rounded.outputs[::HELD_OUT]):
        say("  block reconstruction is dropped: the network's outputs are no closer")
        model.load_state_dict(before)


def set_ranges(model: QuantizedModel, choose: Any) -> None:
    """Fix the grid of every activation by its histogram, and drop the histogram.

    The histograms of several processes are merged: all get the same grids.
    """
    for activation in model.activations().values():
        if activation.histogram is None:
            continue
        merged = Histogram()
        for state in gather_tensors(activation.histogram.state()):
            merged.merge(Histogram.from_state(state))
        values, counts = merged.values_and_counts()
        low, high = choose(values, counts, activation.quant_min, activation.quant_max, False)
        activation.set_range(low, high)
        activation.histogram = None
