"""The verb `profile`: everything about a network on data that later steps need, measured once."""

import dataclasses
from collections.abc import Collection
from pathlib import Path

import torch
from torch import nn

from sft.core.allocator import kept_memory
from sft.core.data import Data
from sft.core.distributed import from_first, rank, world
from sft.core.progress import say, track
from sft.core.randomness import forked_rng
from sft.core.records import Inspection, Layer, LayerProfile, Option, Profile, Target
from sft.core.shards import of_first, whole_of
from sft.core.statistics import Statistics
from sft.models.inspect import inspect
from sft.profiling.anchors import with_damage
from sft.profiling.candidates import menu, schemes_for
from sft.profiling.damage import divergence
from sft.profiling.held_out import device_of
from sft.profiling.memory import FLOAT_BYTES, INTEGER_BYTES, Memory, alive_numbers
from sft.profiling.places import Place, places
from sft.profiling.request import ANCHOR_ERROR, Measuring, schemes_asked, widths_asked
from sft.profiling.request import fingerprint as fingerprint
from sft.profiling.samples import collect_inputs, quick_batches, reference_outputs, samples_for
from sft.profiling.stand_ins import COARSE, stand_in
from sft.profiling.statistics import gather_statistics
from sft.profiling.store import PROFILE_FILE as PROFILE_FILE
from sft.profiling.store import STATISTICS_FILE as STATISTICS_FILE
from sft.profiling.store import load_profile as load_profile
from sft.profiling.store import save_profile as save_profile
from sft.profiling.unfinished import Unfinished
from sft.runtimes.targets import find_target
from sft.surgery.modules import (
    fold_batch_norm,
    get_module,
    open_all_recurrent,
)

WORTH_MENDING = 1e-3  # damage below which it does not matter whether it is mended
ENOUGH = 10


@kept_memory()
def profile(
    model: nn.Module,
    data: Data,
    target: str = "onnxruntime",
    *,
    name: str = "model",
    schemes: str | Collection[str] | None = None,
    weight_bits: int | Collection[int] | None = (8, 4, 2),
    data_free: bool = False,
    loss_aware: bool = False,
    rank_multiple: int | None = None,
    anchor_samples: int | None = None,
    anchor_error: float = ANCHOR_ERROR,
    seed: int = 0,
    resume: str | Path | None = None,
) -> Profile:
    """Measure every layer's menu: each option with its expected damage and its cost.

    The calibration split is read once for the statistics, and its first samples once more for the
    anchors: options of each layer, split and rounded as they would be, are put into the network and
    the divergence from the original's outputs is measured; between them damage follows the
    closed-form errors (see `anchors`). Costs are those of the network with its batch norm folded,
    as it is exported; latency is not measured here.

    schemes : decompositions to plan with; None takes those that the target is known to run well.
    weight_bits : widths of the weights on every menu (8 bits for activations); None splits in float
        and rounds nothing.
    data_free : use plain SVD of the weights instead of the statistics (to compare).
    loss_aware : weigh output errors by the second moment of the loss gradient (a backward pass a
        batch; targets are sampled from the model's own predictions, no labels are needed).
    rank_multiple : ranks on the menus are multiples of it; None takes the target's lanes.
    anchor_samples, anchor_error : on how many samples damage is measured (by default 128, fewer for
        networks that cost much), and about which relative output error of a split: near what the
        budget will need is best.
    resume : a folder for what is finished, layer by layer; an interrupted call with the same
        arguments goes on from it. What was measured for another model, other data or by other
        versions is refused, with what differs. It stays until the caller deletes it.
    Where a process group of torch.distributed runs, each process gives its share of the data, the
    layers are shared out, and all get the same profile.
    Recurrent modules are opened into linear maps, which are layers of the profile.
    The model is not changed. Raises `InputError` if it or the data cannot be used.
    """
    data.check()
    found = find_target(target)
    how = Measuring(
        schemes=schemes_asked(schemes, found),
        weight_bits=widths_asked(weight_bits),
        data_free=data_free,
        loss_aware=loss_aware and not data_free,
        rank_multiple=rank_multiple,
        anchor_samples=anchor_samples,
        anchor_error=anchor_error,
        seed=seed,
    )
    with forked_rng(seed):
        return _profile(model, data, found, name, how, None if resume is None else Path(resume))


def _profile(
    model: nn.Module, data: Data, found: Target, name: str, how: Measuring, resume: Path | None
) -> Profile:
    example = data.example()
    inspect(model, example, name)
    folded, _ = open_all_recurrent(fold_batch_norm(model, example.to(device_of(model))))
    inside = inspect(folded, example, name)
    request = from_first(lambda: fingerprint(model, data, found, how).encode()).decode()
    unfinished = Unfinished(resume, request)
    used, samples = unfinished.statistics(lambda: _gather(folded, inside, data, how))
    layers = _measure(folded, inside, used, data, found, how, unfinished)
    memory = alive_numbers(folded, example.to(device_of(model)), inside.layers)
    integers = bool(how.weight_bits)
    around = INTEGER_BYTES if integers else FLOAT_BYTES
    params = max(inside.params, sum(x.params for x in inside.layers))  # tied: at each layer
    return Profile(
        model=name,
        target=found.name,
        fingerprint=request,
        samples=samples,
        params=params,
        macs=inside.macs,
        size=4 * params,
        overhead_macs=inside.macs - sum(x.macs for x in inside.layers),
        layers=tuple(_with_memory(entry, memory, integers) for entry in layers),
        seed=how.seed,
        input_shape=tuple(example.shape[1:]),
        memory=FLOAT_BYTES * memory.peak,
        overhead_memory=around * memory.elsewhere,
        statistics=used,
    )


