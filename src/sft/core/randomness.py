"""Repeatable random numbers that leave the caller's generators as they were."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def forked_rng(seed: int | None = None) -> Iterator[None]:
    """Inside, torch's generators (of the processor and of each GPU) may be used and seeded freely;
    afterwards they are as before. With a seed they start from it.
    """
    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
        if seed is not None:
            torch.manual_seed(seed)
        yield
