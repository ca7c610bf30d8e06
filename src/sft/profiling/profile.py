"""The verb `profile`: everything about a network on data that later steps need, measured once."""

import dataclasses
import hashlib
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch import nn

from sft.core.data import Data, fingerprint_data
from sft.core.errors import InputError
from sft.core.progress import say, track
from sft.core.randomness import forked_rng
from sft.core.records import (
    DENSE,
    STORED,
    Candidate,
    Inspection,
    Layer,
    LayerProfile,
    Profile,
    Target,
)
from sft.core.statistics import Statistics, load_statistics, save_statistics
from sft.decompositions import decompositions, factorize
from sft.models.inspect import inspect
from sft.profiling.candidates import (
    WEIGHT_BITS,
    menu,
    rounded_copy,
    schemes_for,
    with_damage,
)
from sft.profiling.damage import collect_inputs, divergence, run
from sft.profiling.statistics import gather_statistics
from sft.runtimes.targets import find_target
from sft.surgery.modules import (
    fold_batch_norm,
    get_module,
    open_all_recurrent,
    replace_module,
)

ANCHOR_ERROR = 0.1
ANCHOR_SAMPLES = 256
ENOUGH = 10
PROFILE_FILE, STATISTICS_FILE = "profile.json", "statistics.safetensors"


