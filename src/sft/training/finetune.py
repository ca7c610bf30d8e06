"""Fine-tuning with the original network as teacher; unlabelled data is enough."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional

from sft.core.copies import copy_module
from sft.core.data import Loader, check_finite, inputs_of, targets_of
from sft.core.errors import InputError
from sft.core.progress import say
from sft.core.randomness import forked_rng
from sft.training.checkpoint import Checkpoint

WARM_UP = 0.05
CLIP = 1.0
REPORT_EVERY = 50


M = TypeVar("M", bound=nn.Module)


def finetune(
    model: M,
    train: Loader,
    teacher: nn.Module | None = None,
    *,
    steps: int = 500,
    learning_rate: float = 2e-3,
    seed: int = 0,
    checkpoint: Path | None = None,
) -> M:
    """Train a copy of `model` to give the teacher's outputs; without a teacher, the targets.

    The loss is KL(teacher || model) where the outputs are logits ``(N, classes)``, the relative
    squared error elsewhere, and cross-entropy with the data's targets where there is no teacher.
    Adam, the learning rate rises over the first 5 % of the steps and falls along a cosine to zero,
    gradients are clipped to norm 1. The network stays in evaluation form: dropout is off and batch
    norm that could not be folded keeps its statistics.

    steps : optimiser steps; the data is passed through as often as needed.
    checkpoint : a file for the state; an interrupted call with the same arguments goes on from it
        and ends in the same weights. It stays until the caller, who has stored the result, deletes
        it. A state of other arguments is refused.
    Returns the trained copy. Raises `InputError` for empty data or missing targets.
    """
    student = copy_module(model)
    parameters = [p for p in student.parameters() if p.is_floating_point()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    request = f"steps={steps} learning_rate={learning_rate} seed={seed}"
    stored = Checkpoint(checkpoint, student, optimizer, request)
    first = stored.resume()
    device = parameters[0].device
    if teacher is not None:
        teacher = copy_module(teacher).to(device)
    with forked_rng():
        for step, batch in _batches(train, first, steps, seed):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * _schedule(step, steps)
            loss = _loss(student, teacher, batch, device)
            if not math.isfinite(float(loss.detach())):
                raise InputError(
                    f"Fine-tuning diverged at step {step}: the loss is not finite. "
                    f"Lower the learning rate (now {learning_rate})."
                )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            stored.save_if_due(step + 1)
            if (step + 1) % REPORT_EVERY == 0 or step + 1 == steps:
                left = stored.seconds_left(step + 1, steps)
                say(
                    f"  step {step + 1}/{steps}, loss {float(loss.detach()):.4f}, {left:.0f} s left"
                )
    if first < steps:
        stored.save(steps)
    return student


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


def _loss(
    student: nn.Module, teacher: nn.Module | None, batch: Any, device: torch.device
) -> torch.Tensor:
    x = inputs_of(batch).to(device)
    check_finite(x, "train")
    outputs: torch.Tensor = student(x)
    if teacher is None:
        targets = targets_of(batch)
        if targets is None:
            raise InputError("Without a teacher, fine-tuning needs loaders of (inputs, targets).")
        wanted = torch.as_tensor(targets, device=device)
        wanted = wanted if wanted.is_floating_point() else wanted.long().reshape(-1)
        return functional.cross_entropy(outputs, wanted)
    with torch.no_grad():
        wanted = teacher(x)
    if wanted.ndim == 2 and wanted.shape[1] > 1:
        return functional.kl_div(
            outputs.log_softmax(1), wanted.log_softmax(1), reduction="batchmean", log_target=True
        )
    scale = (wanted - wanted.mean()).square().mean().clamp_min(1e-12)
    error: torch.Tensor = (outputs - wanted).square().mean() / scale
    return error
