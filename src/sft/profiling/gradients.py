"""Gradients at the outputs of layers, without labels: targets drawn from the model's own answers.

Drawing targets from the model's softmax makes the second moment of the gradient the Fisher
information; the divergence from the original's answers cannot be used, as its gradient at the
original is zero. Where the outputs are no logits, a random direction of them is taken instead.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sft.core.errors import InputError

HALF_SCALE = 1024.0  # keeps gradients inside the range of float16


def scale_of(dtype: torch.dtype) -> float:
    """By what gradients are multiplied on their way through a network of this dtype."""
    return HALF_SCALE if dtype == torch.float16 else 1.0


@contextlib.contextmanager
def frozen_parameters(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter of the model requires a gradient; afterwards they do as before."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def tracked(y: Tensor) -> Tensor:
    """A layer's output that gradients are followed from: itself, or a copy if it has none yet."""
    if y.requires_grad:
        return y
    with torch.enable_grad():
        return y.detach().requires_grad_(True).clone()  # a leaf could not be changed in place


def backward(outputs: Any, generator: torch.Generator) -> None:
    """Follow the gradient of the sampled loss, summed over the samples, back to the hooks.

    Logits ``(N, classes)`` are answered by classes drawn from their softmax under cross entropy;
    any other tensors by the inner product with normal random numbers. Raises `InputError` if the
    outputs do not depend on the layers in a differentiable way, or logits are not finite.
    """
    found = [t for t in _tensors(outputs) if t.requires_grad]
    if not found:
        raise InputError(
            "No output of the model depends on its layers in a way that can be differentiated, so "
            "gradients cannot be gathered. Gather the statistics without gradients."
        )
    torch.autograd.backward(found, [_direction(t.detach(), generator) for t in found])


def _direction(output: Tensor, generator: torch.Generator) -> Tensor:
    """The gradient of the sampled loss at the output itself."""
    if output.ndim == 2 and output.shape[1] > 1:
        chances = output.double().softmax(1).cpu()
        if not bool(torch.isfinite(chances).all()):
            raise InputError(
                "The model gives NaN or infinite outputs for the calibration data, so no targets "
                "can be drawn from them. Give a model whose outputs are finite."
            )
        classes = torch.multinomial(chances, 1, generator=generator)
        direction = chances.scatter_add(1, classes, torch.full_like(chances[:, :1], -1))
    else:
        direction = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    return (direction * scale_of(output.dtype)).to(output)


def _tensors(outputs: Any) -> Iterator[Tensor]:
    """The floating-point tensors in what a model returned."""
    if isinstance(outputs, Tensor):
        if outputs.is_floating_point():
            yield outputs
    elif isinstance(outputs, Mapping):
        for value in outputs.values():
            yield from _tensors(value)
    elif isinstance(outputs, tuple | list):
        for value in outputs:
            yield from _tensors(value)
