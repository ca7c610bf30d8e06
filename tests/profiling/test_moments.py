"""Streamed moments against those of all columns at once."""

import pytest
import torch

from sft.profiling import moments
from sft.profiling.moments import Moments, pieces
from sft.profiling.patches import draw


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("shape", [(5, 6, 1), (1, 6, 40), (4, 6, 11)])
def test_equal_to_all_columns_at_once(shape: tuple[int, ...], pooled: bool, monkeypatch) -> None:
    monkeypatch.setattr(moments, "CHUNK", 50)
    monkeypatch.setattr(moments, "BLOCK", 2)
    torch.manual_seed(0)
    batches = [torch.randn(shape).double() + level for level in (0.0, 0.1, 500.0, -3.0)]
    found = Moments(2, 3, torch.device("cpu"), torch.float64, pooled=pooled)
    for x in batches:
        found.add(pieces(x), x.mean((0, 2)).view(2, 3))
    rows = torch.cat([x.transpose(0, 1).flatten(1) for x in batches], 1).view(2, 3, -1)
    wanted = torch.stack([torch.cov(r, correction=0) for r in rows])
    torch.testing.assert_close(found.mean(), rows.mean(2))
    torch.testing.assert_close(found.covariance(), wanted.mean(0, True) if pooled else wanted)
    assert found.count == rows.shape[2]


def test_pieces_hold_every_column_once(monkeypatch) -> None:
    monkeypatch.setattr(moments, "CHUNK", 24)
    for shape in ((7, 4, 3), (2, 4, 13), (9, 4, 1), (2, 30, 5)):
        x = torch.arange(torch.Size(shape).numel()).view(shape)
        found = list(pieces(x))
        assert sorted(torch.cat([p.flatten() for p in found]).tolist()) == x.flatten().tolist()
        assert all(p.numel() <= max(24, shape[1]) for p in found)


def test_moments_about_zero() -> None:
    x = torch.randn(3, 4, 5) + 2
    found = Moments(1, 4, torch.device("cpu"), torch.float32, centred=False)
    found.add(pieces(x))
    rows = x.transpose(0, 1).flatten(1).double()
    torch.testing.assert_close(found.covariance()[0], rows @ rows.T / 15, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("total", "limit"), [(10, 9), (100, 7), (97, 96), (1000, 64)])
def test_drawn_positions(total: int, limit: int) -> None:
    generator = torch.Generator().manual_seed(0)
    seen = torch.zeros(total)
    for _ in range(4000):
        found = draw(total, limit, generator)
        assert found is not None
        assert len(found) == limit == len(found.unique())
        assert torch.equal(found, found.sort().values)
        seen[found] += 1
    wanted = 4000 * limit / total  # each is equally likely
    assert float((seen - wanted).abs().max()) < 5.5 * wanted**0.5
    assert draw(total, total, generator) is None
    assert draw(total, None, generator) is None
