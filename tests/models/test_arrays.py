from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sft.core.data import Batches, Data, Loader
from sft.core.errors import InputError
from sft.models.data import load_data


def load(tmp_path: Path, **arrays: Any) -> Data:
    np.savez(tmp_path / "d.npz", **arrays)
    return load_data(f"npz:{tmp_path / 'd.npz'}")


def batches(loader: Loader | None) -> Batches:
    assert isinstance(loader, Batches)
    return loader


def numbered(count: int) -> np.ndarray[Any, Any]:
    return np.arange(count * 6, dtype=np.float64).reshape(count, 1, 2, 3)


def test_named_splits(tmp_path: Path) -> None:
    data = load(
        tmp_path,
        calibration=numbered(5),
        train=numbered(7),
        train_targets=np.arange(7, dtype=np.uint8),
        test=numbered(3).astype(">f4"),
        test_targets=np.linspace(0, 1, 3),
    )
    assert data.name == "npz:d.npz"
    assert data.validation is None
    calibration, train, test = map(batches, (data.calibration, data.train, data.test))
    assert torch.equal(calibration.inputs, torch.arange(30.0).reshape(5, 1, 2, 3))
    assert calibration.targets is None
    assert train.targets is not None
    assert train.targets.tolist() == list(range(7))
    assert train.targets.dtype == torch.int64
    assert train.shuffle
    assert torch.equal(test.inputs, torch.arange(18.0).reshape(3, 1, 2, 3))
    assert test.targets is not None
    assert test.targets.dtype == torch.float32
    assert not test.shuffle


def test_calibration_is_taken_from_train_where_it_is_missing(tmp_path: Path) -> None:
    data = load(tmp_path, train=numbered(700), train_targets=np.arange(700))
    calibration = batches(data.calibration)
    assert calibration.targets is not None
    assert len(set(calibration.targets.tolist())) == 512
    assert torch.equal(calibration.inputs[:, 0, 0, 0], calibration.targets * 6.0)


def test_x_and_y_are_divided_once_and_for_all(tmp_path: Path) -> None:
    arrays = {"x": numbered(1003), "y": np.arange(1003)}
    data, again = load(tmp_path, **arrays), load(tmp_path, **arrays)
    splits = {}
    for name in ("calibration", "train", "validation", "test"):
        split = batches(getattr(data, name))
        assert split.targets is not None
        assert torch.equal(split.inputs[:, 0, 0, 0], split.targets * 6.0)
        assert torch.equal(split.inputs, batches(getattr(again, name)).inputs)
        splits[name] = set(split.targets.tolist())
    assert [len(splits[n]) for n in ("train", "validation", "test")] == [803, 100, 100]
    assert splits["train"] | splits["validation"] | splits["test"] == set(range(1003))
    assert splits["calibration"] <= splits["train"]
    assert len(splits["calibration"]) == 512


def test_few_samples_are_all_calibration(tmp_path: Path) -> None:
    data = load(tmp_path, x=numbered(9))
    assert len(batches(data.calibration).inputs) == 9
    assert data.train is data.validation is data.test is None


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": numbered(3)}, r"holds the arrays 'images'\. Wanted"),
        ({"x": numbered(3), "z": numbered(3)}, r"holds the arrays 'x', 'z'"),
        ({"test": numbered(3)}, r"holds the arrays 'test'"),
        ({}, "holds the arrays none"),
        ({"calibration": numbered(3), "test_targets": np.ones(3)}, "but no 'test'"),
        ({"x": numbered(3), "y": np.ones(4)}, "'x' has 3 samples, 'y' 4"),
        (
            {"train": numbered(3), "train_targets": np.ones(4)},
            "'train' has 3 samples, 'train_t.* 4",
        ),
        ({"x": np.ones((0, 3))}, r"'x' \(0, 3\) has no samples"),
        ({"x": np.float64(3)}, r"'x' \(\) has no samples"),
        ({"x": np.array(["a", "b"])}, "not of numbers"),
        ({"x": np.array([object()])}, "is no .npz file of plain arrays: .*Object arrays"),
        ({"x": np.array([[1.0], [np.nan]])}, "holds NaN or infinite"),
        ({"train": numbered(2), "test": np.ones((2, 5))}, "All splits must agree"),
    ],
)
def test_arrays_that_cannot_be_used(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(tmp_path, **arrays)


def test_files_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    path.write_bytes(b"not a zip file")
    with pytest.raises(InputError, match=r"is no .npz file"):
        load_data(f"npz:{path}")
    with path.open("wb") as stream:
        np.save(stream, numbered(3))
    with pytest.raises(InputError, match="is a single array"):
        load_data(f"npz:{path}")
