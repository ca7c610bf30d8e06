"""The user's data: four splits, each a loader of inputs or of (inputs, targets).

A loader is anything that can be iterated again and again and gives batches whose first axis is
the sample axis. A batch is a tensor of inputs, or a tuple or list of which the first item is that
tensor and the second the targets.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

import torch

from sft.core.errors import InputError
from sft.core.randomness import forked_rng

Loader = Iterable[Any]
Predict = Callable[[torch.Tensor], torch.Tensor]
Evaluate = Callable[[Predict, Loader], float]

SPLITS = ("calibration", "train", "validation", "test")


class Batches:
    """Tensors as a loader: batches of `(inputs, targets)`, or of inputs where targets is None.

    shuffle : each pass has a new order, drawn from torch's global generator (seed it for a
        repeatable pass), and a last batch that is not full is left out.
    transform : applied to the inputs of each batch, `(N, ...) -> (N, ...)`; augmentation.
    """

    def __init__(
        self,
        inputs: torch.Tensor,
        targets: torch.Tensor | None = None,
        batch_size: int = 100,
        shuffle: bool = False,
        transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        if targets is not None and len(inputs) != len(targets):
            raise InputError(f"There are {len(inputs)} inputs and {len(targets)} targets.")
        self.inputs, self.targets, self.transform = inputs, targets, transform
        self.batch_size, self.shuffle = batch_size, shuffle

    def __len__(self) -> int:
        if self.shuffle and len(self.inputs) >= self.batch_size:
            return len(self.inputs) // self.batch_size
        return -(-len(self.inputs) // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        count = len(self.inputs)
        order = torch.randperm(count) if self.shuffle else torch.arange(count)
        for index in range(len(self)):
            picked = order[index * self.batch_size : (index + 1) * self.batch_size]
            x = self.inputs[picked]
            x = x if self.transform is None else self.transform(x)
            yield x if self.targets is None else (x, self.targets[picked])


@dataclasses.dataclass(frozen=True)
class Data:
    """Four splits; `calibration` is enough.

    Choices (ranks, bits, epochs) use calibration, train and validation; test is touched once, for
    the final before and after. A split that is not given falls back: train and validation to
    calibration, test to validation. `name` is what reports call the data.
    """

    calibration: Loader
    train: Loader | None = None
    validation: Loader | None = None
    test: Loader | None = None
    name: str = "data"

    def __post_init__(self) -> None:
        for name in SPLITS:
            if isinstance(getattr(self, name), Iterator):
                raise InputError(
                    f"The {name} data is a generator, which can be read only once. Give a list of "
                    f"batches, sft.Batches or a DataLoader."
                )

    def split(self, name: str) -> tuple[Loader, str]:
        """The loader that serves as split `name`, and the split it really is."""
        if name not in SPLITS:
            raise InputError(f"There is no split '{name}'. Known: {', '.join(SPLITS)}.")
        fallback = {"train": "calibration", "validation": "calibration", "test": "validation"}
        own = getattr(self, name)
        return (own, name) if own is not None else self.split(fallback[name])

    def example(self) -> torch.Tensor:
        """One sample of the calibration split, with a batch axis of 1."""
        for batch in self.calibration:
            return inputs_of(batch)[:1]
        raise InputError("The calibration data is empty: at least one batch is needed.")

    def check(self) -> None:
        """Raise `InputError` if a split is empty, not finite, or of another sample shape.

        Reads the first batch of each split; torch's global generator is left as it was.
        """
        shape: tuple[int, ...] | None = None
        for name in SPLITS:
            loader = getattr(self, name)
            if loader is None:
                continue
            with forked_rng():
                batch = next(iter(loader), None)
            if batch is None or len(inputs_of(batch)) == 0:
                raise InputError(f"The {name} data is empty: at least one batch is needed.")
            x = inputs_of(batch)
            check_finite(x, name)
            if shape is not None and tuple(x.shape[1:]) != shape:
                raise InputError(
                    f"A sample of the {name} data has shape {tuple(x.shape[1:])}, one of the "
                    f"calibration data {shape}. All splits must agree."
                )
            shape = tuple(x.shape[1:])


def length_of(loader: Loader) -> int:
    """How many batches a loader says it has; 0 if it does not say."""
    return len(loader) if isinstance(loader, Sized) else 0


def inputs_of(batch: Any) -> torch.Tensor:
    """The inputs of a batch, whatever its form."""
    x = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(x, torch.Tensor) or x.ndim < 1:
        raise InputError(
            f"A batch of data is of type {type(batch).__name__}; a tensor, or (inputs, targets) "
            "with a tensor first, is wanted."
        )
    return x


def targets_of(batch: Any) -> Any | None:
    """The targets of a batch, or None."""
    return batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else None


def check_finite(x: torch.Tensor, split: str) -> None:
    if x.is_floating_point() and not bool(torch.isfinite(x).all()):
        raise InputError(f"The {split} data holds NaN or infinite values. Clean it first.")


def fingerprint_data(loader: Loader, batches: int | None = 2) -> str:
    """A short hash of the inputs of the first batches, to notice that the data changed.

    batches : how many are read; None: all. If not all are, the number of batches that the loader
    says it has counts too, and of `Batches` every input that they hold. Of a loader that is divided
    over processes (`shards.Shard`) the whole batches count.
    """
    whole = getattr(loader, "whole", loader)
    digest = hashlib.sha256()
    if batches is not None:
        digest.update(str(length_of(whole)).encode())
        if isinstance(whole, Batches):
            _add_tensor(digest, whole.inputs)
    for index, batch in enumerate(whole):
        if index == batches:
            break
        _add_tensor(digest, inputs_of(batch))
    return digest.hexdigest()[:16]


def _add_tensor(digest: Any, x: torch.Tensor) -> None:
    x = x.detach().cpu().contiguous()
    digest.update(str((tuple(x.shape), str(x.dtype))).encode())
    digest.update(x.view(torch.uint8).numpy().tobytes())


def top1(predict: Predict, loader: Loader) -> float:
    """Share of samples whose greatest output is at the target; an `evaluate` for classifiers."""
    right = count = 0
    for batch in loader:
        targets = targets_of(batch)
        if targets is None:
            raise InputError("top1 needs targets: give loaders of (inputs, targets).")
        outputs = predict(inputs_of(batch))
        wanted = torch.as_tensor(targets).reshape(-1).cpu()
        if len(wanted) != len(outputs):
            raise InputError(
                f"top1 wants one class index a sample; the targets of {len(outputs)} samples have "
                f"shape {tuple(torch.as_tensor(targets).shape)}."
            )
        right += int((outputs.argmax(1).cpu() == wanted).sum())
        count += len(wanted)
    if count == 0:
        raise InputError("There is nothing to evaluate: the data is empty.")
    return right / count
