"""The loop of every training: batches, rates, gradients, and what is stored and told on the way.

What a training does besides (rounding, averages, shrinking ranks) is a `Part`; the loop asks each
part at the same places, in the order given, and settles them from the last to the first.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from sft.core.allocator import kept_memory
from sft.core.data import Loader
from sft.core.distributed import all_reduce_mean_, broadcast_, refuse_batch_statistics
from sft.core.errors import InputError
from sft.core.events import Events, nothing
from sft.core.progress import say
from sft.core.randomness import forked_rng
from sft.quantizers.pt2e import FakeQuantizeBase
from sft.training.checkpoint import Checkpoint

WARM_UP = 0.05
CLIP = 5.0
REPORT_EVERY = 50
FINE = 1_000_000  # by the clock, the share of the training done is counted in so many parts

Objective = Callable[[Any, float], Tensor]
M = TypeVar("M", bound=nn.Module)


class Part(Protocol):
    """What acts on a network beside the optimiser while it is trained."""

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """More groups of parameters for the optimiser: ``{"params": [...], "peak": rate}``."""

    def state(self) -> dict[str, Tensor]:
        """Tensors, by name, that are stored with a checkpoint and copied back into to resume."""

    def resumed(self) -> None:
        """A stored state, if there is one, is back; called once, before the first step."""

    def penalty(self) -> Tensor | None:
        """A scalar that is added to the loss."""

    def after_backward(self) -> None:
        """The gradients are there; they are not averaged over processes and not clipped yet."""

    def after_step(self, progress: float) -> None:
        """The optimiser has moved; `progress` is the share of the training done, in (0, 1]."""

    def finished(self) -> bool:
        """Whether the training is to end now."""

    def settle(self) -> None:
        """The training has ended."""


class Idle:
    """A part that does nothing; others override what they do."""

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        return []

    def state(self) -> dict[str, Tensor]:
        return {}

    def resumed(self) -> None:
        return

    def penalty(self) -> Tensor | None:
        return None

    def after_backward(self) -> None:
        return

    def after_step(self, progress: float) -> None:
        return

    def finished(self) -> bool:
        return False

    def settle(self) -> None:
        return


@dataclasses.dataclass(frozen=True)
class Settings:
    """How long and how fast a network is trained.

    steps : of the optimiser. minutes : end by the clock instead; the rate follows the time that
    has passed, the time before an interruption counted. learning_rate : the peak; it rises over
    the first 5 % and falls along a cosine to zero. mixed : the forward pass in bfloat16 where that
    is safe (`torch.autocast`); None: on GPUs that have it. on_event : gets a dict at each 50th
    step, for loggers. save_every : seconds between two stored states.
    """

    steps: int = 800
    minutes: float | None = None
    learning_rate: float = 2e-3
    seed: int = 0
    mixed: bool | None = None
    on_event: Events | None = None
    save_every: float | None = None

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise InputError(f"{self.steps} steps of training: 0 or more are possible.")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise InputError(f"{self.minutes} minutes of training: a time above 0 is wanted.")
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"Learning rate {self.learning_rate}: above 0 and finite is wanted.")

    def describe(self) -> str:
        """What a stored state has to agree with."""
        length = f"steps={self.steps}" if self.minutes is None else f"minutes={self.minutes}"
        mixed = "" if self.mixed is None else f" mixed={self.mixed}"
        return f"{length} learning_rate={self.learning_rate} seed={self.seed}{mixed}"


@kept_memory()
def run_steps(
    student: nn.Module,
    objective: Objective,
    train: Loader,
    parts: Sequence[Part],
    settings: Settings,
    checkpoint: Path | None = None,
    request: str = "",
) -> None:
    """Train `student` in place with Adam.

    objective : ``objective(batch, remaining) -> scalar loss``; `remaining` is the share of the
        training that is left. Gradients are clipped to norm 5.
    checkpoint : a file for the state; an interrupted call goes on from it and ends in the same
        weights. It stays until the caller, who has stored the result, deletes it.
    request : what the state has to agree with, besides the settings; another one is refused.
    Where a process group of torch.distributed runs, gradients are averaged over its processes.
    Raises `InputError` for empty data, a loss that is not finite, and a state that does not fit.
    """
    refuse_batch_statistics(student)
    run = _Run(student, objective, parts, settings)
    batches = _Batches(train, settings.seed)
    more = batches.state() | {k: v for part in parts for k, v in part.state().items()}
    asked = " ".join(text for text in (settings.describe(), request) if text)
    stored = Checkpoint(checkpoint, student, run.optimizer, asked, more, settings.save_every)
    first = step = stored.resume()
    for part in parts:
        part.resumed()
    done, whole = _position(settings, stored, step)
    with forked_rng():
        while done < whole and not any(part.finished() for part in parts):
            rate, batch = _schedule(done, whole), next(batches)
            if step == first:
                stored.start()
            loss = run.step(batch, 1 - done / whole, rate)
            step += 1
            _check_finite(loss, step, settings.learning_rate)
            done, whole = _position(settings, stored, step)
            for part in parts:
                part.after_step(done / whole)
            stored.save_if_due(step)
            _report(stored, step, done / whole, loss, rate * settings.learning_rate, settings)
    if step > first:
        stored.save(step)
    for part in reversed(parts):
        part.settle()


class _Run:
    """What the steps of one training share."""

    def __init__(
        self, student: nn.Module, objective: Objective, parts: Sequence[Part], settings: Settings
    ) -> None:
        self.objective, self.parts = objective, parts
        self.parameters = trainable(student)
        groups: list[dict[str, Any]] = [{"params": self.parameters, "peak": settings.learning_rate}]
        for part in parts:
            groups += part.groups(settings.learning_rate)
        self.optimizer = torch.optim.Adam(groups)
        self.device = self.parameters[0].device
        safe = self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        self.mixed = safe if settings.mixed is None else settings.mixed

    def step(self, batch: Any, remaining: float, rate: float) -> float:
        """One step at this share of the peak rates; returns the loss, the mean over processes."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed):
            loss = self.objective(batch, remaining)
        for part in self.parts:
            penalty = part.penalty()
            loss = loss if penalty is None else loss + penalty
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for part in self.parts:
            part.after_backward()
        value = self._average(loss.detach())
        if math.isfinite(value):
            nn.utils.clip_grad_norm_(self.parameters, CLIP)
            self.optimizer.step()
        return value

    def _average(self, loss: Tensor) -> float:
        """The loss as the mean over all processes; all gradients become means too."""
        value = loss.clone()
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        all_reduce_mean_([value, *(p.grad for p in trained if p.grad is not None)])
        return float(value)


