from pathlib import Path

import numpy as np
import pytest
import torch

from sft.core.data import Batches, Data
from sft.core.errors import InputError
from sft.models.data import load_data
from sft.models.zoo import fashion_mnist as fm
from sft.models.zoo.augment import BLACK, SHIFT, augment

SOURCE = """
import torch
import sft.core.data as data

batches = [torch.ones(2, 3)]

def good():
    return data.Data(calibration=batches, name="mine")

def once():
    return data.Data(calibration=batches, train=iter(batches))

def unbroken():
    return batches

def empty():
    return data.Data(calibration=[])

def infinite():
    return data.Data(calibration=[torch.full((2, 3), float("inf"))])

def unlike():
    return data.Data(calibration=batches, test=[torch.ones(2, 4)])
"""


@pytest.fixture(scope="module")
def embedded() -> Data:
    """The data where the full set is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(fm.FOLDER_VARIABLE, raising=False)
        patch.setattr(fm, "DEBIAN", Path("nowhere"))
        return load_data("fashion-mnist")


def _tensors(loader: object) -> tuple[torch.Tensor, torch.Tensor]:
    assert isinstance(loader, Batches)
    assert loader.targets is not None
    return loader.inputs, loader.targets


def _rows(x: torch.Tensor) -> set[bytes]:
    return {row.tobytes() for row in x.numpy()}


def test_the_embedded_splits_have_their_sizes(embedded: Data) -> None:
    sizes = {"calibration": 1000, "train": 12_000, "validation": 2000, "test": 10_000}
    for name, size in sizes.items():
        x, y = _tensors(getattr(embedded, name))
        assert x.shape == (size, 1, 28, 28)
        assert x.dtype == torch.float32
        assert y.shape == (size,)
        assert y.dtype == torch.int64
        assert y.bincount().tolist() == [size // 10] * 10
    assert embedded.name == "fashion-mnist (12,000 training images)"


def test_the_embedded_splits_are_disjoint(embedded: Data) -> None:
    train = _rows(_tensors(embedded.train)[0])
    assert len(train) > 11_900
    assert not train & _rows(_tensors(embedded.validation)[0])
    assert _rows(_tensors(embedded.calibration)[0]) <= train
    # Fashion-MNIST itself repeats a few training images in its test set.
    assert len(train & _rows(_tensors(embedded.test)[0])) < 10


def test_the_embedded_batches(embedded: Data) -> None:
    assert embedded.example().shape == (1, 1, 28, 28)
    for name, size in {"calibration": 100, "train": 64, "validation": 500, "test": 500}.items():
        x, y = next(iter(getattr(embedded, name)))
        assert len(x) == len(y) == size
    x, _ = _tensors(embedded.train)
    assert abs(float(x.mean())) < 0.01
    assert abs(float(x.std()) - 1) < 0.01
    torch.manual_seed(0)
    first = next(iter(embedded.train or ()))[0]
    torch.manual_seed(0)
    again = next(iter(embedded.train or ()))[0]
    other = next(iter(embedded.train or ()))[0]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_full_set_is_used_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 60,000 images (each holds its own number) all but the validation images train."""
    numbers = np.arange(60_000)
    images = np.zeros((60_000, 28, 28), np.uint8)
    for place in range(3):
        images[:, 0, place] = numbers // 256**place % 256
    fm.write_idx(tmp_path / "train-images-idx3-ubyte.gz", images)
    fm.write_idx(tmp_path / "train-labels-idx1-ubyte.gz", (numbers % 10).astype(np.uint8))
    monkeypatch.setenv(fm.FOLDER_VARIABLE, str(tmp_path))
    data = load_data("fashion-mnist")
    assert data.name == "fashion-mnist (58,000 training images)"
    x, _ = _tensors(data.train)
    pixels = (x[:, 0, 0, :3] * fm.STD + fm.MEAN) * 255
    found = (pixels.round().long() * torch.tensor([1, 256, 65536])).sum(1)
    assert set(found.tolist()) == set(range(60_000)) - set(fm.validation_indices().tolist())


def test_augmented_images_are_shifted_and_mirrored_images() -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 2, 9, 7)
    y = augment(x)
    assert y.shape == x.shape
    padded = torch.nn.functional.pad(x, (SHIFT,) * 4, value=BLACK)
    found = []
    for image, wide in zip(y, padded, strict=True):
        matches = [
            (flip, down, right)
            for flip in (False, True)
            for down in range(5)
            for right in range(5)
            if torch.equal(image, _flipped(wide[:, down : down + 9, right : right + 7], flip))
        ]
        assert len(matches) == 1
        found += matches
    assert 100 < sum(flip for flip, _, _ in found) < 200
    assert {(down, right) for _, down, right in found} == {
        (a, b) for a in range(5) for b in range(5)
    }


def _flipped(x: torch.Tensor, flip: bool) -> torch.Tensor:
    return x.flip(2) if flip else x


def test_random_state_is_left_alone(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.ones((200, 3), np.float32))
    before = torch.get_rng_state()
    load_data(f"npz:{tmp_path / 'd.npz'}")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sft_test_data.py").write_text(SOURCE)
    assert load_data("sft_test_data:good").name == "mine"
    for name, message in {
        "once": "The train data is a generator, which can be read only once",
        "unbroken": "returned list; an sft.Data is wanted",
        "empty": "The calibration data is empty",
        "infinite": "holds NaN or infinite",
        "unlike": "All splits must agree",
        "goood": "Did you mean 'good'",
    }.items():
        with pytest.raises(InputError, match=message):
            load_data(f"sft_test_data:{name}")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("fashion-mnst", "Did you mean 'fashion-mnist'"),
        ("cifar", "Known forms: .*imagefolder:DIR.*npz:FILE"),
        ("sft_test_nowhere:data", "there is no module"),
        ("npz:nowhere.npz", "There is no data file 'nowhere.npz'"),
        ("imagefolder:nowhere", "There is no folder 'nowhere'"),
    ],
)
def test_references_that_do_not_work(reference: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_data(reference)
