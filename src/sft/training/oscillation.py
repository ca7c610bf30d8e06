"""Weights that swing between two integers while they are trained, frozen to the likelier one.

With the gradient passed straight through, a weight whose best value lies between two integers
crosses the border again and again; which integer it ends on is chance.

Source: Nagel et al. 2022, "Overcoming oscillations in quantization-aware training"
(arXiv:2203.11086), algorithm 1, with the threshold on a cosine.
"""

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sft.quantizers.fake import WeightFakeQuantize

COARSE = 4  # up to this many bits; finer steps are crossed by mere noise
MOMENTUM = 0.01
FIRST_THRESHOLD, LAST_THRESHOLD = 0.04, 0.01  # turns per step


@dataclasses.dataclass(frozen=True)
class Trace:
    """What is known of a weight's integers; every tensor has the weight's shape.

    frequency : moving mean of "turned in this step". mean : moving mean of the integers.
    last : the integers now (float). direction : sign of the last change, 0 before any.
    frozen : whether the integer stays for good.
    """

    frequency: Tensor
    mean: Tensor
    last: Tensor
    direction: Tensor
    frozen: Tensor

    @classmethod
    def of(cls, integers: Tensor) -> "Trace":
        """The trace before the first step."""
        start = integers.float()
        zeros = torch.zeros_like(start)
        return cls(zeros, start.clone(), start.clone(), zeros.clone(), zeros.bool())

    def follow(self, integers: Tensor, threshold: float) -> None:
        """Take in the integers after a step; what turns too often is frozen to its mean."""
        now = torch.where(self.frozen, self.last, integers.float())
        change = torch.sign(now - self.last)
        self.frequency.lerp_((change * self.direction < 0).float(), MOMENTUM)
        self.mean.lerp_(now, MOMENTUM)
        self.direction.copy_(torch.where(change == 0, self.direction, change))
        swinging = (self.frequency > threshold) & ~self.frozen
        self.last.copy_(torch.where(swinging, self.mean.round(), now))
        self.frozen.logical_or_(swinging)


class Oscillations:
    """Follows the integers of all weights of few bits and holds those that were frozen."""

    def __init__(self, weights: Mapping[str, tuple[nn.Parameter, WeightFakeQuantize]]) -> None:
        self._weights = {n: pair for n, pair in weights.items() if pair[1].bits <= COARSE}
        self.traces = {n: Trace.of(r.integers(w)) for n, (w, r) in self._weights.items()}

    def state(self) -> dict[str, Tensor]:
        """The tensors themselves, by name; to be stored, and copied back into to resume."""
        return {
            f"oscillation:{name}:{field.name}": getattr(trace, field.name)
            for name, trace in self.traces.items()
            for field in dataclasses.fields(trace)
        }

    @torch.no_grad()
    def follow(self, progress: float) -> None:
        """Call after each step of the optimiser; `progress` is the share of training done."""
        share = 0.5 * (1 + math.cos(math.pi * progress))
        threshold = LAST_THRESHOLD + (FIRST_THRESHOLD - LAST_THRESHOLD) * share
        for name, (weight, rounding) in self._weights.items():
            trace = self.traces[name]
            trace.follow(rounding.integers(weight), threshold)
            shape = [1] * weight.ndim
            shape[rounding.ch_axis] = -1
            held = trace.last * rounding.scale.detach().reshape(shape)
            weight.copy_(torch.where(trace.frozen, held.to(weight), weight))

    def frozen_share(self) -> float:
        """The share of the followed weights that are frozen."""
        frozen = sum(int(t.frozen.sum()) for t in self.traces.values())
        return frozen / max(sum(t.frozen.numel() for t in self.traces.values()), 1)
