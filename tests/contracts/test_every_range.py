"""What every registered range must keep, for any rows, with counts and without."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sft.core.errors import InputError
from sft.quantizers.linear import affine_parameters
from sft.quantizers.ranges import ranges, weight_scale

NAMES = list(ranges)
FLOAT32_MAX = torch.finfo(torch.float32).max
every = pytest.mark.parametrize("name", NAMES)
both = pytest.mark.parametrize("symmetric", [False, True])


def integers(bits: int, symmetric: bool) -> tuple[int, int, bool]:
    top = 2 ** (bits - 1) - 1
    return (-top if symmetric else -top - 1), top, symmetric


@st.composite
def tables(draw: st.DrawFn) -> Tensor:
    """Rows of any magnitude, often one-signed, with zeros and repeated values."""
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    value = st.floats(-1, 1, width=32) | st.sampled_from([0.0, 1.0, -1.0])
    values = draw(st.lists(value, min_size=rows * columns, max_size=rows * columns))
    offset = draw(st.sampled_from([0.0, 2.0, -2.0]))
    return ((torch.tensor(values) + offset) * 10.0 ** draw(st.integers(-30, 30))).reshape(rows, -1)


def counts_for(values: Tensor, draw: st.DataObject) -> Tensor:
    size = values.numel()
    drawn = draw.draw(st.lists(st.integers(0, 4), min_size=size, max_size=size))
    return torch.tensor(drawn, dtype=torch.float32).reshape(values.shape)


@every
@given(values=tables(), bits=st.integers(2, 8), symmetric=st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_range_holds_zero_and_stays_within_the_values(
    name: str, values: Tensor, bits: int, symmetric: bool
) -> None:
    before = values.clone()
    low, high = ranges[name](values, None, *integers(bits, symmetric))
    assert torch.equal(values, before)
    assert low.shape == high.shape == (len(values),)
    assert (low.dtype, high.dtype) == (torch.float32, torch.float32)
    assert bool((low <= 0).all())
    assert bool((high >= 0).all())
    assert bool((torch.maximum(-low, high) <= values.abs().amax(1)).all())
    if symmetric:
        assert torch.equal(low, -high)
    else:
        assert bool((low >= values.amin(1).clamp(max=0)).all())
        assert bool((high <= values.amax(1).clamp(min=0)).all())
    scale, _ = affine_parameters(low, high, -128, 127)
    assert bool(torch.isfinite(scale).all())
    moving = values.abs().amax(1) > 1e-30
    assert bool((high - low > 0)[moving].all())


@every
@given(values=tables(), symmetric=st.booleans())
@settings(max_examples=30, deadline=None)
def test_each_row_is_on_its_own(name: str, values: Tensor, symmetric: bool) -> None:
    low, high = ranges[name](values, None, *integers(4, symmetric))
    for index in range(len(values)):
        alone = ranges[name](values[index : index + 1], None, *integers(4, symmetric))
        torch.testing.assert_close(low[index : index + 1], alone[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(high[index : index + 1], alone[1], rtol=1e-6, atol=0)


@every
@both
def test_counts_are_repeated_values(name: str, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(1, 300, generator=generator, dtype=torch.float64)
    counts = torch.randint(0, 6, (1, 300), generator=generator)
    repeated = values[0].repeat_interleave(counts[0])[None]
    got = ranges[name](values, counts, *integers(4, symmetric))
    wanted = ranges[name](repeated, None, *integers(4, symmetric))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=0)
    plain = ranges[name](values, torch.ones_like(values), *integers(4, symmetric))
    torch.testing.assert_close(plain, ranges[name](values, None, *integers(4, symmetric)))


@every
@given(values=tables(), draw=st.data(), symmetric=st.booleans())
@settings(max_examples=30, deadline=None)
def test_values_without_a_count_do_not_widen_the_range(
    name: str, values: Tensor, draw: st.DataObject, symmetric: bool
) -> None:
    counts = counts_for(values, draw)
    low, high = ranges[name](values, counts, *integers(4, symmetric))
    seen = values * (counts > 0)
    assert bool((torch.maximum(-low, high) <= seen.abs().amax(1)).all())
    assert bool(((counts.sum(1) > 0) | (high == 0) & (low == 0)).all())


@every
@both
def test_the_range_scales_with_the_values(name: str, symmetric: bool) -> None:
    values = torch.randn(3, 200, generator=torch.Generator().manual_seed(2)) + 0.3
    low, high = ranges[name](values, None, *integers(4, symmetric))
    scaled = ranges[name](values * 2.0**40, None, *integers(4, symmetric))
    torch.testing.assert_close(scaled, (low * 2.0**40, high * 2.0**40))
    negated = ranges[name](-values, None, *integers(4, True))
    torch.testing.assert_close(negated, ranges[name](values, None, *integers(4, True)))


@every
@both
@pytest.mark.parametrize("value", [0.0, 3.7, -3.7, 1e-45, -1e-40, FLOAT32_MAX, -1e38])
@pytest.mark.parametrize("columns", [1, 5])
def test_constant_rows(name: str, value: float, columns: int, symmetric: bool) -> None:
    low, high = ranges[name](torch.full((2, columns), value), None, *integers(8, symmetric))
    assert bool(torch.isfinite(low).all() & torch.isfinite(high).all())
    if abs(value) in (0.0, 3.7):
        wanted = torch.full((2,), abs(value))
        torch.testing.assert_close(torch.maximum(-low, high), wanted, rtol=1e-3, atol=0)


@every
@both
def test_opposite_huge_values_stay_finite(name: str, symmetric: bool) -> None:
    values = torch.tensor([[-FLOAT32_MAX, 0.0, FLOAT32_MAX], [-1e-45, 1e-44, 3e-45]])
    low, high = ranges[name](values, None, *integers(8, symmetric))
    assert bool(torch.isfinite(low).all() & torch.isfinite(high).all())
    assert float(high[0]) > 3e38


@every
@both
@pytest.mark.parametrize("rows", [0, 2])
def test_empty_rows_have_the_range_zero(name: str, rows: int, symmetric: bool) -> None:
    low, high = ranges[name](torch.zeros(rows, 0), None, *integers(8, symmetric))
    assert low.tolist() == high.tolist() == [0.0] * rows
    assert ranges[name](torch.zeros(0, 4), None, *integers(8, symmetric))[0].shape == (0,)


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_is_at_least_float32(name: str, dtype: torch.dtype) -> None:
    low, high = ranges[name](torch.randn(2, 9).to(dtype), None, -7, 7, True)
    assert low.dtype == high.dtype == torch.promote_types(dtype, torch.float32)


@every
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(name: str, bad: float) -> None:
    values = torch.tensor([[1.0, 2.0], [bad, 0.0]])
    with pytest.raises(InputError, match=r"\(2, 2\).*index \(1, 0\)"):
        ranges[name](values, None, -7, 7, True)


@every
def test_wrong_input_is_refused(name: str) -> None:
    values = torch.ones(2, 3)
    with pytest.raises(InputError, match=r"counts have shape \(3,\)"):
        ranges[name](values, torch.ones(3), -7, 7, True)
    with pytest.raises(InputError, match="not negative"):
        ranges[name](values, -values, -7, 7, True)
    with pytest.raises(InputError, match=r"shape \(3,\)"):
        ranges[name](values[0], None, -7, 7, True)
    with pytest.raises(InputError, match="no range"):
        ranges[name](values, None, 7, -7, False)


@every
def test_weight_scale_is_that_of_the_named_range(name: str) -> None:
    rows = torch.randn(3, 50, generator=torch.Generator().manual_seed(3))
    rows[1] = 0
    scale = weight_scale(rows, 7, name)
    high = ranges[name](rows, None, -7, 7, True)[1]
    torch.testing.assert_close(scale, torch.where(high == 0, 1.0, high / 7))


def test_an_unknown_range_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match="minmax, mse, octav, percentile"):
        weight_scale(torch.ones(1, 2), 7, "kl")
