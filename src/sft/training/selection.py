"""Early stopping: held-out data says which weights of a training are kept, and when it ends."""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sft.core.distributed import broadcast_
from sft.core.errors import InputError
from sft.core.events import Events, nothing
from sft.core.progress import say
from sft.training.averages import Averaged
from sft.training.loop import Idle

JUDGEMENTS = 20  # in a training, evenly spaced


class BestKept(Idle):
    """Judges `student` at intervals; at the end it has the weights that were judged best.

    judge : gives a figure of the network as it stands, lower is better; it reads held-out data.
    patience : the training ends when so many judgements in a row brought nothing better.
    averaged : judge, and keep, these averages instead of the weights of the step.
    Judgements are made at each 20th part of the training.
    """

    def __init__(
        self,
        student: nn.Module,
        judge: Callable[[], float],
        patience: int,
        averaged: Averaged | None = None,
        on_event: Events | None = None,
    ) -> None:
        if patience < 1:
            raise InputError(f"patience={patience}: at least 1 judgement is wanted.")
        self._judge, self._patience, self._averaged = judge, patience, averaged
        self._tell = on_event or nothing
        self._followed = {n: p for n, p in student.named_parameters() if p.is_floating_point()}
        self._best = {name: p.detach().clone() for name, p in self._followed.items()}
        self._figure = torch.full((), float("inf"), dtype=torch.float64)
        self._judged, self._waited = torch.zeros(()), torch.zeros(())

    def state(self) -> dict[str, Tensor]:
        own = {
            "best:figure": self._figure,
            "best:judged": self._judged,
            "best:waited": self._waited,
        }
        return own | {f"best:of:{name}": value for name, value in self._best.items()}

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        if int(progress * JUDGEMENTS + 1e-9) <= int(self._judged):
            return
        self._judged.fill_(int(progress * JUDGEMENTS + 1e-9))
        averages = self._averaged.in_place() if self._averaged else contextlib.nullcontext()
        with averages:
            found = torch.tensor(self._judge(), dtype=torch.float64)
            broadcast_([found])
            better = bool(found < self._figure)
            if better:
                self._figure.copy_(found)
                for name, value in self._best.items():
                    value.copy_(self._followed[name])
        self._waited.copy_(torch.zeros(()) if better else self._waited + 1)
        say(f"  held-out data: {float(found):.6g}{' (best)' if better else ''}")
        self._tell({"event": "validation", "progress": progress, "figure": float(found),
                    "best": float(self._figure)})  # fmt: skip

    def finished(self) -> bool:
        return float(self._waited) >= self._patience

    @torch.no_grad()
    def settle(self) -> None:
        if not torch.isfinite(self._figure):
            return
        for name, value in self._best.items():
            self._followed[name].copy_(value)
            if self._averaged:
                self._averaged.averages[name].copy_(value)
