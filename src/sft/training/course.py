"""The phases of an end-to-end training, and the closed forms between them.

    pretrain   the dense network is drawn to low rank (on request)
    shrink     full-width factors under the SFT penalty
    recover    the ranks are fixed; what the cut took is learned again, in float
    integers   rounding in place, from 8 bits down to those that are wanted

Each phase is a training of its own, with its own state.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from sft.calibration.quantize import quantize
from sft.core.copies import copy_module
from sft.core.data import Data
from sft.core.events import Events, nothing
from sft.core.progress import say
from sft.core.records import Plan
from sft.core.shards import of_first, record_of_first
from sft.decompositions import factorize
from sft.layers import FactorizedSFT
from sft.profiling.held_out import distance
from sft.profiling.profile import trusted
from sft.profiling.statistics import gather_statistics
from sft.surgery.apply import apply
from sft.surgery.modules import (
    fold_batch_norm,
    get_module,
    replace_module,
)
from sft.surgery.quantize import QuantizedModel
from sft.training.admm import Nearness
from sft.training.bit_ramp import BitRamp, at_first_bits
from sft.training.loop import Part, Settings, arranged, run_steps
from sft.training.objective import Loss, Objective
from sft.training.product_decay import ProductDecay
from sft.training.rank_menus import Menus
from sft.training.reconstruct import reconstruct
from sft.training.rounded import RoundedTraining
from sft.training.shrinking import Shrinking

SHRINK, INTEGERS, PRETRAIN = 0.1, 0.25, 0.2  # shares of the steps; the rest recovers
DECAY = 1e-4
ADMM = "admm"

M = TypeVar("M", bound=nn.Module)


@dataclasses.dataclass(frozen=True)
class Trained:
    """What `train` gives: the network in integers, and the plan that says what became of it."""

    model: QuantizedModel
    plan: Plan


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is trained end to end; every field is an argument of `train`."""

    steps: int
    learning_rate: float
    integer_learning_rate: float
    seed: int
    scratch: bool
    shrinking: bool
    dual_ascent: bool
    bit_ramp: bool
    product_decay: bool
    pretraining: str | None


