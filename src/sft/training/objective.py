"""What fine-tuning minimises: the distance from the teacher, at the outputs and at split layers."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from sft.core.data import check_finite, inputs_of, targets_of
from sft.core.errors import InputError
from sft.layers import FactorizedSFT

TEMPERATURE = 4.0
FEATURE_WEIGHT = 1.0


class Objective:
    """The loss of a batch, for a student and a teacher (or the data's targets without one).

    Outputs: KL of softened logits ``(N, classes)``, at temperature 4 and times its square (Hinton,
    Vinyals, Dean 2015); the relative squared error for outputs of another form. Split layers: the
    squared error against the teacher's layer of the same name, relative to its variance, averaged
    over the layers (after Romero et al. 2015), with a weight that fades to zero, so that in the
    end the outputs count.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module | None, device: torch.device) -> None:
        self.student, self.teacher, self.device = student, teacher, device
        self._seen: dict[str, torch.Tensor] = {}
        self._wanted: dict[str, torch.Tensor] = {}
        self._hooks: list[Any] = []
        self.matched = [] if teacher is None else _common_layers(student, teacher)
        for name in self.matched:
            assert teacher is not None
            self._watch(student.get_submodule(name), name, self._seen)
            self._watch(teacher.get_submodule(name), name, self._wanted)

    def __call__(self, batch: Any, remaining: float = 1.0) -> torch.Tensor:
        """remaining : the share of the training that is left; the layers' part fades with it."""
        x = inputs_of(batch).to(self.device)
        check_finite(x, "train")
        if x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        outputs: torch.Tensor = self.student(x)
        if self.teacher is None:
            return _distance_from_targets(outputs, targets_of(batch))
        with torch.no_grad():
            wanted = self.teacher(x)
        loss = _distance(outputs, wanted)
        if self.matched:
            loss = loss + FEATURE_WEIGHT * remaining * self._feature_distance()
        return loss

    def close(self) -> None:
        """Take the hooks off again."""
        for hook in self._hooks:
            hook.remove()

    def _feature_distance(self) -> torch.Tensor:
        errors = [
            (self._seen[n] - self._wanted[n]).square().mean()
            / self._wanted[n].var().clamp_min(1e-12)
            for n in self.matched
        ]
        return torch.stack(errors).mean()

    def _watch(self, module: nn.Module, name: str, kept: dict[str, torch.Tensor]) -> None:
        def keep(_: nn.Module, __: Any, output: torch.Tensor) -> None:
            kept[name] = output

        self._hooks.append(module.register_forward_hook(keep))


def _common_layers(student: nn.Module, teacher: nn.Module) -> list[str]:
    """Split layers of the student whose dense form the teacher has under the same name."""
    dense = dict(teacher.named_modules())
    return [
        name
        for name, module in student.named_modules()
        if isinstance(module, FactorizedSFT)
        and not isinstance(dense.get(name, module), FactorizedSFT)
    ]


def _distance(outputs: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    if wanted.ndim == 2 and wanted.shape[1] > 1:
        softened = functional.kl_div(
            (outputs / TEMPERATURE).log_softmax(1),
            (wanted / TEMPERATURE).log_softmax(1),
            reduction="batchmean",
            log_target=True,
        )
        return TEMPERATURE**2 * softened
    scale = (wanted - wanted.mean()).square().mean().clamp_min(1e-12)
    error: torch.Tensor = (outputs - wanted).square().mean() / scale
    return error


def _distance_from_targets(outputs: torch.Tensor, targets: Any | None) -> torch.Tensor:
    if targets is None:
        raise InputError("Without a teacher, fine-tuning needs loaders of (inputs, targets).")
    wanted = torch.as_tensor(targets, device=outputs.device)
    wanted = wanted if wanted.is_floating_point() else wanted.long().reshape(-1)
    return functional.cross_entropy(outputs, wanted)
