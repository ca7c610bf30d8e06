"""The state of a training run in one safetensors file, whole at every moment."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from sft.core.distributed import from_first, rank
from sft.core.errors import InputError
from sft.core.files import read_bytes, write_bytes
from sft.core.progress import say

SAVE_SECONDS = 20.0


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by name, those included that a state dict leaves out."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def save_state(model: nn.Module, path: Path) -> None:
    """Store every parameter and buffer."""
    whole = {k: v.detach().cpu().contiguous().clone() for k, v in state_of(model).items()}
    write_bytes(path, save(whole))


def load_state(model: nn.Module, path: Path) -> None:
    """Put back what `save_state` stored; raises `InputError` if it does not fit.

    Of several processes the first one reads for all.
    """
    content = from_first(lambda: read_bytes(path))
    try:
        restore(model, load(content), path)
    except (OSError, SafetensorError, KeyError) as error:
        raise InputError(f"'{path}' does not fit the network ({error}). Delete it.") from None


def restore(model: nn.Module, tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Copy tensors into the parameters and buffers of those names; buffers may change shape.

    path : where the tensors are from. Raises `InputError` for a parameter of another shape, before
    anything is changed.
    """
    for key, parameter in model.named_parameters():
        own, other = tuple(parameter.shape), tuple(tensors[key].shape)
        if own != other:
            raise InputError(
                f"'{path}' is of another network: its parameter '{key}' has shape {other}, here it "
                f"has {own}. Delete the file to start anew, or give the network that it is of."
            )
    with torch.no_grad():
        for key, value in state_of(model).items():
            stored = tensors[key].to(value)
            if value.shape == stored.shape:
                value.copy_(stored)
            else:
                value.data = stored


def _note_in(content: bytes) -> dict[str, Any]:
    """The note in the header of a safetensors file, whose length stands in its first 8 bytes."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    note: dict[str, Any] = json.loads(header["__metadata__"]["sft"])
    return note


class Checkpoint:
    """Stores weights, buffers and Adam's moments at intervals; reads them back once.

    more : further tensors by name, stored with the rest and copied back into.
    With `path=None` nothing is stored. Of several processes the first one writes
    and reads for all.
    """

    def __init__(
        self,
        path: Path | None,
        model: nn.Module,
        optimizer: torch.optim.Adam,
        request: str = "",
        more: Mapping[str, torch.Tensor] | None = None,
        interval: float | None = None,
    ) -> None:
        self.request, self.more = request, dict(more or {})
        self.path, self.model, self.optimizer = path, model, optimizer
        self.interval = SAVE_SECONDS if interval is None else interval
        self.started = self.saved = time.monotonic()
        self.first, self.before = 0, 0.0

    def resume(self) -> int:
        """Load the stored state, if there is one; returns the step to go on from."""
        path = self.path
        if path is None:
            return 0
        content = from_first(lambda: read_bytes(path) if path.is_file() else b"")
        if not content:
            return 0
        try:
            tensors, note = load(content), _note_in(content)
            self._check(note["request"])
            self._restore(tensors, path)
            self.first, self.before = int(note["step"]), float(note["seconds"])
            self.started = time.monotonic()
        except (OSError, SafetensorError, KeyError, RuntimeError, ValueError) as error:
            raise InputError(
                f"The training state '{self.path}' does not fit ({error}). Delete it to start anew."
            ) from None
        say(f"  resumed at step {self.first}")
        return self.first

    def start(self) -> None:
        """The clock of the training starts now; what was done since `resume` is not counted."""
        self.started = time.monotonic()

    def save_if_due(self, step: int) -> None:
        if self.path is not None and time.monotonic() - self.saved >= self.interval:
            self.save(step)

    def save(self, step: int) -> None:
        """Store the state as of `step` finished steps."""
        if self.path is None or rank() != 0:
            return
        tensors = {f"model:{k}": v for k, v in state_of(self.model).items()}
        tensors |= {f"more:{k}": v for k, v in self.more.items()}
        for index, parameter in enumerate(self._parameters()):
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"adam:{index}:{key}"] = value
        whole = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        note = json.dumps({"step": step, "request": self.request, "seconds": self.seconds()})
        write_bytes(self.path, save(whole, metadata={"sft": note}))
        self.saved = time.monotonic()

    def seconds(self) -> float:
        """Seconds of training so far, those before interruptions included."""
        return self.before + time.monotonic() - self.started

    def seconds_left(self, progress: float) -> float:
        """Seconds to go, as far as `progress`, the share that is done, tells."""
        return self.seconds() / max(progress, 1e-9) * (1 - progress)

    def _check(self, request: str) -> None:
        if request != self.request:
            raise InputError(
                f"The training state '{self.path}' is of another run ({request}; now "
                f"{self.request}). Delete it to start anew."
            )

    def _parameters(self) -> list[torch.Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _restore(self, tensors: dict[str, torch.Tensor], path: Path) -> None:
        own = {k[6:]: v for k, v in tensors.items() if k.startswith("model:")}
        restore(self.model, own, path)
        for key, value in self.more.items():
            value.copy_(tensors[f"more:{key}"])
        for index, parameter in enumerate(self._parameters()):
            if f"adam:{index}:step" not in tensors:
                continue  # a parameter that the forward does not use has no state
            self.optimizer.state[parameter] = {
                key: tensors[f"adam:{index}:{key}"].to("cpu" if key == "step" else parameter.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
