"""Data by reference: embedded, arrays in a file, a folder of images, or a function."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from sft.core.data import SPLITS, Batches, Data
from sft.core.errors import InputError
from sft.models.arrays import read_arrays
from sft.models.images import image_folder
from sft.models.imports import call_factory
from sft.models.quote import close_names
from sft.models.zoo import fashion_mnist
from sft.models.zoo.augment import augment

EMBEDDED = "fashion-mnist"
FORMS = f"'{EMBEDDED}' (embedded), 'imagefolder:DIR', 'npz:FILE' or 'package.module:factory'"
CALIBRATION, CALIBRATION_SEED = 1000, 2


def load_data(reference: str, model_name: str | None = None) -> Data:
    """Make the data that `reference` names.

    reference : 'fashion-mnist', 'npz:FILE', 'package.module:factory', or 'imagefolder:DIR', which
        takes options: 'imagefolder:DIR?size=160&mean=0.5&std=0.25&channels=1'.
    model_name : the reference of the model that the data is for; image folders take from it the
        size, mean, standard deviation and channels that are not given.

    The first batch of each split is read and checked. Random state is left as it was. Raises
    `InputError` for an unknown reference and for data that is missing, empty or not finite.
    """
    source, _, rest = reference.partition(":")
    if reference == EMBEDDED:
        data = _fashion_mnist()
    elif source == "npz":
        data = read_arrays(Path(rest))
    elif source == "imagefolder":
        data = image_folder(rest, model_name)
    elif ":" in reference:
        data = _from_factory(reference)
    else:
        near = close_names(reference, [EMBEDDED])
        raise InputError(f"There is no data '{reference}'. Known forms: {FORMS}.{near}")
    with torch.random.fork_rng([]):
        data.check()
    return data


def _fashion_mnist() -> Data:
    images, labels = fashion_mnist.load_split("train")
    picked = fashion_mnist.balanced_indices(labels, CALIBRATION, CALIBRATION_SEED)
    train = _batches(images, labels, batch_size=64)
    train.shuffle, train.transform = True, augment
    return Data(
        calibration=_batches(images[picked], labels[picked], batch_size=100),
        train=train,
        validation=_batches(*fashion_mnist.load_split("validation"), batch_size=500),
        test=_batches(*fashion_mnist.load_split("test"), batch_size=500),
        name=f"{EMBEDDED} ({len(labels):,} training images)",
    )


def _batches(images: fashion_mnist.Bytes, labels: fashion_mnist.Bytes, batch_size: int) -> Batches:
    inputs = torch.from_numpy(fashion_mnist.normalise(images))
    return Batches(inputs, torch.from_numpy(labels.astype(np.int64)), batch_size)


def _from_factory(reference: str) -> Data:
    data = call_factory(reference, "an sft.Data")
    if not isinstance(data, Data):
        raise InputError(f"'{reference}' returned {type(data).__name__}; an sft.Data is wanted.")
    for name in SPLITS:
        loader = getattr(data, name)
        again = isinstance(loader, Iterable) and not isinstance(loader, Iterator)
        if loader is not None and not again:
            raise InputError(
                f"'{reference}': the {name} data is of type {type(loader).__name__}, which cannot "
                "be read again and again. Give a list of batches, an sft.Batches or a DataLoader."
            )
    return data
