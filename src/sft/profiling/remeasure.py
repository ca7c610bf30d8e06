"""The verb `remeasure`: a profile corrected with a chosen network in place.

Damages are measured one layer at a time, and planned as if they added up; those of splits do not:
together they are some times greater. With all layers split as a plan has them, each is put back to
what it was: by how much the divergence falls is what its split does there, and its menu is scaled
to that. What rounding adds is left as it was measured.
"""

import dataclasses
import math

import torch
from torch import Tensor, nn

from sft.core.allocator import kept_memory
from sft.core.data import Data
from sft.core.errors import InputError
from sft.core.progress import track
from sft.core.randomness import forked_rng
from sft.core.records import Candidate, LayerProfile, Option, Plan, Profile
from sft.decompositions import factorize
from sft.models.inspect import inspect
from sft.profiling.damage import divergence
from sft.profiling.held_out import device_of
from sft.profiling.places import places
from sft.profiling.request import refuse_other_weights
from sft.profiling.samples import collect_inputs, quick_batches, reference_outputs, samples_for
from sft.surgery.modules import fold_batch_norm, get_module, open_all_recurrent

FURTHEST = 30.0  # a scale is not moved by more than this factor in one round
NEGLIGIBLE = 1e-3  # of the whole damage: below it a layer tells nothing


@dataclasses.dataclass(frozen=True)
class Remeasured:
    """The corrected profile, and the damage of the plan it was measured with: that of all splits
    together as measured, and what rounding adds as predicted.
    """

    profile: Profile
    damage: float


@kept_memory()
@torch.no_grad()
def remeasure(
    profile: Profile,
    plan: Plan,
    model: nn.Module,
    data: Data,
    *,
    anchor_samples: int | None = None,
    seed: int = 0,
) -> Remeasured:
    """Measure a plan's layers where they will stand; plan again from the profile that comes of it.

    model, data : those of the profile. anchor_samples : first calibration samples to measure on, by
    default as in `profile`. The layers are split as the plan says and not rounded; nothing is
    trained. The profile that is given is not changed. A plan that splits nothing is not measured.
    Raises `InputError` if plan and profile do not have the same layers, and for a model of other
    weights than those that were profiled.
    """
    entries = {entry.layer.name: entry for entry in profile.layers}
    if {row.name for row in plan.rows} != set(entries):
        raise InputError("The plan's layers are not those of the profile: make it from this one.")
    chosen = {row.name: _on_menu(entries[row.name], row.option) for row in plan.rows}
    rounding = sum(c.rounding for c in chosen.values())
    split = {name: c for name, c in chosen.items() if c.option.rank}
    if not split:
        return Remeasured(profile, rounding)
    refuse_other_weights(profile, model)
    example = data.example().to(device_of(model))
    with forked_rng(seed):
        network, _ = open_all_recurrent(fold_batch_norm(model, example))
        count = anchor_samples or samples_for(inspect(network, example, profile.model))
        inputs = collect_inputs(data.calibration, count).to(example.device)
        batches = quick_batches(inputs)
        reference = reference_outputs(network, batches, profile.model)
        known = profile.statistics or {}
        factorized = {
            name: factorize(
                get_module(network, name), c.option.scheme, c.option.rank, known.get(name)
            )
            for name, c in split.items()
        }
        whole, marginal = _marginal(network, factorized, batches, reference)
    scales = _scales(whole, marginal, {name: c.damage - c.rounding for name, c in split.items()})
    layers = tuple(_scaled(entry, scales.get(entry.layer.name, 1.0)) for entry in profile.layers)
    return Remeasured(dataclasses.replace(profile, layers=layers), whole + rounding)


def _on_menu(entry: LayerProfile, option: Option) -> Candidate:
    """The candidate of an option; one that is not on the menu cannot be corrected."""
    for candidate in entry.candidates:
        if candidate.option == option:
            return candidate
    raise InputError(
        f"'{option}' is not on the menu of layer '{entry.layer.name}' with weight "
        f"{entry.layer.weight_shape}, so what it does there cannot be told from the profile."
    )


def _scaled(entry: LayerProfile, factor: float) -> LayerProfile:
    """The menu with the part of each damage that comes from the split times a factor."""
    candidates = tuple(
        dataclasses.replace(c, damage=(c.damage - c.rounding) * factor + c.rounding)
        if math.isfinite(c.damage)
        else c
        for c in entry.candidates
    )
    return dataclasses.replace(entry, scale=entry.scale * factor, candidates=candidates)


def _marginal(
    network: nn.Module, stand_ins: dict[str, nn.Module], batches: list[Tensor], reference: Tensor
) -> tuple[float, dict[str, float]]:
    """Damage of the whole, and by how much it falls when each layer alone is put back.

    Both are infinite where the outputs of the whole are not finite.
    """
    whole: float | None = None
    falls: dict[str, float] = {}
    walk = places(network, list(stand_ins), batches, stand_ins)
    for place in track(walk, "layers measured in place", len(stand_ins)):
        if whole is None:
            whole = divergence(reference, place.outputs_with(stand_ins[place.name]))
            if not math.isfinite(whole):
                return math.inf, dict.fromkeys(stand_ins, math.inf)
        without = divergence(reference, place.outputs_with(get_module(network, place.name)))
        falls[place.name] = whole - without if math.isfinite(without) else 0.0
    return whole or 0.0, falls


def _scales(
    whole: float, marginal: dict[str, float], predicted: dict[str, float]
) -> dict[str, float]:
    """Factors that make predictions what was measured; all sum up to the whole damage.

    A layer whose part cannot be told (nothing predicted, or too little measured) keeps its own. Of
    a damage that is infinite each counts as much more than predicted.
    """
    if math.isinf(whole):
        return dict.fromkeys(marginal, FURTHEST)
    floor = NEGLIGIBLE * whole
    shares = {name: max(value, floor) for name, value in marginal.items()}
    level = whole / max(sum(shares.values()), 1e-30)
    scales = {}
    for name, share in shares.items():
        before = predicted[name]
        told = math.isfinite(before) and before > 0 and max(before, marginal[name]) > floor
        scales[name] = level * share / before if told else 1.0
    return {name: min(max(s, 1 / FURTHEST), FURTHEST) for name, s in scales.items()}
