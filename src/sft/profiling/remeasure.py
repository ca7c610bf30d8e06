"""The verb `remeasure`: a profile corrected with a chosen network in place.

Damages are measured one layer at a time, and planned as if they added up; at low bits they do not.
With all layers as a plan has them, each is put back to what it was: by how much the divergence
falls is what the layer does there, and its menu is scaled to that.
"""

import dataclasses
import math

import torch
from torch import Tensor, nn

from sft.core.data import Data
from sft.core.errors import InputError
from sft.core.progress import track
from sft.core.randomness import forked_rng
from sft.core.records import Plan, Profile
from sft.models.inspect import inspect
from sft.profiling.damage import collect_inputs, divergence
from sft.profiling.held_out import device_of
from sft.profiling.places import places
from sft.profiling.profile import BATCH, samples_for
from sft.profiling.stand_ins import stand_in
from sft.runtimes.targets import find_target
from sft.surgery.modules import fold_batch_norm, get_module, open_all_recurrent

FURTHEST = 30.0  # a scale is not moved by more than this factor in one round
NEGLIGIBLE = 1e-3  # of the whole damage: below it a layer tells nothing


@dataclasses.dataclass(frozen=True)
class Remeasured:
    """The corrected profile, and the measured damage of the plan it was measured with."""

    profile: Profile
    damage: float


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
    default as in `profile`. The network is split and rounded as the plan says; nothing is
    trained. The profile that is given is not changed.
    Raises `InputError` if plan and profile do not have the same layers.
    """
    entries = {entry.layer.name: entry for entry in profile.layers}
    options = {row.name: row.option for row in plan.rows}
    if set(options) != set(entries):
        raise InputError("The plan's layers are not those of the profile: make it from this one.")
    example = data.example().to(device_of(model))
    with forked_rng(seed):
        network, _ = open_all_recurrent(fold_batch_norm(model, example))
        count = anchor_samples or samples_for(inspect(network, example, profile.model))
        batches = list(
            torch.split(collect_inputs(data.calibration, count).to(example.device), BATCH)
        )
        reference = torch.cat([network(x).cpu() for x in batches])
        stand_ins = _stand_ins(network, profile, plan, batches, seed)
        whole, marginal = _marginal(network, stand_ins, batches, reference)
    predicted = {row.name: _predicted(profile, row.name, plan) for row in plan.rows}
    scales = _scales(whole, marginal, predicted)
    layers = tuple(
        dataclasses.replace(
            entry,
            scale=entry.scale * scales[entry.layer.name],
            candidates=tuple(
                dataclasses.replace(c, damage=c.damage * scales[entry.layer.name])
                for c in entry.candidates
            ),
        )
        for entry in profile.layers
    )
    return Remeasured(dataclasses.replace(profile, layers=layers), whole)


def _stand_ins(
    network: nn.Module, profile: Profile, plan: Plan, batches: list[Tensor], seed: int
) -> dict[str, nn.Module]:
    """Every layer as the plan has it."""
    target, known = find_target(profile.target), profile.statistics or {}
    options = {row.name: row.option for row in plan.rows}
    made: dict[str, nn.Module] = {}
    walk = places(network, list(options), batches)
    for place in track(walk, "layers made", len(options)):
        module, own = get_module(network, place.name), known.get(place.name)
        made[place.name] = stand_in(module, options[place.name], place.inputs, own, target, seed)
    return made


def _marginal(
    network: nn.Module, stand_ins: dict[str, nn.Module], batches: list[Tensor], reference: Tensor
) -> tuple[float, dict[str, float]]:
    """Damage of the whole, and by how much it falls when each layer alone is put back."""
    whole = math.nan
    falls: dict[str, float] = {}
    walk = places(network, list(stand_ins), batches, stand_ins)
    for place in track(walk, "layers measured in place", len(stand_ins)):
        if math.isnan(whole):
            whole = divergence(reference, place.outputs_with(stand_ins[place.name]))
        without = divergence(reference, place.outputs_with(get_module(network, place.name)))
        falls[place.name] = whole - without
    return whole, falls


def _predicted(profile: Profile, name: str, plan: Plan) -> float:
    entry = next(entry for entry in profile.layers if entry.layer.name == name)
    option = plan.option(name)
    return next((c.damage for c in entry.candidates if c.option == option), math.nan)


def _scales(
    whole: float, marginal: dict[str, float], predicted: dict[str, float]
) -> dict[str, float]:
    """Factors that make predictions what was measured; all sum up to the whole damage.

    A layer whose part cannot be told (nothing predicted, or too little measured) keeps its own.
    """
    floor = NEGLIGIBLE * whole
    shares = {name: max(value, floor) for name, value in marginal.items()}
    level = whole / max(sum(shares.values()), 1e-30)
    scales = {}
    for name, share in shares.items():
        before = predicted[name]
        told = math.isfinite(before) and before > 0 and max(before, marginal[name]) > floor
        scales[name] = level * share / before if told else 1.0
    return {name: min(max(s, 1 / FURTHEST), FURTHEST) for name, s in scales.items()}
