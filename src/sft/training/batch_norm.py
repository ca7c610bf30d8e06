"""Batch-norm statistics estimated anew, for a network whose activations have moved.

A norm holds the mean and the variance of what it read in training. Behind layers that were split or
quantised it reads something else; new statistics mend the shift and the scale of each channel, with
no gradients and no labels.
"""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sft.core.copies import copy_module
from sft.core.data import Loader
from sft.core.distributed import refuse_batch_statistics
from sft.core.errors import InputError
from sft.core.progress import say
from sft.profiling.held_out import batches, device_of, distance, first_batch

Kept = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@torch.no_grad()
def reestimate_batch_norm(
    model: nn.Module, loader: Loader, teacher: nn.Module | None = None
) -> nn.Module:
    """A copy of a network whose batch-norm statistics are those of the data.

    Each is the mean over all batches of the batch's own mean and (unbiased) variance, whatever the
    norm's momentum, which stays as it is; all other modules are in eval mode meanwhile. Where there
    is no norm with statistics, `model` itself is returned.

    teacher : with it every fifth batch is held out, and `model` itself is returned unless the
        copy's outputs are closer to the teacher's there (on all batches, if there are fewer than
        5), by the divergence of `profile`.
    Raises `InputError` for data that is empty or not finite, and for a batch in which a norm reads
    one value a channel. Neither network is changed; training flags are those of `model`.
    """
    renewed = copy_module(model)
    norms = [m for m in renewed.modules() if isinstance(m, _BatchNorm) and _estimates(m)]
    if not norms:
        return model
    first_batch(loader)
    original = None if teacher is None else copy_module(teacher).to(device_of(renewed))
    before = 0.0 if original is None else distance(renewed, original, loader)
    _estimate(renewed, norms, loader, None if original is None else False)
    if original is not None:
        after = distance(renewed, original, loader)
        say(f"  {len(norms)} batch norms: divergence {before:.4g} before, {after:.4g} after")
        if not after < before:
            return model
    for module, own in zip(renewed.modules(), model.modules(), strict=True):
        module.training = own.training
    return renewed


def _estimates(norm: _BatchNorm) -> bool:
    """Whether a norm has statistics to estimate."""
    return norm.track_running_stats and norm.running_mean is not None


def _estimate(
    model: nn.Module, norms: list[_BatchNorm], loader: Loader, held_out: bool | None
) -> None:
    """Fill the norms' statistics; those that are never called keep theirs."""
    held = [_statistics(norm) for norm in norms]
    kept = [tuple(tensor.clone() for tensor in own) for own in held]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the cumulative average
        norm.train()
    refuse_batch_statistics(model)
    for x in batches(loader, device_of(model), held_out):
        try:
            model(x)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise InputError(
                f"A batch of shape {tuple(x.shape)} gives a batch norm one value a channel, which "
                "has no variance. Make the batches larger, or leave out a last one of one sample."
            ) from error
    for norm, momentum, own, old in zip(norms, momenta, held, kept, strict=True):
        norm.momentum = momentum
        norm.eval()
        if not int(own[2]):
            for tensor, value in zip(own, old, strict=True):
                tensor.copy_(value)


def _statistics(norm: _BatchNorm) -> Kept:
    """Mean, variance and count of batches, the norm's own tensors."""
    mean, variance, count = norm.running_mean, norm.running_var, norm.num_batches_tracked
    assert mean is not None
    assert variance is not None
    assert count is not None
    return mean, variance, count
