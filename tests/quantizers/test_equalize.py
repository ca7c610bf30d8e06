"""Cross-layer equalisation: equal ranges, the same network, and its degenerate channels."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sft.core.errors import InputError
from sft.quantizers.equalize import equalizing_scale
from sft.quantizers.linear import round_trip


def made(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_both_sides_of_a_channel_get_one_range(c: int, n: int, m: int, seed: int) -> None:
    first, second = made(c, n, seed=seed), made(c, m, seed=seed + 1)
    before = first.clone(), second.clone()
    scale = equalizing_scale(first, second)
    assert torch.equal(first, before[0])
    assert torch.equal(second, before[1])
    ranges = [(first / scale[:, None]).abs().amax(1), (second * scale[:, None]).abs().amax(1)]
    inside = (scale > 0.01) & (scale < 100)
    torch.testing.assert_close(ranges[0][inside], ranges[1][inside])
    again = equalizing_scale(first / scale[:, None], second * scale[:, None])
    torch.testing.assert_close(again[inside], torch.ones_like(again)[inside])
    torch.testing.assert_close(equalizing_scale(second, first), 1 / scale)


def test_the_network_stays_and_quantises_better() -> None:
    first, second, x = made(6, 8), made(6, 5, seed=1), made(8, 40, seed=2)
    spread = torch.logspace(-1.5, 1.5, 6, dtype=torch.float64)[:, None]
    first, second = first * spread, second / spread
    scale = equalizing_scale(first, second)[:, None]
    even = first / scale, second * scale

    def run(one: Tensor, two: Tensor) -> Tensor:
        return two.T @ torch.relu(one @ x)

    torch.testing.assert_close(run(*even), run(first, second))
    errors = [
        float((run(*(round_trip(w, 8) for w in pair)) - run(*pair)).norm())
        for pair in ((first, second), even)
    ]
    assert errors[1] < 0.2 * errors[0]


def test_by_hand() -> None:
    first = torch.tensor([[4.0, -1.0], [0.0, 0.0], [1.0, 2.0], [1e6, 0.0], [1e-6, 0.0]])
    second = torch.tensor([[-1.0], [3.0], [0.0], [1.0], [1.0]])
    assert equalizing_scale(first, second).tolist() == pytest.approx([2.0, 1.0, 1.0, 100.0, 0.01])


@pytest.mark.parametrize(("c", "n", "m"), [(0, 2, 3), (2, 0, 3), (2, 3, 0)])
def test_without_weights_the_scale_is_one(c: int, n: int, m: int) -> None:
    assert equalizing_scale(torch.ones(c, n), torch.ones(c, m)).tolist() == [1.0] * c


def test_extreme_ranges_stay_finite() -> None:
    top, least = torch.finfo(torch.float32).max, 1e-45
    scale = equalizing_scale(torch.tensor([[top], [least]]), torch.tensor([[least], [top]]))
    assert scale.tolist() == pytest.approx([100.0, 0.01])
    assert equalizing_scale(torch.ones(1, 1).half(), torch.ones(1, 1)).dtype == torch.float32


def test_wrong_rows_are_refused() -> None:
    good = torch.ones(2, 3)
    with pytest.raises(InputError, match="2 channels but the second reads 4"):
        equalizing_scale(good, torch.ones(4, 3))
    with pytest.raises(InputError, match=r"second layer's rows .* shape \(3,\)"):
        equalizing_scale(good, torch.ones(3))
    with pytest.raises(InputError, match=r"first layer's rows of shape \(1, 1\) hold NaN"):
        equalizing_scale(torch.tensor([[float("nan")]]), torch.ones(1, 1))
    with pytest.raises(InputError, match=r"torch\.int64"):
        equalizing_scale(torch.ones(2, 2, dtype=torch.int64), good)