def _gather(
    folded: nn.Module, inside: Inspection, data: Data, how: Measuring
) -> tuple[dict[str, Statistics], int]:
    """Statistics of the layers that can be split, and how many samples they are of."""
    split = [
        x.name for x in inside.layers if schemes_for(x, get_module(folded, x.name), how.schemes)[1]
    ]
    used, samples = gather_statistics(
        folded,
        [] if how.data_free else split,
        data.calibration,
        gradients=how.loss_aware and bool(split),
        one_shape=True,
    )
    return ({} if how.data_free else trusted(used)), samples


def _with_memory(entry: LayerProfile, memory: Memory, integers: bool) -> LayerProfile:
    """The menu with the bytes of activations that are alive under each option."""
    candidates = tuple(
        dataclasses.replace(
            c,
            cost=dataclasses.replace(c.cost, memory=memory.of(entry.layer, c.option, integers)),
        )
        for c in entry.candidates
    )
    return dataclasses.replace(entry, candidates=candidates)


def trusted(statistics: dict[str, Statistics]) -> dict[str, Statistics]:
    """Those with enough positions for what they describe: 10 for each number.

    With fewer, a covariance has directions without any variance only because so little was seen,
    and a split would drop them. A layer that is left out is split by its weights alone; a gradient
    that was seen too rarely is left out by itself.
    """
    kept = {}
    for name, own in statistics.items():
        if own.count < ENOUGH * own.patch_mean.shape[1]:
            say(
                f"  {name}: {own.count} positions are too few for {own.patch_mean.shape[1]} inputs;"
                " it is split without data. Give more calibration samples."
            )
            continue
        rare = own.count < ENOUGH * own.output_mean.shape[1]
        kept[name] = dataclasses.replace(own, gradient_covariance=None) if rare else own
    return kept


def _measure(
    folded: nn.Module,
    inside: Inspection,
    statistics: dict[str, Statistics],
    data: Data,
    target: Target,
    how: Measuring,
    unfinished: Unfinished,
) -> list[LayerProfile]:
    """The menu of every layer, with its damage; finished ones are taken from `unfinished`.

    Several processes take one layer each in turn; all measure on the samples of process 0.
    """
    layers = {layer.name: layer for layer in inside.layers}
    samples = how.anchor_samples or samples_for(inside)
    with forked_rng(how.seed):  # the same samples whether the statistics were gathered or stored
        inputs = of_first(collect_inputs(whole_of(data.calibration), samples))
    batches = quick_batches(inputs.to(device_of(folded)))
    with torch.no_grad():
        reference = reference_outputs(folded, batches, inside.model)
        open_layers = [name for name in layers if name not in unfinished.layers]
        walk = places(folded, open_layers, batches) if open_layers else iter(())
        mine: LayerProfile | None = None
        for number, place in enumerate(track(walk, "layers profiled", len(open_layers))):
            if number % world() == rank():
                layer, own = layers[place.name], statistics.get(place.name)
                module = get_module(folded, place.name)
                mine = _measure_layer(place, layer, module, own, reference, target, how)
            if number % world() == world() - 1 or number == len(open_layers) - 1:
                unfinished.add(mine)
                mine = None
    say(f"  profiled {len(layers)} layers on {len(inputs)} anchor samples")
    return [unfinished.layers[name] for name in layers]


def _measure_layer(
    place: Place,
    layer: Layer,
    module: nn.Module,
    own: Statistics | None,
    reference: torch.Tensor,
    target: Target,
    how: Measuring,
) -> LayerProfile:
    """The menu of one layer, with its damage where it stands."""
    refusals, _ = schemes_for(layer, module, how.schemes)
    candidates = menu(layer, module, own, target, how.schemes, how.weight_bits, how.rank_multiple)

    def measure(option: Option) -> float:
        return _damage(place, module, option, own, reference, target, how.seed)

    known, anchors, alphas = with_damage(candidates, measure, how.anchor_error)
    return LayerProfile(dataclasses.replace(layer, refusals=refusals), alphas, known, anchors)


def _damage(
    place: Place,
    module: nn.Module,
    option: Option,
    statistics: Statistics | None,
    reference: torch.Tensor,
    target: Target,
    seed: int,
) -> float:
    """Divergence with one layer as an option would leave it.

    What coarse rounding loses is largely mended by the layer behind it, which is fitted when the
    network is quantised; it is fitted here too where that is worth its time.
    """
    changed = stand_in(module, option, place.inputs, statistics, target, seed)
    found = divergence(reference, place.outputs_with(changed))
    coarse = option.weight_bits is not None and option.weight_bits <= COARSE
    if not coarse or found < WORTH_MENDING or place.outputs_mended is None:
        return found
    like = module
    if option.rank:
        floats = dataclasses.replace(option, weight_bits=None)
        like = stand_in(module, floats, [], statistics, target, seed)
    return min(found, divergence(reference, place.outputs_mended(changed, like)))
