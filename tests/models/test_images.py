import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sft.core.data import Data
from sft.core.errors import InputError
from sft.models import images
from sft.models.data import load_data
from sft.models.images import Format, ImageBatches, read_image


def make(folder: Path, counts: dict[str, int]) -> None:
    """Empty files in class folders; `fake` reads them."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            (folder / name / f"{index:03}.png").touch()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Images are read without Pillow, as noughts; the list fills with what was read."""
    read: list[Path] = []

    def read_nothing(path: Path, form: Format) -> Tensor:
        read.append(path)
        return torch.zeros(form.channels, form.size, form.size)

    monkeypatch.setattr(images, "read_image", read_nothing)
    monkeypatch.setattr(images, "optional_package", lambda *_: None)
    return read


def split(data: Data, name: str) -> ImageBatches:
    loader = getattr(data, name)
    assert isinstance(loader, ImageBatches)
    return loader


def test_class_folders_are_divided_once_and_for_all(tmp_path: Path, fake: list[Path]) -> None:
    make(tmp_path, {"cat": 60, "ant": 40, ".hidden": 5})
    data, again = (load_data(f"imagefolder:{tmp_path}?size=8") for _ in range(2))
    parts = {n: set(split(data, n).samples) for n in ("calibration", "train", "validation", "test")}
    assert {n: len(s) for n, s in parts.items()} == {
        "calibration": 80, "train": 80, "validation": 10, "test": 10,
    }  # fmt: skip
    whole = parts["train"] | parts["validation"] | parts["test"]
    assert len(whole) == 100
    assert parts["calibration"] <= parts["train"]
    assert all(label == ["ant", "cat"].index(path.parent.name) for path, label in whole)
    assert split(data, "test").samples == split(again, "test").samples
    assert split(data, "train").shuffle
    assert not split(data, "calibration").shuffle
    assert data.name == f"imagefolder:{tmp_path.name} (80 training images)"


def test_split_folders_are_kept(tmp_path: Path, fake: list[Path]) -> None:
    for name, counts in {
        "train": {"a": 400, "b": 200},
        "val": {"a": 3, "b": 4},
        "test": {"b": 5},
    }.items():
        make(tmp_path / name, counts)
    data = load_data(f"imagefolder:{tmp_path}?size=8")
    assert len(split(data, "train").samples) == 600
    assert len(split(data, "calibration").samples) == 512
    assert {s for _, s in split(data, "calibration").samples} == {0, 1}
    assert [label for _, label in split(data, "validation").samples] == [0] * 3 + [1] * 4
    assert [label for _, label in split(data, "test").samples] == [1] * 5


def test_images_are_read_batch_by_batch(tmp_path: Path, fake: list[Path]) -> None:
    make(tmp_path / "train", {"a": 100, "b": 30})
    data = load_data(f"imagefolder:{tmp_path}?size=8&channels=1")
    fake.clear()
    loader = split(data, "train")
    torch.manual_seed(0)
    iterator = iter(loader)
    assert not fake
    x, y = next(iterator)
    assert x.shape == (64, 1, 8, 8)
    assert len(fake) == 64
    assert [int(path.parent.name == "b") for path in fake] == y.tolist()
    assert 0 < int(y.sum()) < 30
    assert len(loader) == 1 + len(list(iterator)) == 2  # a last batch that is not full is left out
    assert sum(len(y) for _, y in split(data, "calibration")) == 130


