"""Each process's share of data that all processes read alike: a slice of every batch.

Every process makes the same loaders and reads them with the same seeds, augmentation included, so
that all together work on the batches that one process would see. What is saved is the work on the
network, not that of reading.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import Tensor

from sft.core.data import Data, Loader, inputs_of, length_of
from sft.core.distributed import from_first, gather_tensors, is_distributed, rank, world
from sft.core.errors import InputError
from sft.core.records import Record

R = TypeVar("R", bound=Record)


@dataclasses.dataclass(frozen=True)
class Part:
    """A slice of a batch.

    batch : the slice, a tensor or a tuple as the whole is. first, count : its samples are those
    from `first` on, `count` of them, of the `whole` ones.
    """

    batch: Any
    first: int
    count: int
    whole: int


class Shard:
    """A loader of this process's slice of every batch of `whole`.

    equal : slices of one length, as averaging gradients needs it; a remainder of fewer samples
        than processes is left out. Otherwise every sample is in one slice, and lengths differ by
        one at most. A process whose slice is empty goes on to its next batch.
    Raises `InputError` for a batch of which no slices can be taken.
    """

    def __init__(self, whole: Loader, equal: bool = False) -> None:
        self.whole, self.equal = whole, equal

    def __len__(self) -> int:
        return length_of(self.whole)

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[Any]:
        for part in self.parts():
            yield part.batch

    def parts(self) -> Iterator[Part]:
        """The slices, with where they stand in their batches."""
        number, processes = rank(), world()
        for batch in self.whole:
            count = len(inputs_of(batch))
            if self.equal:
                size = count // processes
                first, last = number * size, (number + 1) * size
            else:
                first, last = (count * n // processes for n in (number, number + 1))
            if last > first:
                yield Part(_slice(batch, first, last, count), first, last - first, count)


def shared_out(data: Data) -> Data:
    """The data as one of several processes reads it; the data itself where there is only one.

    Calibration and validation leave nothing out; slices of the train data are of equal length. The
    test data is not divided: it is for exported files, which process 0 runs.
    """
    if not is_distributed():
        return data
    validation = None if data.validation is None else Shard(data.validation)
    return dataclasses.replace(
        data,
        calibration=Shard(data.calibration),
        train=Shard(data.split("train")[0], equal=True),
        validation=validation,
    )


def whole_of(loader: Loader) -> Loader:
    """The loader that all processes read alike, of a `Shard`; any other loader itself."""
    return loader.whole if isinstance(loader, Shard) else loader


def record_of_first(kind: type[R], work: Callable[[], R]) -> R:
    """The record that `work` makes in process 0, which alone does it (see `from_first`)."""
    if not is_distributed():
        return work()
    return kind.from_json(from_first(lambda: work().to_json().encode()).decode())


def of_first(x: Tensor) -> Tensor:
    """The tensor of process 0, whatever the shapes in the others."""
    return gather_tensors(x)[0]


def _slice(batch: Any, first: int, last: int, count: int) -> Any:
    """Samples `first` to `last` of every part of a batch: a tensor, or a tuple of parts."""
    if isinstance(batch, Tensor):
        return batch[first:last]
    if isinstance(batch, tuple | list) and batch and isinstance(batch[0], Tensor):
        return tuple(_of_part(part, first, last, count) for part in batch)
    raise InputError(f"A batch of type {type(batch).__name__} cannot be divided over processes.")


def _of_part(part: Any, first: int, last: int, count: int) -> Any:
    if isinstance(part, dict):
        return {key: _of_part(value, first, last, count) for key, value in part.items()}
    try:
        if len(part) == count:
            return part[first:last]
        reason = f"it has {len(part)} entries for {count} samples"
    except TypeError:
        reason = "no slices of it can be taken"
    raise InputError(
        f"A part of a batch, of type {type(part).__name__}, cannot be divided over processes: "
        f"{reason}. Give tensors or lists with one entry a sample."
    )
