"""Slices of batches: together they are the whole, or all of one length."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sft.core import shards
from sft.core.data import Batches, Data, fingerprint_data, length_of
from sft.core.errors import InputError
from sft.core.shards import Shard, shared_out, whole_of


def slices(loader: object, processes: int, equal: bool) -> list[list]:
    """What each of so many processes reads."""
    read = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "world", lambda: processes)
        for number in range(processes):
            patch.setattr(shards, "rank", lambda n=number: n)
            read.append(list(Shard(loader, equal).parts()))
    return read


@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(1, 4), st.booleans())
def test_slices_cover_the_batches(sizes: list[int], processes: int, equal: bool) -> None:
    numbers = iter(range(99))
    batches = [(torch.tensor([next(numbers) for _ in range(n)]), list(range(n))) for n in sizes]
    read = slices(batches, processes, equal)
    for x, targets in batches:
        own = [p for parts in read for p in parts if set(p.batch[0].tolist()) <= set(x.tolist())]
        seen = torch.cat([p.batch[0] for p in own]) if own else x[:0]
        left_out = len(x) % processes if equal else 0
        assert torch.equal(seen, x[: len(x) - left_out])
        assert [t for p in own for t in p.batch[1]] == targets[: len(x) - left_out]
        lengths = {p.count for p in own}
        assert (
            len(lengths) <= 1 if equal else all(abs(a - b) <= 1 for a in lengths for b in lengths)
        )
        assert all(torch.equal(p.batch[0], x[p.first : p.first + p.count]) for p in own)
        assert all(p.whole == len(x) for p in own)


def test_augmentation_is_drawn_alike_in_all() -> None:
    x = torch.arange(8.0)[:, None]
    loader = Batches(x, None, 8, shuffle=True, transform=lambda b: b + torch.rand(len(b), 1))
    torch.manual_seed(0)
    (whole,) = loader

    class Seeded:
        def __iter__(self) -> Iterator[torch.Tensor]:
            torch.manual_seed(0)
            yield from loader

    read = slices(Seeded(), 2, equal=True)
    assert torch.equal(torch.cat([parts[0].batch for parts in read]), whole)


def test_what_cannot_be_divided_is_named() -> None:
    for strange in ((torch.zeros(4, 1), 7), (torch.zeros(4, 1), [1, 2])):
        with pytest.raises(InputError, match="cannot be divided"):
            slices([strange], 2, equal=True)


def test_test_data_stays_whole_and_training_slices_are_equal(monkeypatch) -> None:
    data = Data([torch.zeros(3, 1)], None, [torch.ones(3, 1)], [torch.ones(5, 1)])
    assert shared_out(data) is data
    monkeypatch.setattr(shards, "is_distributed", lambda: True)
    found = shared_out(data)
    assert found.test is data.test
    assert whole_of(found.validation) is data.validation
    train = found.split("train")[0]
    assert isinstance(train, Shard)
    assert train.equal
    assert not found.calibration.equal
    assert length_of(found.calibration) == 1
    assert fingerprint_data(found.calibration) == fingerprint_data(data.calibration)
