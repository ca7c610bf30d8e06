"""Several processes that work on one network, each with its share of the data (torch.distributed).

The caller starts the processes and their group. With one process all of this does nothing.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, distributed


def is_distributed() -> bool:
    """Whether a process group of more than one process is running."""
    ready = distributed.is_available() and distributed.is_initialized()
    return ready and distributed.get_world_size() > 1


def rank() -> int:
    """The number of this process, from 0."""
    return distributed.get_rank() if is_distributed() else 0


def world() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if is_distributed() else 1


def all_reduce_mean_(tensors: Iterable[Tensor]) -> None:
    """Replace each floating tensor by its mean over all processes, in place.

    Every process gives tensors of the same shapes and dtypes, in the same order.
    """
    if not is_distributed():
        return
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for alike in kinds.values():
        whole = _sendable(torch.cat([t.detach().flatten() for t in alike]))
        distributed.all_reduce(whole)
        whole /= world()
        parts = torch.split(whole, [t.numel() for t in alike])
        for tensor, part in zip(alike, parts, strict=True):
            tensor.detach().copy_(part.reshape(tensor.shape))


def broadcast_(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by that of process 0, in place; shapes and dtypes are those of all."""
    if not is_distributed():
        return
    for tensor in tensors:
        whole = _sendable(tensor.detach().contiguous().clone())
        distributed.broadcast(whole, 0)
        tensor.detach().copy_(whole)


def gather_tensors(x: Tensor) -> list[Tensor]:
    """The tensors of all processes, by rank; copies, on the device of `x`.

    They have one dtype and one number of axes; their lengths may differ.
    """
    if not is_distributed():
        return [x.detach().clone()]
    shapes = _gather(torch.tensor(x.shape, dtype=torch.int64, device=x.device))
    counts = [int(shape.prod()) for shape in shapes]
    padded = x.new_zeros(max(counts))
    padded[: x.numel()] = x.detach().flatten()
    return [
        whole[:count].reshape(shape.tolist())
        for whole, count, shape in zip(_gather(padded), counts, shapes, strict=True)
    ]


def _gather(x: Tensor) -> list[Tensor]:
    sent = _sendable(x)
    found = [torch.empty_like(sent) for _ in range(world())]
    distributed.all_gather(found, sent)
    return [each.to(x.device) for each in found]


def _sendable(x: Tensor) -> Tensor:
    """On a device that the group's backend can send from: NCCL knows GPUs only."""
    return x.cuda() if distributed.get_backend() == "nccl" else x
