"""Data in two parts without labels: every fifth batch judges a network, the others change it."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sft.core.data import Loader, check_finite, inputs_of
from sft.core.distributed import all_reduce_sum_
from sft.core.errors import InputError
from sft.core.randomness import forked_rng
from sft.profiling.damage import divergence

HELD_OUT = 5  # every so many batches one judges; all do where there are fewer


def batches(
    loader: Loader, device: torch.device, held_out: bool | None, seed: int = 0
) -> Iterator[Tensor]:
    """The inputs of the batches that judge, of those that do not, or (None) of all.

    A loader that shuffles gives the same order at every call with the same seed, so a batch keeps
    its part; the global generators are left as they were. Raises `InputError` for NaN.
    """
    with forked_rng(seed):
        for index, batch in enumerate(loader):
            if held_out is not None and (index % HELD_OUT == HELD_OUT - 1) != held_out:
                continue
            x = inputs_of(batch)
            check_finite(x, "calibration")
            yield x.to(device)


def first_batch(loader: Loader, seed: int = 0) -> Tensor:
    """The inputs of the first batch; raises `InputError` if there is none, or only once."""
    if isinstance(loader, Iterator):
        raise InputError(
            "The calibration data is a generator, which can be read only once. Give a list of "
            "batches, sft.Batches or a DataLoader."
        )
    with forked_rng(seed):
        for batch in loader:
            if len(inputs_of(batch)):
                return inputs_of(batch)
            break
    raise InputError("The calibration data is empty: at least one batch is needed.")


@torch.no_grad()
def distance(
    model: nn.Module, original: nn.Module, loader: Loader, seed: int = 0, whole: bool = False
) -> float:
    """Mean divergence of a model from the original on the batches that judge, of all processes.

    whole : all batches judge. Both are in eval mode and on one device; the divergence is that of
    `profiling.damage`.
    """
    total, samples = 0.0, 0
    with forked_rng(seed):
        count = sum(1 for _ in loader)
    device = device_of(original)
    held_out = True if count >= HELD_OUT and not whole else None
    for x in batches(loader, device, held_out, seed):
        total += len(x) * divergence(original(x), model(x))
        samples += len(x)
    figures = torch.tensor([total, samples], dtype=torch.float64)
    all_reduce_sum_([figures])
    return float(figures[0]) / max(float(figures[1]), 1)


def device_of(model: nn.Module) -> torch.device:
    """Where the parameters of a model are; the processor if it has none."""
    first = next(model.parameters(), None)
    return first.device if first is not None else torch.device("cpu")
