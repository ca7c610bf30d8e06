"""Data from a `.npz` file of numpy: inputs and targets as plain arrays."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sft.core.data import SPLITS, Batches, Data
from sft.core.errors import InputError
from sft.models.quote import one_line
from sft.models.split import divide, pick_calibration

Array = npt.NDArray[Any]

TARGETS = "_targets"
BATCH, TRAIN_BATCH = 100, 128
NAMES = {*SPLITS, *(f"{s}{TARGETS}" for s in SPLITS)}
FORM = (
    "Wanted: inputs 'calibration', 'train', 'validation', 'test' (calibration or train is enough) "
    "with optional '..._targets', or 'x' with optional 'y'; numpy.savez(file, x=inputs, y=targets)"
)


def read_arrays(path: Path) -> Data:
    """Read the splits of a `.npz` file; inputs are fed to the model as they are, as float32.

    'x' (and 'y') alone are divided by `divide`. Raises `InputError` for anything but arrays of
    numbers under the known names.
    """
    arrays = _load(path)
    if "x" in arrays and set(arrays) <= {"x", "y"}:
        arrays = _divided(path, arrays)
    unknown = sorted(set(arrays) - NAMES)
    if unknown or not {"calibration", "train"} & set(arrays):
        raise InputError(f"'{path}' holds the arrays {_listed(arrays)}. {FORM}.")
    if "calibration" not in arrays:
        picked = pick_calibration(len(arrays["train"]))
        for end in ("", TARGETS):
            if f"train{end}" in arrays:
                _check_pair(path, "train", arrays)
                arrays[f"calibration{end}"] = arrays[f"train{end}"][picked]
    splits = {name: _batches(path, name, arrays) for name in SPLITS if name in arrays}
    for name in SPLITS:
        if f"{name}{TARGETS}" in arrays and name not in splits:
            raise InputError(f"'{path}' holds '{name}{TARGETS}' but no '{name}'. {FORM}.")
    return Data(**splits, name=f"npz:{path.name}")


def _load(path: Path) -> dict[str, Array]:
    if not path.is_file():
        raise InputError(f"There is no data file '{path}'.")
    try:
        stored = np.load(path, allow_pickle=False)
        single = isinstance(stored, np.ndarray)
        arrays = {} if single else {name: stored[name] for name in stored.files}
    except Exception as error:
        raise InputError(f"'{path}' is no .npz file of plain arrays: {one_line(error)}") from error
    if single:
        raise InputError(f"'{path}' is a single array, not an .npz file. {FORM}.")
    stored.close()
    for name, array in arrays.items():
        if array.dtype.kind not in "biuf":
            raise InputError(f"'{path}': the array '{name}' is of {array.dtype}, not of numbers.")
        if array.ndim == 0 or array.size == 0:
            raise InputError(f"'{path}': the array '{name}' {array.shape} has no samples.")
    return arrays


def _divided(path: Path, arrays: dict[str, Array]) -> dict[str, Array]:
    whole = {"calibration": arrays["x"]}
    if "y" in arrays:
        whole[f"calibration{TARGETS}"] = arrays["y"]
    _check_pair(path, "calibration", whole, shown=("x", "y"))
    return {
        name.replace("calibration", split): array[positions]
        for split, positions in divide(len(arrays["x"])).items()
        for name, array in whole.items()
    }


def _check_pair(
    path: Path, split: str, arrays: dict[str, Array], shown: tuple[str, str] | None = None
) -> None:
    targets = arrays.get(f"{split}{TARGETS}")
    if targets is not None and len(targets) != len(arrays[split]):
        first, second = shown or (split, f"{split}{TARGETS}")
        raise InputError(
            f"'{path}': '{first}' has {len(arrays[split])} samples, '{second}' {len(targets)}."
        )


def _batches(path: Path, split: str, arrays: dict[str, Array]) -> Batches:
    _check_pair(path, split, arrays)
    targets = arrays.get(f"{split}{TARGETS}")
    train = split == "train"
    return Batches(
        _tensor(arrays[split]),
        None if targets is None else _tensor(targets, whole=np.int64),
        batch_size=TRAIN_BATCH if train else BATCH,
        shuffle=train,
    )


def _tensor(array: Array, whole: type[np.int64] | None = None) -> torch.Tensor:
    """Real numbers as float32; integers as `whole`, or as they are."""
    if array.dtype.kind == "f":
        return torch.from_numpy(np.ascontiguousarray(array, np.float32))
    wanted = array.dtype.newbyteorder("=") if whole is None else np.dtype(whole)
    return torch.from_numpy(np.ascontiguousarray(array, wanted))


def _listed(arrays: dict[str, Array]) -> str:
    return ", ".join(f"'{n}'" for n in sorted(arrays)) or "none"
