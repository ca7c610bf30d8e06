"""The samples that damage is measured on, and what the original gives for them."""

import torch
from torch import Tensor, nn

from sft.core.data import Loader, inputs_of
from sft.core.errors import InputError
from sft.core.records import Inspection

ANCHOR_SAMPLES, LEAST_SAMPLES = 128, 16
ANCHOR_MACS = 3 * 10**13  # that anchors may cost in all: some ten minutes on two cores
PASSES = 7  # about, for each layer
BATCH = 64


def samples_for(inside: Inspection) -> int:
    """How many samples damage is measured on: 128, or fewer where that costs too much."""
    work = inside.macs * len(inside.layers) * PASSES
    return max(LEAST_SAMPLES, min(ANCHOR_SAMPLES, ANCHOR_MACS // max(work, 1)))


@torch.no_grad()
def collect_inputs(loader: Loader, count: int) -> Tensor:
    """The first `count` samples of a loader (fewer if it has fewer), ``(N, ...)``.

    Raises `InputError` for samples that differ in shape.
    """
    kept: list[Tensor] = []
    have = 0
    shape: torch.Size | None = None
    for number, batch in enumerate(loader, 1):
        x = inputs_of(batch)[: count - have]
        shape = shape_of_all(x, shape, number)
        kept.append(x)
        have += len(x)
        if have >= count:
            break
    return torch.cat(kept)


def shape_of_all(x: Tensor, shape: torch.Size | None, number: int) -> torch.Size | None:
    """The shape of a sample in the batches so far, of which `x` is the last.

    shape : what was given for the batch before; None for the first. number : of the batch, from 1.
    Raises `InputError` if the two differ. An empty batch fits everywhere.
    """
    if len(x) == 0:
        return shape
    if shape is not None and x.shape[1:] != shape:
        raise InputError(
            f"A sample in batch {number} of the calibration data has shape {tuple(x.shape[1:])}, "
            f"one in the batches before {tuple(shape)}. All samples must have one shape."
        )
    return x.shape[1:]


def quick_batches(inputs: Tensor) -> list[Tensor]:
    """Samples in batches, images with their channels last, which most kernels run faster."""
    order = torch.channels_last if inputs.ndim == 4 else torch.preserve_format
    return [x.contiguous(memory_format=order) for x in torch.split(inputs, BATCH)]


@torch.no_grad()
def reference_outputs(model: nn.Module, batches: list[Tensor], name: str) -> Tensor:
    """Outputs of the original on all batches, ``(N, ...)`` on the CPU.

    Raises `InputError`, with the name of the model, if they are not finite: nothing could be
    compared with them.
    """
    outputs = torch.cat([model(x).cpu() for x in batches])
    broken = int((~torch.isfinite(outputs)).reshape(len(outputs), -1).any(1).sum())
    if broken:
        raise InputError(
            f"The model '{name}' gives NaN or infinite outputs for {broken} of {len(outputs)} "
            "calibration samples, so no damage can be measured against them. Give a model whose "
            "outputs are finite, or leave such samples out."
        )
    return outputs