class Course:
    """One call of `train`: its phases, and what they share."""

    def __init__(
        self,
        start: nn.Module,
        data: Data,
        menus: Menus,
        recipe: Recipe,
        teacher: nn.Module | None,
        loss: Loss | None,
        checkpoint: Path | None,
        request: str,
        on_event: Events | None,
    ) -> None:
        self.start, self.data, self.menus, self.recipe = start, data, menus, recipe
        self.loss, self.checkpoint, self.request = loss, checkpoint, request
        self.example = data.example().to(next(start.parameters()).device)
        self.teacher: nn.Module | None = None
        if teacher is not None:
            folded = fold_batch_norm(copy_module(teacher).to(self.example.device), self.example)
            self.teacher = arranged(folded, torch.channels_last)
        self.on_event, self.left = on_event, recipe.steps

    def run(self) -> Trained:
        recipe, whole = self.recipe, self.start
        integers = round(INTEGERS * recipe.steps)
        if recipe.pretraining == ADMM:
            whole = self._pretrain(whole, round(PRETRAIN * recipe.steps))
        if recipe.shrinking or recipe.scratch:
            whole = self._shrink(whole, round(SHRINK * recipe.steps))
        plan, small = self._cut(whole)
        small = self._recover(small, self.left - integers)
        return self._round(small, plan, integers)

    def _pretrain(self, whole: nn.Module, steps: int) -> nn.Module:
        """The dense network, drawn to the ranks that a plan without training would choose."""
        student = copy_module(whole)
        ranks = {r.name: (r.option.scheme, r.option.rank) for r in self.menus.plan().rows}
        ranks = {name: rank for name, rank in ranks.items() if rank[1]}
        layers = {name: get_module(student, name) for name in ranks}
        part = Nearness(layers, ranks)
        before = part.distance()
        self._train("pretrain", student, [part], steps)
        say(f"  energy beyond the ranks, at most: {before:.3f} before, {part.distance():.3f} after")
        return arranged(student, torch.contiguous_format)

    def _shrink(self, whole: nn.Module, steps: int) -> nn.Module:
        """The dense network that the shrunk one stands for, its batch norm folded."""
        student = copy_module(whole)
        layers = self._widen(student) if self.recipe.shrinking else {}
        shrinking = Shrinking(
            layers, self.menus, dual_ascent=self.recipe.dual_ascent, proximal=self.recipe.scratch
        )
        parts = [shrinking] if layers else []
        self._train("shrink", student, parts, steps)
        self._tell("ranks", ranks=shrinking.ranks(), multipliers=shrinking.multipliers.tolist())
        for name, layer in layers.items():
            replace_module(student, name, layer.merge())
        return fold_batch_norm(arranged(student, torch.contiguous_format), self.example)

    def _widen(self, student: nn.Module) -> dict[str, FactorizedSFT]:
        """Split every layer of the student that can be split at full rank, in place."""
        statistics = self.menus.profile.statistics or {}
        layers = {}
        for name, scheme in self.menus.schemes.items():
            layer, full = get_module(student, name), self.menus.full_rank(name)
            split = factorize(layer, scheme, full, statistics.get(name))
            assert isinstance(split, FactorizedSFT)
            replace_module(student, name, split)
            layers[name] = split
        return layers

    def _cut(self, whole: nn.Module) -> tuple[Plan, nn.Module]:
        """A plan within the budget, and the network that is split by it.

        Ranks of least damage by the spectra of the trained weights, or by those of the original, on
        the trained weights or on the original ones: of these networks the one goes on that comes
        closest to the teacher's outputs on calibration data.
        """
        names = list(self.menus.schemes)
        statistics, _ = gather_statistics(whole, names, self.data.calibration)
        menus = self.menus.after(whole, trusted(statistics))
        choices = [(whole, _plan_of(menus))]
        if self.teacher is not None and self.recipe.shrinking:
            first = _plan_of(self.menus)
            if options_of(first) != options_of(choices[0][1]):
                known = choices[0][1].statistics
                choices.append((whole, dataclasses.replace(first, statistics=known)))
            if not self.recipe.scratch:
                choices.append((self.start, first))
        built = [self._built(network, plan) for network, plan in choices]
        far = [self._distance(small) for small in built] if len(built) > 1 else [0.0]
        best = int(of_first(torch.tensor(far, dtype=torch.float64).argmin().reshape(1)))
        plan = choices[best][1]
        trained = choices[best][0] is whole
        self._tell(
            "plan", cost=plan.cost.to_dict(), layers=options_of(plan), distances=far,
            weights="trained" if trained else "original",
        )  # fmt: skip
        return plan, built[best]

    def _built(self, whole: nn.Module, plan: Plan) -> nn.Module:
        """The dense network split by a plan and fitted in closed form."""
        small = apply(whole, plan)
        if not any(row.option.rank for row in plan.rows):
            return small
        wanted = whole if self.teacher is None else self.teacher
        return reconstruct(small, wanted, self.data.calibration, seed=self.recipe.seed)

    def _distance(self, small: nn.Module) -> float:
        """Divergence from the teacher's outputs on calibration data."""
        assert self.teacher is not None
        return distance(small, self.teacher, self.data.calibration, self.recipe.seed)

    def _recover(self, small: nn.Module, steps: int) -> nn.Module:
        split = [m for m in small.modules() if isinstance(m, FactorizedSFT)]
        decay = ProductDecay(split, DECAY, self.recipe.product_decay)
        self._train("recover", small, [decay], steps)
        return arranged(small, torch.contiguous_format)

    def _round(self, small: nn.Module, plan: Plan, steps: int) -> Trained:
        target, ramps = self.menus.target, self.recipe.bit_ramp
        rounded = quantize(
            small, at_first_bits(plan) if ramps else plan, target, self.data.calibration,
            spare_sensitive=False, seed=self.recipe.seed,
        )  # fmt: skip
        part = BitRamp(rounded, plan) if ramps else RoundedTraining(rounded, True, True)
        self._train("integers", rounded, [part], steps)
        rounded.plan = plan
        return Trained(arranged(rounded, torch.contiguous_format), plan)

    def _train(self, phase: str, student: nn.Module, parts: Sequence[Part], steps: int) -> None:
        """One phase, in place; what it does not use of its steps is left for later ones."""
        say(f"{phase}: {steps} steps")
        self._tell("phase", phase=phase, steps=steps)
        recipe = self.recipe
        rate = recipe.integer_learning_rate if phase == "integers" else recipe.learning_rate
        settings = Settings(steps, None, rate, recipe.seed, on_event=self.on_event)
        state = None if self.checkpoint is None else self.checkpoint / f"{phase}.state"
        arranged(student, torch.channels_last)
        _set_norms(student, training=recipe.scratch)
        objective = Objective(student, self.teacher, self.example.device, loss=self.loss)
        train, _ = self.data.split("train")
        with objective.watching():
            run_steps(student, objective, train, parts, settings, state, self.request)
        _set_norms(student, training=False)
        ended = [p.progress() for p in parts if isinstance(p, Shrinking)]
        self.left -= round(steps * ended[0]) if ended else steps

    def _tell(self, kind: str, **facts: Any) -> None:
        (self.on_event or nothing)({"event": kind, **facts})


def _plan_of(menus: Menus) -> Plan:
    """The plan of process 0, with the statistics that it was made from."""
    plan = record_of_first(Plan, menus.plan)
    return dataclasses.replace(plan, statistics=menus.profile.statistics)


def options_of(plan: Plan) -> dict[str, str]:
    """What becomes of each layer, in words."""
    return {row.name: str(row.option) for row in plan.rows}


def _set_norms(model: nn.Module, training: bool) -> None:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train(training)
