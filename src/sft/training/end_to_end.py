"""The verb `train`: ranks, weights and integers found in one training, within a budget."""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from sft.core.allocator import kept_memory
from sft.core.budget import ABSOLUTE, Budget
from sft.core.copies import copy_module
from sft.core.data import Data
from sft.core.distributed import from_first
from sft.core.errors import InputError
from sft.core.events import Events
from sft.core.files import check_writable
from sft.core.randomness import forked_rng
from sft.core.records import Profile, Target
from sft.profiling.profile import profile
from sft.profiling.request import refuse_other_weights
from sft.runtimes.targets import find_target
from sft.surgery.modules import (
    fold_batch_norm,
    open_all_recurrent,
)
from sft.training.bit_ramp import FIRST_BITS
from sft.training.course import ADMM, Course, Recipe, Trained
from sft.training.identity import DIGITS, identity_of, identity_of_data
from sft.training.objective import Loss, name_of
from sft.training.rank_menus import SPLIT, TRAINED, Bits, menus_of, without_damage

LEAST_STEPS = 8
NAMED = 5  # parameters in a message


@kept_memory()
def train(
    model: nn.Module,
    data: Data,
    budget: Budget,
    *,
    target: str = "onnxruntime",
    weight_bits: Bits = 4,
    scheme: str | Sequence[str] | None = None,
    steps: int = 2000,
    learning_rate: float = 2e-3,
    integer_learning_rate: float = 1e-3,
    seed: int = 0,
    keep: Sequence[str] = (),
    rank_multiple: int | None = None,
    name: str = "model",
    measured: Profile | None = None,
    scratch: bool = False,
    shrinking: bool = True,
    dual_ascent: bool = True,
    bit_ramp: bool = False,
    product_decay: bool = True,
    pretraining: str | None = None,
    teacher: nn.Module | None = None,
    loss: Loss | None = None,
    checkpoint: Path | None = None,
    on_event: Events | None = None,
) -> Trained:
    """Train a copy of `model` into low rank and few bits in one go, within a budget.

    The layers are factorised at full width; a penalty shrinks their ranks until the costs are
    within the budget (`Shrinking`). Then the ranks are fixed, by the knapsack of `plan` on the
    trained weights, which guarantees the budget; a layer whose factors would save nothing stays
    whole. The small network learns on in float and then with its rounding in place.

    budget : limits on size and MACs. The costs are those of `profile`.
    target : the runtime and instruction set. weight_bits : of all layers, or by layer: names or
        patterns, of which the last that fits counts; 8 where none fits. keep : layers that stay in
        float. scheme : one or more of `channel_in`, `channel_out` and `spatial`, of which each
        layer gets the one that suits it; by default those of the target. rank_multiple : ranks are
        multiples of it; None takes the target's lanes.
    steps : of the optimiser in all phases together. learning_rate, integer_learning_rate : their
        peaks in float and with rounding in place.
    scratch : draw all weights anew, by `reset_parameters` of each module; batch norm, in training
        form, is folded when the ranks are fixed. Its layers do not feel a penalty's scale, so
        singular values are thresholded.
    shrinking, dual_ascent, product_decay : False trains without this part: the ranks are fixed at
        the start; the weight of the penalty stays as it is; decay acts on the factors.
    bit_ramp : with rounding in place, narrow the weights from 8 bits to `weight_bits` (`BitRamp`)
        instead of starting at these. In short trainings it did harm.
    pretraining : "admm" spends a fifth of the steps on the dense network first, see `Nearness`.
    teacher : whose outputs are learned; `model` by default, and with `scratch` the targets of the
        data. loss : of the task, as in `finetune`.
    measured : a profile of `model` with these bits, schemes and ranks, which serves every budget;
        by default it is made. One of other weights is refused, except with `scratch`.
    name : what the plan calls the model; a reference that `sft.load` can read is best.
    checkpoint : a folder for the states; an interrupted call with the same arguments goes on from
        them and ends in the same weights; one with others is refused (of data the first batches
        are compared). They stay until the caller deletes the folder.
    on_event : gets a dict at each phase, each 50th step and when the ranks are fixed.

    `model` is not changed. Raises `InputError` for arguments that do not fit, and `BudgetError`,
    with what is feasible, before anything is trained.
    """
    _check(budget, pretraining, steps)
    data.check()
    found = find_target(target)
    recipe = Recipe(
        steps, learning_rate, integer_learning_rate, seed, scratch, shrinking, dual_ascent,
        bit_ramp, product_decay, pretraining,
    )  # fmt: skip
    asked = repr((recipe, budget, weight_bits, scheme, list(keep), rank_multiple))
    if measured is not None and not scratch:
        refuse_other_weights(measured, model)
    request = ""
    if checkpoint is not None:
        check_writable(checkpoint)
        given = _identities(model, teacher, loss, data, measured, recipe)
        request = f"{given} settings={_hash(asked + found.to_json())}"
    with forked_rng(seed):
        start = _start(model, data, seed if scratch else None)
        schemes = _schemes(scheme, found)
        if measured is None:
            measured = profile(
                start, data, found.name, name=name, schemes=schemes, data_free=scratch,
                weight_bits=_widths(weight_bits), rank_multiple=rank_multiple, seed=seed,
                resume=None if checkpoint is None else checkpoint / "profile",
            )  # fmt: skip
        measured = without_damage(measured) if scratch else measured
        menus = menus_of(measured, found, budget, keep, weight_bits, rank_multiple)
        learned = teacher if teacher is not None or scratch else model
        return Course(
            start, data, menus, recipe, learned, loss, checkpoint, request, on_event
        ).run()


