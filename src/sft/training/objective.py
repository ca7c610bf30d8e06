"""What fine-tuning minimises: the distance from the teacher, at the outputs and at split layers."""

import contextlib
import fnmatch
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from sft.core.data import Loader, check_finite, inputs_of, targets_of
from sft.core.distributed import all_reduce_sum_, on_its_own, variances
from sft.core.errors import InputError
from sft.core.randomness import forked_rng
from sft.layers import FactorizedSFT

TEMPERATURE = 4.0
FEATURE_WEIGHT = 1.0

Loss = Callable[[torch.Tensor, Any], torch.Tensor]


class Objective:
    """The loss of a batch, for a student and a teacher (or the data's targets without one).

    Outputs: KL of softened logits ``(N, classes)``, at `temperature` and times its square (Hinton,
    Vinyals, Dean 2015); the relative squared error for outputs of another form. Split layers, and
    modules whose names fit the patterns of `match`: the squared error against the teacher's module
    of the same name, relative to its variance, averaged over the modules (after Romero et al.
    2015), with a weight that fades from `feature_weight` to zero, so that in the end the outputs
    count. Where a process group runs, variances are those of all processes' batches together.

    loss : ``loss(outputs, targets) -> scalar`` of the task: in place of cross-entropy without a
        teacher, added with `loss_weight` to the distance from one.
    Raises `InputError` for a pattern that fits no module that both networks have.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        device: torch.device,
        *,
        loss: Loss | None = None,
        loss_weight: float = 1.0,
        temperature: float = TEMPERATURE,
        feature_weight: float = FEATURE_WEIGHT,
        match: Sequence[str] = (),
    ) -> None:
        _check_numbers(temperature, feature_weight, loss_weight)
        self.student, self.teacher, self.device = student, teacher, device
        self.loss, self.loss_weight = loss, loss_weight
        self.temperature, self.feature_weight = temperature, feature_weight
        self.match = tuple(match)
        self._seen: dict[str, torch.Tensor] = {}
        self._wanted: dict[str, torch.Tensor] = {}
        self.matched = [] if teacher is None else _common_modules(student, teacher, match)

    def __call__(self, batch: Any, remaining: float = 1.0) -> torch.Tensor:
        """remaining : the share of the training that is left; the layers' part fades with it."""
        x = inputs_of(batch).to(self.device)
        check_finite(x, "train")
        if x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        self._seen.clear()
        self._wanted.clear()
        outputs: torch.Tensor = self.student(x)
        if self.teacher is None:
            return self._task(outputs, batch)
        with torch.no_grad():
            wanted = self.teacher(x)
        found = _distance(outputs, wanted, self.temperature)
        if self._seen:
            found = found + self.feature_weight * remaining * self._feature_distance()
        return found if self.loss is None else found + self.loss_weight * self._task(outputs, batch)

    def describe(self) -> str:
        """The settings that differ from the usual ones, for the request of a stored state."""
        given = {
            "loss": None if self.loss is None else name_of(self.loss),
            "loss_weight": self.loss_weight,
            "temperature": self.temperature,
            "feature_weight": self.feature_weight,
            "matched": self.match,
        }
        usual = {
            "loss": None,
            "loss_weight": 1.0,
            "temperature": TEMPERATURE,
            "feature_weight": FEATURE_WEIGHT,
            "matched": (),
        }
        return " ".join(f"{k}={v}" for k, v in given.items() if v != usual[k])

    @torch.no_grad()
    def judge(self, loader: Loader) -> float:
        """The mean loss of a sample of held-out data, of the outputs alone.

        Of several processes the mean over all their samples; what is relative to a variance is
        relative to that of the process's own batch.
        """
        figures = torch.zeros(2, dtype=torch.float64)
        with forked_rng(0):
            for batch in loader:  # a slice of it where the loader is shared out
                count = len(inputs_of(batch))
                with on_its_own():
                    loss = self(batch, 0.0).double()
                figures += torch.stack([count * loss, loss.new_tensor(count)]).cpu()
        all_reduce_sum_([figures])
        total, samples = figures.tolist()
        if not samples:
            raise InputError("The validation data is empty: at least one batch is needed.")
        return float(total / samples)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, the outputs of the matched modules are seen."""
        with contextlib.ExitStack() as hooks:
            for name in self.matched:
                assert self.teacher is not None
                for network, kept in ((self.student, self._seen), (self.teacher, self._wanted)):
                    module = network.get_submodule(name)
                    hooks.callback(module.register_forward_hook(_keeper(kept, name)).remove)
            yield

    def _task(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        """The loss of the task on the targets of a batch."""
        targets = targets_of(batch)
        if targets is None:
            raise InputError("Without a teacher, fine-tuning needs loaders of (inputs, targets).")
        if self.loss is not None:
            return self.loss(outputs, _on(outputs.device, targets))
        wanted = torch.as_tensor(targets, device=outputs.device)
        if not wanted.is_floating_point():
            wanted = wanted.long().reshape(-1) if outputs.ndim == 2 else wanted.long()
        return functional.cross_entropy(outputs, wanted)

    def _feature_distance(self) -> torch.Tensor:
        names = [n for n in self.matched if n in self._seen and n in self._wanted]
        for name in names:
            own, other = tuple(self._seen[name].shape), tuple(self._wanted[name].shape)
            if own != other:
                raise InputError(
                    f"match: '{name}' gives {own} in the network and {other} in its teacher; only "
                    "modules with outputs of one shape can be matched."
                )
        scales = variances([self._wanted[n] for n in names])
        errors = [
            (self._seen[n] - self._wanted[n]).square().mean() / scale.clamp_min(1e-12)
            for n, scale in zip(names, scales, strict=True)
        ]
        return torch.stack(errors).mean()


def _keeper(kept: dict[str, torch.Tensor], name: str) -> Callable[..., None]:
    def keep(module: nn.Module, __: Any, output: Any) -> None:
        if not isinstance(output, torch.Tensor):
            raise InputError(
                f"match: '{name}' ({type(module).__name__}) gives a {type(output).__name__}; only "
                "modules that give one tensor can be matched."
            )
        kept[name] = output.clone()  # what follows may work in place

    return keep


def name_of(loss: Loss) -> str:
    """The module and the name of a function, or of the class of an object that is called."""
    named = loss if hasattr(loss, "__qualname__") else type(loss)
    return f"{named.__module__}.{named.__qualname__}"


def _on(device: torch.device, targets: Any) -> Any:
    """All tensors of the targets on this device."""
    if isinstance(targets, torch.Tensor):
        return targets.to(device)
    if isinstance(targets, dict):
        return {key: _on(device, value) for key, value in targets.items()}
    if type(targets) in (tuple, list):
        return type(targets)(_on(device, value) for value in targets)
    return targets


def _check_numbers(temperature: float, feature_weight: float, loss_weight: float) -> None:
    if not 0 < temperature < math.inf:
        raise InputError(f"temperature={temperature}: it must be above 0 and finite.")
    for name, weight in (("feature_weight", feature_weight), ("loss_weight", loss_weight)):
        if not 0 <= weight < math.inf:
            raise InputError(f"{name}={weight}: it must be at least 0 and finite.")


def _common_modules(student: nn.Module, teacher: nn.Module, match: Sequence[str]) -> list[str]:
    """Split layers whose dense form the teacher has, and what `match` names in both networks."""
    known = dict(teacher.named_modules())
    found = []
    for name, module in student.named_modules():
        if name not in known:
            continue
        whole = not isinstance(known[name], FactorizedSFT)
        split = isinstance(module, FactorizedSFT) and whole
        if split or (name and any(fnmatch.fnmatchcase(name, pattern) for pattern in match)):
            found.append(name)
    for pattern in match:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in found):
            raise InputError(
                f"match: '{pattern}' fits no module that both the network and its teacher have."
            )
    return found


def _distance(outputs: torch.Tensor, wanted: torch.Tensor, temperature: float) -> torch.Tensor:
    if wanted.ndim == 2 and wanted.shape[1] > 1:
        softened = functional.kl_div(
            (outputs / temperature).log_softmax(1),
            (wanted / temperature).log_softmax(1),
            reduction="batchmean",
            log_target=True,
        )
        return temperature**2 * softened
    (scale,) = variances([wanted], correction=0)
    error: torch.Tensor = (outputs - wanted).square().mean() / scale.clamp_min(1e-12)
    return error
