"""Fashion-MNIST as arrays: the embedded subset, or the full set where it is installed.

The 60,000 training images are divided once and for all: the 2,000 images at
``validation_indices()`` serve every choice ever made, the other 58,000 train. The repository
carries the test images, the validation images and 12,000 of the training images.
"""

import gzip
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sft.core.errors import InputError

EMBEDDED = Path(__file__).parent / "data"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
FOLDER_VARIABLE = "SFT_FASHION_MNIST"
MEAN, STD = 0.2860, 0.3530

Bytes = npt.NDArray[np.uint8]


def read_idx(path: Path) -> Bytes:
    """Read a (gzipped) IDX file of unsigned bytes.

    Source: the file format section of LeCun's MNIST page. Raises `InputError` on anything else.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise InputError(f"Cannot read '{path}': {error}.") from error
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise InputError(f"'{path}' is not an IDX file of unsigned bytes.")
    rank = raw[3]
    shape = struct.unpack_from(f">{rank}I", raw, 4)
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * rank)
    if values.size != int(np.prod(shape)):
        raise InputError(f"'{path}' holds {values.size} values where its header says {shape}.")
    return values.reshape(shape).copy()


def write_idx(path: Path, values: Bytes) -> None:
    """Write bytes as a gzipped IDX file, byte-identical for the same values."""
    header = b"\0\0\x08" + bytes([values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(gzip.compress(header + values.tobytes(), 9, mtime=0))


def full_set_folder() -> Path | None:
    """The folder of the full 60,000 + 10,000 images, or None where it is not installed.

    Looked up in the environment variable ``SFT_FASHION_MNIST``, then where Debian's package
    ``dataset-fashion-mnist`` puts it.
    """
    named = os.environ.get(FOLDER_VARIABLE)
    if named is not None:
        if not (Path(named) / "train-images-idx3-ubyte.gz").is_file():
            raise InputError(
                f"{FOLDER_VARIABLE} names '{named}', which has no train-images-idx3-ubyte.gz. "
                "Point it at a folder of the four gzipped IDX files, or unset it."
            )
        return Path(named)
    return DEBIAN if (DEBIAN / "train-images-idx3-ubyte.gz").is_file() else None


def validation_indices() -> npt.NDArray[np.int64]:
    """Positions (2,000, ascending) of the validation images among the 60,000."""
    return np.loadtxt(EMBEDDED / "validation_indices.txt", dtype=np.int64)


def load_split(split: str) -> tuple[Bytes, Bytes]:
    """Images ``(N, 28, 28)`` and labels ``(N,)`` of ``train``, ``validation`` or ``test``.

    ``train`` is the 58,000 where the full set is installed, the embedded 12,000 elsewhere.
    """
    folder = full_set_folder()
    if split != "train" or folder is None:
        return _read_pair(EMBEDDED, split)
    images, labels = _read_pair(folder, "train")
    kept = np.setdiff1d(np.arange(len(labels)), validation_indices())
    return images[kept], labels[kept]


def balanced_indices(
    labels: Bytes, count: int, seed: int, excluded: Sequence[int] | npt.NDArray[np.int64] = ()
) -> npt.NDArray[np.int64]:
    """Pick ``count`` positions, equally many of each class, none of the excluded; ascending."""
    classes = np.unique(labels)
    allowed = np.setdiff1d(np.arange(len(labels)), np.asarray(excluded, np.int64))
    order = np.random.default_rng(seed).permutation(allowed)
    picked = [order[labels[order] == c][: count // len(classes)] for c in classes]
    return np.sort(np.concatenate(picked)).astype(np.int64)


def normalise(images: Bytes) -> npt.NDArray[np.float32]:
    """Bytes ``(N, 28, 28)`` to the network's input ``(N, 1, 28, 28)``: zero mean, unit variance."""
    scaled = (images[:, None].astype(np.float32) / np.float32(255) - np.float32(MEAN)) / np.float32(
        STD
    )
    return scaled.astype(np.float32)


def _read_pair(folder: Path, split: str) -> tuple[Bytes, Bytes]:
    name = {"test": "t10k"}.get(split, split)
    images = read_idx(folder / f"{name}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{name}-labels-idx1-ubyte.gz")
    if len(images) != len(labels):
        raise InputError(f"'{folder}' has {len(images)} {split} images and {len(labels)} labels.")
    return images, labels