def arranged(model: M, order: torch.memory_format) -> M:
    """The model itself, its image kernels in this order; channels last trains a third faster on
    processors.
    """
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=order)
    return model


def trainable(student: nn.Module) -> list[nn.Parameter]:
    """The floating parameters of a network, made trainable; the steps of roundings are not."""
    found = {
        id(p): p
        for module in student.modules()
        if not isinstance(module, FakeQuantizeBase)
        for p in module.parameters(recurse=False)
        if p.is_floating_point()
    }
    for parameter in found.values():
        parameter.requires_grad_(True)
    return list(found.values())


def _position(settings: Settings, stored: Checkpoint, step: int) -> tuple[int, int]:
    """How much is done and how much there is in all: steps, or parts of the time."""
    if settings.minutes is None:
        return step, settings.steps
    share = torch.tensor(stored.seconds() / (60 * settings.minutes))
    broadcast_([share])
    return min(int(share * FINE), FINE), FINE


def _schedule(done: int, whole: int) -> float:
    rising = max(1.0, WARM_UP * whole)
    if done < rising:
        return (done + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (done - rising) / max(1.0, whole - rising)))


def _check_finite(loss: float, step: int, learning_rate: float) -> None:
    if not math.isfinite(loss):
        raise InputError(
            f"Training diverged at step {step}: the loss is not finite. "
            f"Lower the learning rate (now {learning_rate})."
        )


def _report(
    stored: Checkpoint, step: int, progress: float, loss: float, rate: float, settings: Settings
) -> None:
    if step % REPORT_EVERY and progress < 1:
        return
    left = stored.seconds_left(progress)
    say(f"  step {step}, {100 * progress:.0f} %, loss {loss:.4f}, {left:.0f} s left")
    event = {"event": "step", "step": step, "progress": round(progress, 6), "loss": loss}
    (settings.on_event or nothing)(
        event | {"learning_rate": rate, "seconds": round(stored.seconds(), 3)}
    )


class _Batches:
    """The batches of a loader, pass after pass, without end; each pass is seeded by its number.

    A resumed one reads again what was read of the pass that it stopped in, and no more.
    """

    def __init__(self, train: Loader, seed: int) -> None:
        self._train, self._seed = train, seed
        self._place = torch.zeros(2, dtype=torch.int64)  # of finished passes; of batches in this
        self._reading: Iterator[Any] | None = None

    def state(self) -> dict[str, Tensor]:
        return {"loop:place": self._place}

    def __next__(self) -> Any:
        if self._reading is None:
            self._reading = self._read()
        return next(self._reading)

    def _read(self) -> Iterator[Any]:
        while True:
            passes, known = self._place.tolist()
            torch.manual_seed(self._seed * 1_000_003 + passes)
            count = 0
            for batch in self._train:
                count += 1
                if count > known:
                    self._place[1] = count
                    yield batch
            if count == 0:
                raise InputError("The train data is empty: fine-tuning needs at least one batch.")
            self._place += torch.tensor([1, -int(self._place[1])])
