"""Make the embedded subset of Fashion-MNIST from the full set (run once; results are committed).

    python examples/prepare_fashion_mnist.py

Reads the full set (Debian's package `dataset-fashion-mnist`, or the folder that the environment
variable SFT_FASHION_MNIST names) and writes the validation indices, the 2,000 validation images,
12,000 training images and the test images into the package.
"""

import shutil

import numpy as np

from sft.models.zoo import fashion_mnist as fm

VALIDATION_COUNT, VALIDATION_SEED = 2_000, 0
TRAIN_COUNT, TRAIN_SEED = 12_000, 1


def main() -> None:
    folder = fm.full_set_folder()
    if folder is None:
        raise SystemExit("Install Debian's dataset-fashion-mnist, or set SFT_FASHION_MNIST.")
    images = fm.read_idx(folder / "train-images-idx3-ubyte.gz")
    labels = fm.read_idx(folder / "train-labels-idx1-ubyte.gz")
    validation = fm.balanced_indices(labels, VALIDATION_COUNT, VALIDATION_SEED)
    train = fm.balanced_indices(labels, TRAIN_COUNT, TRAIN_SEED, excluded=validation)
    np.savetxt(fm.EMBEDDED / "validation_indices.txt", validation, "%d")
    for name, kept in (("validation", validation), ("train", train)):
        fm.write_idx(fm.EMBEDDED / f"{name}-images-idx3-ubyte.gz", images[kept])
        fm.write_idx(fm.EMBEDDED / f"{name}-labels-idx1-ubyte.gz", labels[kept])
    for name in ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"):
        shutil.copyfile(folder / name, fm.EMBEDDED / name)


if __name__ == "__main__":
    main()
