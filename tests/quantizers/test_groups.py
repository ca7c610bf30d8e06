"""Linear quantisation with a scale for each group: the properties of `test_linear`, by group."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sft.core.errors import InputError
from sft.quantizers import dequantize_weight, quantize_weight
from sft.quantizers.groups import cut_groups, join_groups
from sft.quantizers.linear import round_trip


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """Float32 tensors of 1 to 4 axes, any magnitude, often one-signed or with zeros."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    count = int(torch.tensor(shape).prod())
    value = st.floats(-1, 1, width=32) | st.sampled_from([0.0, 1.0, -1.0])
    values = draw(st.lists(value, min_size=count, max_size=count))
    offset = draw(st.sampled_from([0.0, 2.0, -2.0]))
    size = draw(st.sampled_from([1e-30, 1e-3, 1.0, 1e30]))
    return ((torch.tensor(values) + offset) * size).reshape(shape)


@settings(max_examples=150, deadline=None)
@given(weights(), st.integers(2, 8), st.booleans(), st.integers(1, 7), st.data())
def test_each_group_is_quantised_on_its_own(
    weight: Tensor, bits: int, symmetric: bool, group_size: int, draw: st.DataObject
) -> None:
    axis = draw.draw(st.integers(-weight.ndim, weight.ndim - 1))
    before = weight.clone()
    options = {"axis": axis, "group_size": group_size}
    q, scale, zero_point = quantize_weight(weight, bits, symmetric=symmetric, **options)
    assert torch.equal(weight, before)
    assert (q.dtype, q.shape, zero_point.dtype) == (torch.int8, weight.shape, torch.int64)
    rows = weight.movedim(axis, 0).reshape(weight.shape[axis], -1)
    integers = q.movedim(axis, 0).reshape(rows.shape)
    groups = -(-rows.shape[1] // group_size)
    assert scale.shape == zero_point.shape == (len(rows), groups)
    for row in range(len(rows)):
        for group in range(groups):
            part = slice(group * group_size, (group + 1) * group_size)
            alone = quantize_weight(rows[row, part], bits, symmetric=symmetric)
            got = integers[row, part], scale[row, group], zero_point[row, group]
            assert all(torch.equal(a, b) for a, b in zip(got, alone, strict=True))


@settings(max_examples=100, deadline=None)
@given(weights(), st.integers(2, 8), st.booleans(), st.integers(1, 7))
def test_error_is_at_most_half_a_step(
    weight: Tensor, bits: int, symmetric: bool, group_size: int
) -> None:
    q, scale, zero_point = quantize_weight(weight, bits, symmetric=symmetric, group_size=group_size)
    back = dequantize_weight(q, scale, zero_point, group_size=group_size)
    entries = weight[0].numel()
    steps = scale.repeat_interleave(group_size, dim=1)[:, :entries].reshape(weight.shape).double()
    slack = 1e-5 * weight.abs().max().double()
    assert bool(((back.double() - weight.double()).abs() <= 0.5 * steps + slack).all())
    assert bool((back[weight == 0] == 0).all())
    again = round_trip(weight, bits, symmetric=symmetric, group_size=group_size)
    assert torch.equal(back, again)


def test_small_groups_lose_less_than_channels() -> None:
    weight = torch.randn(4, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    errors = [
        float((round_trip(weight, 3, axis=0, group_size=g) - weight).norm()) for g in (None, 18, 5)
    ]
    assert errors[0] > 1.1 * errors[1] > 1.2 * errors[2]


def test_a_group_of_a_whole_row_is_a_channel() -> None:
    weight = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0))
    grouped = quantize_weight(weight, 4, axis=1, group_size=100)
    whole = quantize_weight(weight, 4, axis=1)
    assert torch.equal(grouped[0], whole[0])
    assert torch.equal(grouped[1][:, 0], whole[1])


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
@pytest.mark.parametrize("group_size", [1, 4, 7, 100])
def test_joining_undoes_cutting(axis: int, group_size: int) -> None:
    tensor = torch.arange(60.0).reshape(3, 4, 5)
    groups = cut_groups(tensor, axis, group_size)
    assert torch.equal(join_groups(groups, tensor.shape, axis), tensor)
    assert float(groups.sum()) == float(tensor.sum())


@pytest.mark.parametrize(("shape", "scales"), [((0, 3), (0, 2)), ((3, 0), (3, 0)), ((4,), (4, 1))])
def test_empty_and_flat_weights(shape: tuple[int, ...], scales: tuple[int, int]) -> None:
    q, scale, zero_point = quantize_weight(torch.zeros(shape), group_size=2)
    assert q.shape == shape
    assert scale.shape == zero_point.shape == scales
    assert dequantize_weight(q, scale, zero_point, group_size=2).shape == shape


def test_wrong_input_is_refused() -> None:
    weight = torch.ones(2, 3)
    weight[1, 2] = float("nan")
    with pytest.raises(InputError, match=r"shape \(2, 3\) holds 1 NaN .*\(1, 2\)"):
        quantize_weight(weight, group_size=2)
    with pytest.raises(InputError, match="group_size is 0"):
        quantize_weight(torch.ones(2, 3), group_size=0)
    with pytest.raises(InputError, match="axis is 2"):
        quantize_weight(torch.ones(2, 3), axis=2, group_size=2)
    with pytest.raises(InputError, match="has 0 axes"):
        quantize_weight(torch.ones(()), group_size=2)


def test_dequantize_needs_the_group_size_of_the_scale() -> None:
    q, scale, zero_point = quantize_weight(torch.ones(2, 6), group_size=2)
    with pytest.raises(InputError, match=r"group_size=3 need \(2, 2\)"):
        dequantize_weight(q, scale, zero_point, group_size=3)
    with pytest.raises(InputError, match=r"scale has shape \(2, 3\)"):
        dequantize_weight(q, scale, zero_point, axis=0)