@dataclasses.dataclass(frozen=True)
class Measuring:
    """How a profile is measured: what `profile` was asked for."""

    schemes: tuple[str, ...]
    weight_bits: int | None = WEIGHT_BITS
    data_free: bool = False
    loss_aware: bool = False
    rank_multiple: int | None = None
    anchor_samples: int = ANCHOR_SAMPLES
    anchor_error: float = ANCHOR_ERROR

    def __post_init__(self) -> None:
        for name in ("rank_multiple", "anchor_samples", "anchor_error"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{name}={value}: it must be above 0.")
        if self.weight_bits is not None and not 2 <= self.weight_bits <= 8:
            raise InputError(f"weight_bits={self.weight_bits}: 2 to 8, or None to stay in float.")
        for scheme in self.schemes:
            decompositions[scheme]


def profile(
    model: nn.Module,
    data: Data,
    target: str = "onnxruntime",
    *,
    name: str = "model",
    schemes: Collection[str] | None = None,
    weight_bits: int | None = WEIGHT_BITS,
    data_free: bool = False,
    loss_aware: bool = False,
    rank_multiple: int | None = None,
    anchor_samples: int = ANCHOR_SAMPLES,
    anchor_error: float = ANCHOR_ERROR,
    seed: int = 0,
) -> Profile:
    """Measure every layer's menu: each option with its expected damage and its cost.

    The calibration split is read once for the statistics, and its first samples once more for the
    anchors: for each layer and scheme one factorised stand-in is put into the network and the
    divergence from the original's outputs is measured; it scales the closed-form errors. Costs are
    those of the network with its batch norm folded, as it is exported.

    schemes : decompositions to plan with; None takes those that the target is known to run well.
    weight_bits : bits of the weights of every option; None splits in float and rounds nothing.
    data_free : use plain SVD of the weights instead of the statistics (to compare).
    loss_aware : weigh output errors by the second moment of the loss gradient (a backward pass a
        batch; targets are sampled from the model's own predictions, no labels are needed).
    rank_multiple : ranks on the menus are multiples of it; None takes the target's lanes.
    anchor_samples, anchor_error : on how many samples the damage of a layer and scheme is measured,
        and at which relative output error: near what the budget will need is best.
    Recurrent modules are opened into linear maps, which are layers of the profile.
    The model is not changed. Raises `InputError` if it or the data cannot be used.
    """
    data.check()
    found = find_target(target)
    how = Measuring(
        schemes=tuple(sorted(found.schemes if schemes is None else set(schemes))),
        weight_bits=weight_bits,
        data_free=data_free,
        loss_aware=loss_aware and not data_free,
        rank_multiple=rank_multiple,
        anchor_samples=anchor_samples,
        anchor_error=anchor_error,
    )
    with forked_rng(seed):
        return _profile(model, data, found, name, how, seed)


def _profile(
    model: nn.Module, data: Data, found: Target, name: str, how: Measuring, seed: int
) -> Profile:
    example = data.example()
    inspect(model, example, name)
    folded, _ = open_all_recurrent(fold_batch_norm(model, example.to(_device(model))))
    inside = inspect(folded, example, name)
    split = [
        x.name for x in inside.layers if schemes_for(x, get_module(folded, x.name), how.schemes)[1]
    ]
    used, samples = gather_statistics(
        folded,
        [] if how.data_free else split,
        data.calibration,
        gradients=how.loss_aware and bool(split),
    )
    used = {} if how.data_free else trusted(used)
    layers = _measure(folded, inside, used, data, found, how)
    params = max(inside.params, sum(x.params for x in inside.layers))  # tied: at each layer
    return Profile(
        model=name,
        target=found.name,
        fingerprint=fingerprint(model, data, found, how, seed),
        samples=samples,
        params=params,
        macs=inside.macs,
        size=4 * params,
        overhead_macs=inside.macs - sum(x.macs for x in inside.layers),
        layers=tuple(layers),
        seed=seed,
        input_shape=tuple(example.shape[1:]),
        statistics=used,
    )


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


def fingerprint(
    model: nn.Module, data: Data, target: Target, how: Measuring | None = None, seed: int = 0
) -> str:
    """What a profile depends on, in a short hash: weights, data, target, options, torch."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"{key} {tuple(value.shape)}".encode())
        digest.update(
            value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )
    digest.update(fingerprint_data(data.calibration).encode())
    how = Measuring(schemes=target.schemes) if how is None else how
    digest.update(f"{target.to_json()} {how} {seed} {torch.__version__}".encode())
    return digest.hexdigest()[:16]


def save_profile(measured: Profile, folder: str | Path) -> None:
    """Store a profile: a JSON record and, beside it, the statistics."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_statistics(measured.statistics or {}, folder / STATISTICS_FILE)
    measured.save(folder / PROFILE_FILE)


def load_profile(folder: str | Path) -> Profile:
    """Read what `save_profile` stored; raises `InputError` for anything else."""
    folder = Path(folder)
    if not (folder / PROFILE_FILE).is_file():
        raise InputError(
            f"'{folder}' holds no {PROFILE_FILE}. `sft profile -o {folder}` makes one."
        )
    measured = Profile.load(folder / PROFILE_FILE)
    return dataclasses.replace(measured, statistics=load_statistics(folder / STATISTICS_FILE))


def _measure(
    folded: nn.Module,
    inside: Inspection,
    statistics: dict[str, Statistics],
    data: Data,
    target: Target,
    how: Measuring,
) -> list[LayerProfile]:
    inputs = collect_inputs(data.calibration, how.anchor_samples)
    reference = run(folded, inputs)
    measured: list[LayerProfile] = []
    for layer in track(inside.layers, "layers profiled", len(inside.layers)):
        module = get_module(folded, layer.name)
        own = statistics.get(layer.name)
        candidates = menu(
            layer, module, own, target, how.schemes, how.weight_bits, how.rank_multiple
        )
        refusals, schemes = schemes_for(layer, module, how.schemes)

        def measure(stand_in: nn.Module, layer: Layer = layer, module: nn.Module = module) -> float:
            replace_module(folded, layer.name, stand_in)
            try:
                return divergence(reference, run(folded, inputs))
            finally:
                replace_module(folded, layer.name, module)

        alphas = {
            scheme: _alpha(scheme, module, candidates, own, target, measure, how.anchor_error)
            for scheme in (*schemes, DENSE, STORED)
            if any(c.option.scheme == scheme for c in candidates)
        }
        measured.append(
            LayerProfile(_with_refusals(layer, refusals), alphas, with_damage(candidates, alphas))
        )
    say(f"  profiled {len(measured)} layers on {len(inputs)} anchor samples")
    return measured


def _alpha(
    scheme: str,
    module: nn.Module,
    candidates: list[Candidate],
    statistics: Statistics | None,
    target: Target,
    measure: Callable[[nn.Module], float],
    anchor_error: float,
) -> float:
    """Measured damage per unit of error, at the rank whose error is nearest to the anchor's."""
    own = [c for c in candidates if c.option.scheme == scheme]
    anchor = min(own, key=lambda c: abs(c.error - anchor_error))
    if scheme in (DENSE, STORED):
        assert anchor.option.weight_bits is not None
        damage = measure(rounded_copy(module, anchor.option.weight_bits, target))
    else:
        damage = measure(factorize(module, scheme, anchor.option.rank, statistics))
    return max(damage, 1e-9) / max(anchor.error, 1e-9)


def _with_refusals(layer: Layer, refusals: dict[str, str]) -> Layer:
    return dataclasses.replace(layer, refusals=refusals)


def _device(model: nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    return first.device if first is not None else torch.device("cpu")
