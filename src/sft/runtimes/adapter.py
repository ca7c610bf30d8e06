"""What a runtime's adapter looks like to the child process, and the records it hands back."""

import dataclasses
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Port:
    """An input or output of a file; an axis of no fixed size is None. `dtype` in NumPy's words."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A node that multiplies, as the runtime executes it.

    integer : both factors of its products are integers.
    macs : multiply-accumulates of one sample, channels that the runtime pads left out.
    """

    name: str
    op: str
    integer: bool
    macs: int


class Adapter(Protocol):
    """A loaded file. The constructor raises whatever the runtime raises when it refuses the file;
    `ModuleNotFoundError` says how to install a missing runtime."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    def __init__(self, path: str, threads: int) -> None: ...

    def run(self, x: Array) -> Array:
        """The first output for one sample `x` of shape (1, ...)."""
        ...

    def place(self, x: Array, folder: str) -> list[Kernel]:
        """The multiplying nodes executed for `x`; `folder` is free for temporary files."""
        ...


def size_of(shape: tuple[int, ...] | list[int]) -> int:
    """Number of elements of an array of this shape."""
    return int(np.prod(shape, dtype=np.int64))
