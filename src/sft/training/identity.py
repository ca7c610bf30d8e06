"""What a stored state has to agree with besides settings: the networks and the data of a call."""

import hashlib
from collections.abc import Iterator
from itertools import islice
from typing import Any, Protocol

import numpy
import torch
from torch import nn

from sft.core.data import Batches, Loader, inputs_of, length_of
from sft.core.randomness import forked_rng
from sft.core.shards import whole_of
from sft.surgery.quantize import QuantizedModel
from sft.training.checkpoint import state_of

BATCHES = 2  # of a loader that are looked at; reading more would take longer than it is worth
DIGITS = 12


class _Digest(Protocol):
    def update(self, content: bytes, /) -> None: ...


def identity_of(model: nn.Module, exact: bool = True) -> str:
    """A short hash of a network: its modules by name and type, its parameters and its buffers.

    Of a `QuantizedModel` the options of its plan and its target count too.
    exact : False leaves the values of parameters and buffers out; their shapes and dtypes count.
    """
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        digest.update(f"{name} {type(module).__qualname__}\n".encode())
    if isinstance(model, QuantizedModel):
        digest.update(model.target.name.encode())
        digest.update(repr([(row.name, str(row.option)) for row in model.plan.rows]).encode())
    for name, tensor in state_of(model).items():
        digest.update(name.encode())
        _add(digest, tensor, exact)
    return digest.hexdigest()[:DIGITS]


def identity_of_start(model: nn.Module) -> str:
    """The identity of a network that a training starts from: exact on processors alone.

    On GPUs what made the network (block-wise rounding, for one) is not the same to the bit in each
    call, so that a call which goes on would be refused; there its form counts.
    """
    exact = all(tensor.device.type == "cpu" for tensor in state_of(model).values())
    return identity_of(model, exact)


def identity_of_data(loader: Loader, seed: int, targets: bool) -> str:
    """A short hash of the first batches of a loader and of its length, and of all that `Batches`
    hold; the same in every call.

    It is read with torch's generator at `seed`, which is left as it was. Data that differs when it
    is read again (shuffled or augmented by random numbers that are not torch's) counts by its
    length alone, and so does an iterator, which cannot be read twice.

    targets : whether they count; otherwise the inputs do.
    """
    whole = whole_of(loader)
    length = f"length {length_of(whole)}"
    if isinstance(whole, Iterator):
        return length
    if isinstance(whole, Batches):
        held = hashlib.sha256()
        _add(held, (whole.inputs, whole.targets) if targets else whole.inputs)
        length = f"{length}, all {held.hexdigest()[:DIGITS]}"
    first, again = (_read(whole, seed, targets) for _ in range(2))
    return f"{first}, {length}" if first == again else length


def _read(loader: Loader, seed: int, targets: bool) -> str:
    digest = hashlib.sha256()
    with forked_rng(seed):
        for batch in islice(loader, BATCHES):
            inputs = inputs_of(batch)
            _add(digest, batch if targets else inputs)
    return digest.hexdigest()[:DIGITS]


def _add(digest: _Digest, value: Any, exact: bool = True) -> None:
    """Count a tensor, an array, a plain value, or a collection of these; of others the type."""
    if isinstance(value, numpy.ndarray) and value.dtype.kind in "biuf":
        value = torch.as_tensor(value)
    if isinstance(value, torch.Tensor):
        digest.update(f"{tuple(value.shape)} {value.dtype}".encode())
        if exact:
            flat = value.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict | tuple | list):
        digest.update(f"{type(value).__name__} {len(value)}".encode())
        for item in value.items() if isinstance(value, dict) else value:
            _add(digest, item, exact)
    elif value is None or isinstance(value, bool | int | float | str | bytes):
        digest.update(repr(value).encode())
    else:
        digest.update(type(value).__qualname__.encode())
