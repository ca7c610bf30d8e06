"""The moving average of a network's weights over the steps of its training.

Source: Polyak, Juditsky 1992; with a decay that rises from 0.1 to the one asked for, so that the
first steps are forgotten soon (as in the "Mean teacher" of Tarvainen, Valpola 2017).
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sft.core.errors import InputError
from sft.training.loop import Idle


class Averaged(Idle):
    """Follows all parameters of `student`; they are replaced by their averages at the end.

    decay : of the average, a step; in (0, 1).
    """

    def __init__(self, student: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise InputError(f"ema={decay}: a decay above 0 and below 1 is wanted.")
        self._decay = decay
        self._followed = {n: p for n, p in student.named_parameters() if p.is_floating_point()}
        self.averages = {n: p.detach().clone() for n, p in self._followed.items()}
        self._count = torch.zeros(())

    def state(self) -> dict[str, Tensor]:
        return {"average:count": self._count} | {
            f"average:of:{name}": value for name, value in self.averages.items()
        }

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        self._count += 1
        count = float(self._count)
        decay = min(self._decay, (1 + count) / (10 + count))
        for name, value in self.averages.items():
            value.lerp_(self._followed[name].detach(), 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the network has the averages for parameters."""
        kept = {name: p.detach().clone() for name, p in self._followed.items()}
        self._put(self.averages)
        try:
            yield
        finally:
            self._put(kept)

    def settle(self) -> None:
        self._put(self.averages)

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self._followed[name].copy_(value)
