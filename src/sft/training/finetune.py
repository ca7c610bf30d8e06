"""Fine-tuning with the original network as teacher; unlabelled data is enough."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from sft.core.copies import copy_module
from sft.core.data import Loader, inputs_of, length_of
from sft.core.distributed import from_first
from sft.core.errors import InputError
from sft.core.events import Events
from sft.core.randomness import forked_rng
from sft.layers import FactorizedSFT
from sft.surgery.modules import fold_batch_norm
from sft.surgery.quantize import QuantizedModel
from sft.training.averages import Averaged
from sft.training.identity import identity_of, identity_of_data, identity_of_start
from sft.training.loop import Part, Settings, arranged, run_steps
from sft.training.objective import Loss, Objective
from sft.training.rounded import RoundedTraining
from sft.training.selection import BestKept

M = TypeVar("M", bound=nn.Module)


def finetune(
    model: M,
    train: Loader,
    teacher: nn.Module | None = None,
    *,
    steps: int = 800,
    epochs: float | None = None,
    minutes: float | None = None,
    learning_rate: float = 2e-3,
    seed: int = 0,
    checkpoint: Path | None = None,
    learn_steps: bool = True,
    freeze_oscillations: bool = True,
    loss: Loss | None = None,
    loss_weight: float = 1.0,
    temperature: float = 4.0,
    feature_weight: float = 1.0,
    match: Sequence[str] = (),
    ema: float = 0.0,
    validation: Loader | None = None,
    patience: int = 5,
    mixed: bool | None = None,
    on_event: Events | None = None,
    save_every: float | None = None,
    more: Sequence[Part] = (),
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

    steps : optimiser steps; the data is passed through as often as needed. epochs : passes over a
        loader that has a length, instead of steps; of more than 0 there is one step at least.
        minutes : end by the clock instead.
    checkpoint : a file for the state; an interrupted call with the same arguments goes on from it
        and ends in the same weights. It stays until the caller, who has stored the result, deletes
        it. A state of other settings is refused, and one of another network, teacher or data; of
        data the first batches are compared, and of a network on a GPU, which may not come out the
        same to the bit, the form. save_every : seconds between two states (20).
    loss : ``loss(outputs, targets) -> scalar`` of the task; in place of cross-entropy without a
        teacher, and added with `loss_weight` to the distance from a teacher.
    temperature, feature_weight, match : of the distance from the teacher; see `Objective`.
    ema : decay of a moving average of the weights, which is what is returned; 0: none.
    validation : held-out data; the weights returned are those of 20 judgements that were best on
        it, and training ends early after `patience` of them without a better one. Judged by the
        loss on it, at full weight of the outputs and none of the layers.
    mixed : the forward pass in bfloat16; by default on GPUs that have it.
    on_event : gets a dict at every 50th step and every judgement; `sft.JsonLines` writes a file.
    more : further parts of the training; see `training.loop`.
    Returns the trained copy. Raises `InputError` for empty data or missing targets.
    """
    length = _steps(train, steps, epochs)
    settings = Settings(length, minutes, learning_rate, seed, mixed, on_event, save_every)
    student = arranged(copy_module(model), torch.channels_last)
    device = next(student.parameters()).device
    objective = Objective(
        student, _prepare_teacher(teacher, student, train, device), device,
        loss=loss, loss_weight=loss_weight, temperature=temperature, feature_weight=feature_weight,
        match=match,
    )  # fmt: skip
    parts: list[Part] = [RoundedTraining(student, learn_steps, freeze_oscillations), *more]
    averaged = Averaged(student, ema) if ema else None
    if averaged is not None:
        parts.append(averaged)
    if validation is not None:
        held_out = validation
        parts.append(
            BestKept(student, lambda: objective.judge(held_out), patience, averaged, on_event)
        )
    request = objective.describe()
    if isinstance(model, QuantizedModel):
        request += f" learn_steps={learn_steps} freeze_oscillations={freeze_oscillations}"
    if ema or validation is not None:
        request += f" ema={ema} patience={patience if validation is not None else None}"
    if checkpoint is not None:
        labelled = teacher is None or loss is not None
        request += _identities(model, teacher, train, validation, seed, labelled)
    with objective.watching():
        run_steps(student, objective, train, parts, settings, checkpoint, request.strip())
    return arranged(student, torch.contiguous_format)


def _steps(train: Loader, steps: int, epochs: float | None) -> int:
    if epochs is None:
        return steps
    if not 0 <= epochs < math.inf:
        raise InputError(f"{epochs} epochs of training: 0 or more are possible.")
    if not length_of(train):
        raise InputError("epochs are passes over a loader with a length; give steps instead.")
    return max(1, round(epochs * length_of(train))) if epochs else 0


def _identities(
    model: nn.Module,
    teacher: nn.Module | None,
    train: Loader,
    validation: Loader | None,
    seed: int,
    labelled: bool,
) -> str:
    """What a stored state was trained from and on, in words; that of process 0 counts for all."""

    def work() -> bytes:
        found = {"student": identity_of_start(model)}
        if teacher is not None:
            found["teacher"] = identity_of(teacher)
        found["train"] = identity_of_data(train, seed, labelled)
        if validation is not None:
            found["validation"] = identity_of_data(validation, seed, labelled)
        return "".join(f" {part}={identity}" for part, identity in found.items()).encode()

    return from_first(work).decode()


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
    return arranged(copied, torch.channels_last)
