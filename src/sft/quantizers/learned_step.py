"""Rounding with a step size that training moves (LSQ).

Source: Esser et al. 2020, "Learned step size quantization" (arXiv:1902.08153), with its gradient
scale ``1 / sqrt(N * qmax)``, N the values that share a step.
"""

import math
from typing import Any

import torch
from torch import Tensor


def round_with_step(
    x: Tensor, step: Tensor, low: int, high: int, axis: int | None = None
) -> Tensor:
    """``step * clamp(round(x / step), low, high)``, with gradients for `x` and for `step`.

    step : of one element, or ``(x.shape[axis],)`` with `axis`. low, high : the integers, about a
    zero point of 0. The gradient passes to `x` inside the range and stops outside of it; that of
    the step is ``round(x / step) - x / step`` inside and the integer limit outside.
    """
    result: Tensor = _RoundWithStep.apply(x, step, low, high, axis)  # type: ignore[no-untyped-call]
    return result


class _RoundWithStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, low: int, high: int, axis: int | None) -> Tensor:
        shape = [1] * x.ndim
        if axis is not None:
            shape[axis] = -1
        wide = step.reshape(shape)
        steps = x * (1.0 / wide)  # as torch's own fake quantisation and torchao's conversion do
        ctx.save_for_backward(steps)
        ctx.low, ctx.high, ctx.axis, ctx.shape = low, high, axis, step.shape
        return steps.round().clamp_(low, high).mul_(wide)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (steps,), (given,) = ctx.saved_tensors, gradients
        rounded = steps.round().clamp_(ctx.low, ctx.high)
        inside = steps.round() == rounded
        for_x = given * inside if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return for_x, None, None, None, None
        slope = rounded.sub_(steps * inside).mul_(given)
        axes = [a for a in range(slope.ndim) if ctx.axis is None or a != ctx.axis % slope.ndim]
        total = slope.sum(axes) if axes else slope
        count = slope.numel() / max(total.numel(), 1)
        scale = 1 / math.sqrt(max(count * max(abs(ctx.low), ctx.high), 1))
        return for_x, total.reshape(ctx.shape) * scale, None, None, None
