"""Data from a folder of images, one sub-folder a class; images are read when they are needed."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import torch
from torch import Tensor

from sft.core.data import Data
from sft.core.errors import InputError
from sft.models.imports import optional_package
from sft.models.quote import close_names, one_line
from sft.models.split import Positions, divide, pick_calibration

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
FOLDERS = {"train": ("train",), "validation": ("val", "validation"), "test": ("test",)}
FORM = "Wanted: DIR/CLASS/image.png, or DIR/train/CLASS/image.png with val/ and test/ beside it"
BATCH, TRAIN_BATCH = 50, 64

Samples = list[tuple[Path, int]]


@dataclasses.dataclass(frozen=True)
class Format:
    """How an image becomes an input `(channels, size, size)`: the defaults are ImageNet's.

    mean, std : of each channel (or one for all), on the scale of 0 to 1.
    """

    size: int = 224
    channels: int = 3
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if self.size < 1 or self.channels not in (1, 3):
            raise InputError("An image folder needs size=1 or more and channels=1 or 3.")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) not in (1, self.channels):
                raise InputError(
                    f"{name}={','.join(map(str, values))} has {len(values)} values for "
                    f"{self.channels} channels; give one, or one a channel."
                )
        if min(self.std) <= 0:
            raise InputError("Each value of std= must be above 0.")


class ImageBatches:
    """Image files as a loader of `(inputs, targets)`, read batch by batch.

    shuffle : each pass has a new order, drawn from torch's global generator, and a last batch
        that is not full is left out.
    """

    def __init__(
        self, samples: Samples, form: Format, batch_size: int = BATCH, shuffle: bool = False
    ) -> None:
        self.samples, self.form = samples, form
        self.batch_size, self.shuffle = batch_size, shuffle

    def __len__(self) -> int:
        if self.shuffle and len(self.samples) >= self.batch_size:
            return len(self.samples) // self.batch_size
        return -(-len(self.samples) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        count = len(self.samples)
        order = (torch.randperm(count) if self.shuffle else torch.arange(count)).tolist()
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            samples = [self.samples[i] for i in order[start : start + self.batch_size]]
            inputs = torch.stack([read_image(path, self.form) for path, _ in samples])
            yield inputs, torch.tensor([label for _, label in samples])


def image_folder(reference: str, model_name: str | None = None) -> Data:
    """The data of `DIR` or `DIR?size=160&mean=0.5&std=0.25&channels=1`.

    model_name : decides what the options leave open: 'fashion-resnet' and 'timm:NAME' have a
        format of their own, others take ImageNet's.

    Where there are no folders train, val and test, the images are divided by `divide`.
    """
    name, _, options = reference.partition("?")
    root = Path(name)
    if not root.is_dir():
        raise InputError(f"There is no folder '{name}'. {FORM}.")
    form = _format(options, model_name)
    optional_package("PIL", "pillow", f"imagefolder:{name}")
    splits = _split_folders(root) if _has_splits(root) else _divided(root)
    loaders = {
        split: ImageBatches(samples, form, TRAIN_BATCH if split == "train" else BATCH)
        for split, samples in splits.items()
    }
    count = len(splits.get("train", ()))
    if "train" in loaders:
        loaders["train"].shuffle = True
    return Data(**loaders, name=f"imagefolder:{root.name} ({count:,} training images)")


def read_image(path: Path, form: Format) -> Tensor:
    """One image `(channels, size, size)`: the shorter side resized, the centre cut out."""
    image_module = optional_package("PIL.Image", "pillow", str(path))
    operations = optional_package("PIL.ImageOps", "pillow", str(path))
    try:
        with image_module.open(path) as stored:
            image = operations.exif_transpose(stored).convert("L" if form.channels == 1 else "RGB")
            scale = form.size / min(image.size)
            width, height = (max(form.size, round(side * scale)) for side in image.size)
            image = image.resize((width, height), image_module.Resampling.BILINEAR)
            left, top = (width - form.size) // 2, (height - form.size) // 2
            image = image.crop((left, top, left + form.size, top + form.size))
            pixels = np.asarray(image, np.float32).reshape(form.size, form.size, form.channels)
    except Exception as error:
        raise InputError(f"The image '{path}' cannot be read: {one_line(error)}") from error
    mean, std = np.asarray(form.mean, np.float32), np.asarray(form.std, np.float32)
    values = (pixels / np.float32(255) - mean) / std
    return torch.from_numpy(values.transpose(2, 0, 1).copy())


def _has_splits(root: Path) -> bool:
    train = root / "train"
    return train.is_dir() and any(p.is_dir() for p in train.iterdir())


def _split_folders(root: Path) -> dict[str, Samples]:
    classes = _classes(root / "train")
    found: dict[str, Samples] = {}
    for split, names in FOLDERS.items():
        for folder in (root / n for n in names if (root / n).is_dir()):
            found[split] = _samples(folder, classes)
    picked = pick_calibration(len(found["train"]))
    return {"calibration": _at(found["train"], picked), **found}


def _divided(root: Path) -> dict[str, Samples]:
    samples = _samples(root, _classes(root))
    return {split: _at(samples, positions) for split, positions in divide(len(samples)).items()}


def _at(samples: Samples, positions: Positions) -> Samples:
    return [samples[i] for i in positions.tolist()]


def _classes(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _samples(folder: Path, classes: list[str]) -> Samples:
    """Image files and class numbers, in the order of their names."""
    strange = [c for c in _classes(folder) if c not in classes]
    if strange:
        raise InputError(f"'{folder}' has a class '{strange[0]}' that train/ has not.")
    found = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    ]
    if not found:
        raise InputError(f"'{folder}' holds no images in class folders. {FORM}.")
    return found


def _format(options: str, model_name: str | None) -> Format:
    """The model's own format, changed by the options of the reference."""
    given: dict[str, Any] = {}
    known = [f.name for f in dataclasses.fields(Format)]
    for name, value in parse_qsl(options, keep_blank_values=True):
        if name not in known:
            near = close_names(name, known)
            raise InputError(
                f"An image folder has no option '{name}'. Known: {', '.join(known)}.{near}"
            )
        try:
            several = name in ("mean", "std")
            given[name] = tuple(map(float, value.split(","))) if several else int(value)
        except ValueError:
            raise InputError(f"The image folder's {name}={value} is not a number.") from None
    form = _model_format(model_name)
    if given.get("channels", form.channels) != form.channels:
        form = dataclasses.replace(form, channels=given["channels"], mean=(0.5,), std=(0.5,))
    return dataclasses.replace(form, **given)


def _model_format(model_name: str | None) -> Format:
    source, _, name = (model_name or "").partition(":")
    if source == "fashion-resnet":
        return Format(28, 1, (0.2860,), (0.3530,))
    if source == "timm":
        timm = optional_package("timm", "timm", f"timm:{name}")
        own = timm.get_pretrained_cfg(name)
        if own is not None:
            return Format(own.input_size[1], own.input_size[0], tuple(own.mean), tuple(own.std))
    return Format()