@pytest.mark.parametrize(
    ("options", "model", "wanted"),
    [
        ("", None, Format()),
        ("?size=160&mean=0.5&std=0.25", None, Format(160, 3, (0.5,), (0.25,))),
        ("?mean=0.1,0.2,0.3", "m:f", Format(mean=(0.1, 0.2, 0.3))),
        ("?channels=1", None, Format(224, 1, (0.5,), (0.5,))),
        ("", "fashion-resnet", Format(28, 1, (0.2860,), (0.3530,))),
        ("?size=32", "fashion-resnet", Format(32, 1, (0.2860,), (0.3530,))),
        ("", "timm:tiny", Format(96, 3, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))),
    ],
)
def test_the_format_of_the_options_and_of_the_model(
    options: str, model: str | None, wanted: Format, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    make(tmp_path, {"a": 12})
    tiny = types.SimpleNamespace(input_size=(3, 96, 96), mean=(0.5,) * 3, std=(0.2,) * 3)
    timm = types.SimpleNamespace(get_pretrained_cfg=lambda name: tiny if name == "tiny" else None)
    monkeypatch.setattr(images, "optional_package", lambda module, *_: timm)
    monkeypatch.setattr(images, "read_image", lambda path, form: torch.zeros(form.channels, 2, 2))
    data = load_data(f"imagefolder:{tmp_path}{options}", model)
    assert split(data, "test").form == wanted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("siz=8", "no option 'siz'.*Did you mean 'size'"),
        ("size=big", "size=big is not a number"),
        ("size=0", "size=1 or more"),
        ("channels=2", "channels=1 or 3"),
        ("mean=0.5,0.5", "mean=0.5,0.5 has 2 values for 3 channels"),
        ("std=0", "std= must be above 0"),
    ],
)
def test_options_that_are_wrong(
    options: str, message: str, tmp_path: Path, fake: list[Path]
) -> None:
    make(tmp_path, {"a": 12})
    with pytest.raises(InputError, match=message):
        load_data(f"imagefolder:{tmp_path}?{options}")


def test_folders_that_are_wrong(tmp_path: Path, fake: list[Path]) -> None:
    with pytest.raises(InputError, match=r"holds no images in class folders. Wanted"):
        load_data(f"imagefolder:{tmp_path}")
    make(tmp_path / "train", {"a": 12})
    make(tmp_path / "val", {"b": 2})
    with pytest.raises(InputError, match="has a class 'b' that train/ has not"):
        load_data(f"imagefolder:{tmp_path}")


def test_without_pillow_there_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, {"a": 12})
    for name in ("PIL", "PIL.Image", "PIL.ImageOps"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match="pip install pillow"):
        load_data(f"imagefolder:{tmp_path}")


def save(path: Path, pixels: Any) -> Path:
    pillow = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    pillow.fromarray(np.asarray(pixels, np.uint8)).save(path)
    return path


def test_pixels_of_the_centre(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 7, 3))
    x = read_image(save(tmp_path / "i.png", pixels), Format(4, 3, (0.5, 0.4, 0.3), (0.2,)))
    centre = pixels[:, 1:5].transpose(2, 0, 1) / 255
    wanted = (centre - np.array([0.5, 0.4, 0.3])[:, None, None]) / 0.2
    assert x.dtype == torch.float32
    assert x.shape == (3, 4, 4)
    assert np.abs(x.numpy() - wanted).max() < 1e-6


def test_the_shorter_side_is_resized(tmp_path: Path) -> None:
    pixels = np.zeros((40, 20))
    pixels[:20] = 255
    x = read_image(save(tmp_path / "i.png", pixels), Format(10, 1, (0.0,), (1.0,)))
    assert x.shape == (1, 10, 10)
    assert bool((x[0, :4] == 1).all())
    assert bool((x[0, 6:] == 0).all())


def test_a_folder_of_real_images(tmp_path: Path) -> None:
    for index in range(20):
        level = 200 if index % 2 else 50
        save(tmp_path / ("ab"[index % 2]) / f"{index}.png", np.full((9, 12, 3), level))
    data = load_data(f"imagefolder:{tmp_path}?size=6&mean=0&std=1")
    for x, y in data.calibration:
        assert torch.equal(x[:, 0, 0, 0] > 0.5, y == 1)


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    pytest.importorskip("PIL.Image")
    make(tmp_path, {"a": 12})
    with pytest.raises(InputError, match=r"The image '.*\.png' cannot be read: Unidentified"):
        load_data(f"imagefolder:{tmp_path}?size=6")
