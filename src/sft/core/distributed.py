"""Several processes that work on one network, each with its share of the data (torch.distributed).

`torchrun` starts the processes and says in the environment who they are; `joined` makes their
group. In Python the caller may make it. With one process all of this does nothing. Every function
here that sends is called by all processes, in the same order. Where another process is gone it
raises `LostProcessError`.
"""

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta

import torch
from torch import Tensor, distributed, nn

from sft.core import errors
from sft.core.errors import InputError, LostProcessError, SFTError

HUNG = timedelta(hours=2)  # one process may have to wait so long for another's work
GPUS = "cpu:gloo,cuda:nccl"

_alone = 0


@contextlib.contextmanager
def joined(device: str) -> Iterator[str]:
    """Inside, the group that torchrun's environment describes is running; gives the own device.

    device : "cpu", or "cuda" for one GPU a process of this machine, by its local number.
    Without such an environment, or where a group is running already, nothing is done. Raises
    `InputError` if there are fewer GPUs than processes, `LostProcessError` if not all come.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ
    if not several or distributed.is_initialized():
        yield device
        return
    own, backend = device, "gloo"
    if device == "cuda":
        own, backend = _own_gpu(int(os.environ.get("LOCAL_RANK", "0"))), GPUS
    with _sending():
        distributed.init_process_group(backend, timeout=HUNG)
    try:
        yield own
    finally:
        distributed.destroy_process_group()


def _own_gpu(number: int) -> str:
    found = torch.cuda.device_count()
    if number >= found:
        raise InputError(
            f"Process {number} of this machine has no GPU: there are {found}. Start as many "
            "processes as there are GPUs (torchrun --nproc-per-node), or give --device cpu."
        )
    torch.cuda.set_device(number)
    return f"cuda:{number}"


def is_distributed() -> bool:
    """Whether a process group of more than one process is running, and this is shared work."""
    ready = distributed.is_available() and distributed.is_initialized()
    return ready and not _alone and distributed.get_world_size() > 1


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
    _all_reduce_(tensors, world())


def all_reduce_sum_(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over all processes, in place; see `all_reduce_mean_`."""
    _all_reduce_(tensors, 1)


def variances(tensors: Sequence[Tensor], correction: int = 1) -> list[Tensor]:
    """The variance of all numbers of each tensor, those of all processes taken together.

    correction : 1 for the unbiased one, over ``n - 1``. Nothing is differentiated. Lengths may
    differ between processes. The means are pooled as in Chan et al. (1983).
    """
    if not is_distributed():
        return [x.detach().var(correction=correction) for x in tensors]
    own = [
        torch.stack([x.new_tensor(x.numel()).double(), *_moments(x.detach().double())])
        for x in tensors
    ]
    count, mean, square = torch.stack(_gather(torch.stack(own))).unbind(-1)  # (processes, tensors)
    total = count.sum(0)
    pooled = (count * mean).sum(0) / total
    squares = (square + count * (mean - pooled).square()).sum(0)
    found = squares / (total - correction)
    return [v.to(x) for v, x in zip(found, tensors, strict=True)]


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean, and the sum of squares about it."""
    mean = x.mean()
    return mean, (x - mean).square().sum()


def broadcast_(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by that of process 0, in place; shapes and dtypes are those of all."""
    if not is_distributed():
        return
    for tensor in tensors:
        whole = _sendable(tensor.detach().contiguous().clone())
        with _sending():
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


def gather_bytes(content: bytes) -> list[bytes]:
    """What each process gives, by rank."""
    return [_bytes_of(x) for x in gather_tensors(_tensor_of(content))]


def from_first(work: Callable[[], bytes]) -> bytes:
    """What `work` gives in process 0, which alone does it; in all processes.

    Inside `work` process 0 counts as the only one. An `SFTError` that it raises is raised in all.
    """
    if not is_distributed():
        return work()
    failed: SFTError | None = None
    answer = b""
    if rank() == 0:
        try:
            with on_its_own():
                answer = b"+" + work()
        except SFTError as error:
            failed, answer = error, b"-" + json.dumps([type(error).__name__, str(error)]).encode()
    length = torch.tensor([len(answer)])
    broadcast_([length])
    whole = _tensor_of(answer) if answer else torch.empty(int(length), dtype=torch.uint8)
    broadcast_([whole])
    if failed is not None:
        raise failed
    answer = _bytes_of(whole)
    if answer[:1] == b"-":
        name, text = json.loads(answer[1:])
        raise getattr(errors, name, SFTError)(text)
    return answer[1:]


def first_finds(question: Callable[[], bool]) -> bool:
    """What process 0 answers, in all processes."""
    return bool(from_first(lambda: b"1" if question() else b""))


@contextlib.contextmanager
def on_its_own() -> Iterator[None]:
    """Inside, this process counts as the only one: nothing is sent."""
    global _alone
    _alone += 1
    try:
        yield
    finally:
        _alone -= 1


def refuse_batch_statistics(model: nn.Module) -> None:
    """Raise `InputError` if a batch norm would take its statistics from one process's share."""
    norms = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and not isinstance(module, nn.SyncBatchNorm)
        and module.training
    ]
    if is_distributed() and norms:
        raise InputError(
            f"The batch norm '{norms[0]}' is in training mode: each process would normalise by its "
            "own share of a batch. Freeze it (eval mode), or make it nn.SyncBatchNorm (on GPUs)."
        )


def _all_reduce_(tensors: Iterable[Tensor], parts: int) -> None:
    if not is_distributed():
        return
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for alike in kinds.values():
        whole = _sendable(torch.cat([t.detach().flatten() for t in alike]))
        with _sending():
            distributed.all_reduce(whole)
        if parts > 1:
            whole /= parts
        pieces = torch.split(whole, [t.numel() for t in alike])
        for tensor, piece in zip(alike, pieces, strict=True):
            tensor.detach().copy_(piece.reshape(tensor.shape))


def _gather(x: Tensor) -> list[Tensor]:
    sent = _sendable(x)
    found = [torch.empty_like(sent) for _ in range(world())]
    with _sending():
        distributed.all_gather(found, sent)
    return [each.to(x.device) for each in found]


def _sendable(x: Tensor) -> Tensor:
    """On a device that the group's backend can send from: NCCL knows GPUs only."""
    return x.cuda() if distributed.get_backend() == "nccl" else x


def _tensor_of(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else _NOTHING.clone()


def _bytes_of(x: Tensor) -> bytes:
    return x.cpu().numpy().tobytes()


@contextlib.contextmanager
def _sending() -> Iterator[None]:
    """Inside, what the backend raises becomes an error that says what to do."""
    try:
        yield
    except (RuntimeError, ValueError) as error:  # the latter where the environment says too little
        reason = _reason_of(error)
        raise LostProcessError(
            f"Another of the {distributed.get_world_size()} processes is lost, so this one ends "
            f"too ({reason}). Start the same command again: it goes on from what was stored."
            if distributed.is_initialized()
            else f"The processes do not find one another ({reason}). Start all of them again."
        ) from error


def _reason_of(error: Exception) -> str:
    """The first sentence of what a backend says, without the place in its source."""
    said = re.sub(r"^\[\S+\.cc:\d+\]\s*", "", str(error).strip()) or "no reason given"
    return said.splitlines()[0].partition(". ")[0]


_NOTHING = torch.empty(0, dtype=torch.uint8)