def _identities(
    model: nn.Module,
    teacher: nn.Module | None,
    loss: Loss | None,
    data: Data,
    measured: Profile | None,
    recipe: Recipe,
) -> str:
    """What a call starts from besides its settings, in short hashes; process 0's count for all."""
    labelled = loss is not None or (recipe.scratch and teacher is None)

    def work() -> bytes:
        train, _ = data.split("train")
        found = {
            "model": identity_of(model),
            "teacher": None if teacher is None else identity_of(teacher),
            "loss": None if loss is None else name_of(loss),
            "calibration": identity_of_data(data.calibration, recipe.seed, False),
            "train": identity_of_data(train, recipe.seed, labelled),
            "profile": None if measured is None else _hash(_described(measured)),
            "torch": torch.__version__,
        }
        return " ".join(f"{part}={own}" for part, own in found.items() if own).encode()

    return from_first(work).decode()


def _described(measured: Profile) -> str:
    """What a profile was measured on and how, and the options that it offers."""
    options = [(e.layer.name, [str(c.option) for c in e.candidates]) for e in measured.layers]
    return f"{measured.fingerprint} {options}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


def _start(model: nn.Module, data: Data, redraw: int | None) -> nn.Module:
    """The network that training starts from: folded and opened, or drawn anew with this seed."""
    if redraw is not None:
        return open_all_recurrent(_drawn_anew(model, redraw))[0]
    example = data.example().to(next(model.parameters()).device)
    return open_all_recurrent(fold_batch_norm(model, example))[0]


def _drawn_anew(model: nn.Module, seed: int) -> nn.Module:
    """A copy whose modules have drawn all their weights; raises `InputError` where none does.

    Modules within others come first, as in constructors.
    """
    fresh = copy_module(model)
    torch.manual_seed(seed)
    weights = {n: p for n, p in fresh.named_parameters() if p.is_floating_point()}
    with torch.no_grad():
        for weight in weights.values():
            weight.fill_(math.nan)
    fresh.apply(_redraw)
    kept = [f"'{name}'" for name, weight in weights.items() if bool(weight.isnan().any())]
    if kept:
        raise InputError(
            f"scratch: nothing draws {', '.join(kept[:NAMED])} anew ({len(kept)} of "
            f"{len(weights)} parameters). Give the modules that hold them a method "
            "reset_parameters(), or train from the weights as they are."
        )
    return fresh


def _redraw(module: nn.Module) -> None:
    for name in ("reset_parameters", "_reset_parameters"):
        draw = getattr(module, name, None)
        if draw is not None:
            draw()
            return


def _schemes(scheme: str | Sequence[str] | None, target: Target) -> tuple[str, ...]:
    asked = target.schemes if scheme is None else (scheme,) if isinstance(scheme, str) else scheme
    other = [s for s in asked if s not in SPLIT]
    if other and scheme is not None:
        raise InputError(
            f"Ranks cannot be trained in '{other[0]}'; the schemes of two factors are "
            f"{', '.join(SPLIT)}."
        )
    return tuple(s for s in asked if s in SPLIT)


def _widths(weight_bits: Bits) -> set[int]:
    return {weight_bits} if isinstance(weight_bits, int) else {*weight_bits.values(), FIRST_BITS}


def _check(budget: Budget, pretraining: str | None, steps: int) -> None:
    if pretraining not in (None, ADMM):
        raise InputError(f"pretraining='{pretraining}': None or '{ADMM}' is wanted.")
    if steps < LEAST_STEPS:
        raise InputError(f"{steps} steps of training: at least {LEAST_STEPS} are wanted.")
    other = [k for k in budget.asked() if ABSOLUTE.get(k, k) not in TRAINED]
    if other or not budget.asked():
        named = f"not {', '.join(other)}" if other else "and at least one of them is needed"
        raise InputError(
            f"train takes a budget on size and MACs (size, macs, size_bytes, macs_count), {named}. "
            "Latency, memory and score are those of the plan that `compress` makes."
        )
