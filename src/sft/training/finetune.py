"""Fine-tuning with the original network as teacher; unlabelled data is enough."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from sft.core.allocator import kept_memory
from sft.core.copies import copy_module
from sft.core.data import Loader, inputs_of
from sft.core.distributed import all_reduce_mean_
from sft.core.errors import InputError
from sft.core.progress import say
from sft.core.randomness import forked_rng
from sft.layers import FactorizedSFT
from sft.surgery.modules import fold_batch_norm
from sft.surgery.quantize import QuantizedModel
from sft.training.checkpoint import Checkpoint
from sft.training.objective import Objective
from sft.training.rounded import RoundedTraining

WARM_UP = 0.05
CLIP = 5.0
STEP_RATE = 0.1  # of step sizes, relative to that of weights; 1 was worse on a 3-bit network
REPORT_EVERY = 50


M = TypeVar("M", bound=nn.Module)


@kept_memory()
def finetune(
    model: M,
    train: Loader,
    teacher: nn.Module | None = None,
    *,
    steps: int = 800,
    learning_rate: float = 2e-3,
    seed: int = 0,
    checkpoint: Path | None = None,
    learn_steps: bool = True,
    freeze_oscillations: bool = True,
) -> M:
    """Train a copy of `model` to give the teacher's outputs; without a teacher, the targets.

    The loss is that of `Objective`: the distance from the teacher's outputs and from its layers
    where the student's are split, or cross-entropy with the data's targets without a teacher.
    Adam; the learning rate rises over the first 5 % of the steps and falls along a cosine to zero,
    gradients are clipped to norm 5. The network stays in evaluation form: dropout is off and batch
    norm that could not be folded keeps its statistics.

    A `QuantizedModel` is trained with its rounding in place, and its weights end on their grid:
    the integers of training are those of the file. Its step sizes are learned too (`learn_steps`,
    see `LearnedSteps`), and weights of up to 4 bits that swing between two integers are frozen
    (`freeze_oscillations`, see `Oscillations`).

    Where a process group of torch.distributed runs, gradients are averaged over its processes,
    which start from the same model and give loaders of their own share of the data.

    steps : optimiser steps; the data is passed through as often as needed.
    checkpoint : a file for the state; an interrupted call with the same arguments goes on from it
        and ends in the same weights. It stays until the caller, who has stored the result, deletes
        it. A state of other arguments is refused.
    Returns the trained copy. Raises `InputError` for empty data or missing targets.
    """
    student = _arrange(copy_module(model), torch.channels_last)
    parameters = [p for p in student.parameters() if p.is_floating_point()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    rounded = RoundedTraining(student, learn_steps, freeze_oscillations)
    optimizer = _optimizer(parameters, rounded.parameters(), learning_rate)
    request = f"steps={steps} learning_rate={learning_rate} seed={seed}"
    if isinstance(model, QuantizedModel):
        request += f" learn_steps={learn_steps} freeze_oscillations={freeze_oscillations}"
    stored = Checkpoint(checkpoint, student, optimizer, request, rounded.state())
    first = stored.resume()
    device = parameters[0].device
    objective = Objective(student, _prepare_teacher(teacher, student, train, device), device)
    with forked_rng():
        for step, batch in _batches(train, first, steps, seed):
            _set_rates(optimizer, _schedule(step, steps))
            loss = objective(batch, 1 - step / steps)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            rounded.collect_gradients()
            value = _average(loss.detach(), optimizer)
            _check_finite(value, step, learning_rate)
            nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            rounded.follow((step + 1) / steps)
            stored.save_if_due(step + 1)
            _report(stored, step + 1, steps, value)
    objective.close()
    if first < steps:
        stored.save(steps)
    rounded.settle()
    return _arrange(student, torch.contiguous_format)


def _optimizer(
    parameters: list[nn.Parameter], logarithms: list[nn.Parameter], learning_rate: float
) -> torch.optim.Adam:
    """Adam with the network's parameters and, apart, the logarithms of its step sizes."""
    groups = [{"params": parameters, "peak": learning_rate}]
    if logarithms:
        groups.append({"params": logarithms, "peak": STEP_RATE * learning_rate})
    return torch.optim.Adam(groups)


def _set_rates(optimizer: torch.optim.Optimizer, share: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share


def _average(loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> float:
    """The loss as the mean over all processes; all gradients become means too."""
    value = loss.clone()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    all_reduce_mean_([value, *(p.grad for p in trained if p.grad is not None)])
    return float(value)


def _check_finite(loss: float, step: int, learning_rate: float) -> None:
    if not math.isfinite(loss):
        raise InputError(
            f"Fine-tuning diverged at step {step}: the loss is not finite. "
            f"Lower the learning rate (now {learning_rate})."
        )


def _report(stored: Checkpoint, done: int, steps: int, loss: float) -> None:
    if done % REPORT_EVERY == 0 or done == steps:
        left = stored.seconds_left(done, steps)
        say(f"  step {done}/{steps}, loss {loss:.4f}, {left:.0f} s left")


def _prepare_teacher(
    teacher: nn.Module | None, student: nn.Module, train: Loader, device: torch.device
) -> nn.Module | None:
    """A copy with batch norm folded, so that its layers give what the student's are to give."""
    if teacher is None:
        return None
    with forked_rng():
        batch = next(iter(train), None)
    if batch is None:
        raise InputError("The train data is empty: fine-tuning needs at least one batch.")
    copied = copy_module(teacher).to(device)
    norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in copied.modules())
    if norms and any(isinstance(m, FactorizedSFT) for m in student.modules()):
        copied = fold_batch_norm(copied, inputs_of(batch)[:1].to(device))
    return _arrange(copied, torch.channels_last)


def _arrange(model: M, order: torch.memory_format) -> M:
    """Image kernels in this order; channels last makes training a third faster on processors."""
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=order)
    return model


def _batches(train: Loader, first: int, steps: int, seed: int) -> Iterator[tuple[int, Any]]:
    """Numbered batches from `first` on; every pass over the data is seeded by its number."""
    step = passes = 0
    while step < steps:
        torch.manual_seed(seed * 1_000_003 + passes)
        before = step
        for batch in train:
            if step >= steps:
                break
            if step >= first:
                yield step, batch
            step += 1
        if step == before:
            raise InputError("The train data is empty: fine-tuning needs at least one batch.")
        passes += 1


def _schedule(step: int, steps: int) -> float:
    rising = max(1.0, WARM_UP * steps)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1.0, steps - rising)))
