"""Linear quantisation: its error bound, its degenerate tensors, and PyTorch as a reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sft.core.errors import InputError
from sft.quantizers import dequantize_weight, quantize_weight
from sft.quantizers.linear import affine_parameters, round_trip, symmetric_scale

FLOAT32_MAX = torch.finfo(torch.float32).max
both = pytest.mark.parametrize("symmetric", [False, True])


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """Float32 tensors of 1 to 4 axes, any magnitude, often one-signed or with zeros."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    count = int(torch.tensor(shape).prod())
    values = draw(
        st.lists(
            st.floats(-1, 1, width=32) | st.sampled_from([0.0, 1.0, -1.0]),
            min_size=count,
            max_size=count,
        )
    )
    size = draw(st.sampled_from([1e-30, 1e-3, 1.0, 1e4, 1e30]))
    offset = draw(st.sampled_from([0.0, 2.0, -2.0]))
    return ((torch.tensor(values) + offset) * size).reshape(shape)


@settings(max_examples=100, deadline=None)
@given(weights(), st.integers(2, 8), st.booleans(), st.booleans())
def test_error_is_at_most_half_a_step(
    weight: Tensor, bits: int, symmetric: bool, per_channel: bool
) -> None:
    axis = weight.ndim - 1 if per_channel else None
    q, scale, zero_point = quantize_weight(weight, bits, symmetric=symmetric, axis=axis)
    qmax = 2 ** (bits - 1) - 1
    qmin = -qmax if symmetric else -qmax - 1
    assert (q.dtype, q.shape, zero_point.dtype) == (torch.int8, weight.shape, torch.int64)
    assert q.min() >= qmin
    assert q.max() <= qmax
    assert zero_point.min() >= qmin
    assert zero_point.max() <= qmax
    assert not symmetric or not zero_point.any()
    assert (scale > 0).all()
    back = dequantize_weight(q, scale, zero_point, axis=axis)
    slack = 1e-5 * weight.abs().max().double()
    assert ((back.double() - weight.double()).abs() <= 0.5 * scale.double() + slack).all()
    assert (back[weight == 0] == 0).all()
    assert torch.equal(back, round_trip(weight, bits, symmetric=symmetric, axis=axis))


@settings(max_examples=60, deadline=None)
@given(weights(), st.integers(2, 8), st.booleans())
def test_all_levels_are_used(weight: Tensor, bits: int, symmetric: bool) -> None:
    """The scale is the smallest that holds the range (a larger one would pass the half step)."""
    _, scale, _ = quantize_weight(weight, bits, symmetric=symmetric)
    lo, hi = min(0.0, float(weight.min())), max(0.0, float(weight.max()))
    if lo == hi:
        assert scale == 1
    elif max(hi, -lo) > 1e-35:
        steps = max(hi, -lo) / (2 ** (bits - 1) - 1) if symmetric else (hi - lo) / (2**bits - 1)
        assert float(scale) == pytest.approx(steps, rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(weights(), st.booleans())
def test_per_channel_is_per_tensor_on_each_channel(weight: Tensor, symmetric: bool) -> None:
    q, scale, zero_point = quantize_weight(weight, 5, symmetric=symmetric, axis=0)
    for index, channel in enumerate(weight):
        alone = quantize_weight(channel, 5, symmetric=symmetric)
        for whole, single in zip((q[index], scale[index], zero_point[index]), alone, strict=True):
            assert torch.equal(whole, single)


def test_default_is_affine_eight_bits_per_tensor() -> None:
    q, scale, zero_point = quantize_weight(torch.tensor([-1.0, 0.0, 1.55]))
    assert q.tolist() == [-128, -28, 127]
    assert float(scale) == pytest.approx(0.01)
    assert (int(zero_point), scale.shape, zero_point.shape) == (-28, (), ())


def test_symmetric_leaves_out_the_lowest_integer() -> None:
    q, scale, zero_point = quantize_weight(torch.tensor([-1.4, 0.7]), 4, symmetric=True)
    assert (q.tolist(), int(zero_point)) == ([-7, 4], 0)
    assert float(scale) == pytest.approx(0.2)


@both
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_equals_torch_fake_quantize_per_tensor(bits: int, symmetric: bool) -> None:
    weight = torch.randn(40, 30, generator=torch.Generator().manual_seed(3)) - 0.2
    q, scale, zero_point = quantize_weight(weight, bits, symmetric=symmetric)
    qmax = 2 ** (bits - 1) - 1
    reference = torch.fake_quantize_per_tensor_affine(
        weight, float(scale), int(zero_point), -qmax if symmetric else -qmax - 1, qmax
    )
    assert torch.equal(q, torch.round(reference / scale).to(torch.int8) + zero_point)
    back = dequantize_weight(q, scale, zero_point)
    torch.testing.assert_close(back, reference, rtol=1e-6, atol=0)


@both
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_equals_torch_fake_quantize_per_channel(bits: int, axis: int, symmetric: bool) -> None:
    weight = torch.randn(6, 4, 3, 5, generator=torch.Generator().manual_seed(4)) + 0.3
    _, scale, zero_point = quantize_weight(weight, bits, symmetric=symmetric, axis=axis)
    assert scale.shape == zero_point.shape == (weight.shape[axis],)
    qmax = 2 ** (bits - 1) - 1
    reference = torch.fake_quantize_per_channel_affine(
        weight, scale, zero_point.int(), axis % 4, -qmax if symmetric else -qmax - 1, qmax
    )
    ours = round_trip(weight, bits, symmetric=symmetric, axis=axis)
    torch.testing.assert_close(ours, reference, rtol=1e-6, atol=1e-7)


@both
def test_zeros_have_scale_one(symmetric: bool) -> None:
    weight = torch.zeros(2, 3)
    weight[1, 0] = 5.0
    q, scale, zero_point = quantize_weight(weight, symmetric=symmetric, axis=0)
    assert scale[0] == 1
    assert scale[1] < 1
    assert torch.equal(dequantize_weight(q, scale, zero_point, axis=0)[0], torch.zeros(3))


@both
@pytest.mark.parametrize("value", [3.7, -3.7])
@pytest.mark.parametrize("shape", [(), (1,), (4, 2)])
def test_constant_is_exact(value: float, shape: tuple[int, ...], symmetric: bool) -> None:
    weight = torch.full(shape, value)
    torch.testing.assert_close(round_trip(weight, 2, symmetric=symmetric), weight)


@both
@pytest.mark.parametrize(("shape", "axis"), [((0,), None), ((0, 3), 0), ((3, 0), 0), ((0, 3), 1)])
def test_empty(shape: tuple[int, ...], axis: int | None, symmetric: bool) -> None:
    q, scale, zero_point = quantize_weight(torch.zeros(shape), symmetric=symmetric, axis=axis)
    assert (q.shape, q.dtype) == (shape, torch.int8)
    assert scale.shape == zero_point.shape == (() if axis is None else (shape[axis],))
    assert (scale == 1).all()
    assert dequantize_weight(q, scale, zero_point, axis=axis).shape == shape


@both
@pytest.mark.parametrize("size", [1e-45, 1e-40, 3e-37])
def test_denormal_range_keeps_a_normal_scale(size: float, symmetric: bool) -> None:
    weight = torch.tensor([size, -size / 2, 0.0])
    q, scale, zero_point = quantize_weight(weight, symmetric=symmetric)
    assert scale >= torch.finfo(torch.float32).tiny
    error = (dequantize_weight(q, scale, zero_point) - weight).abs()
    assert (error.double() <= 0.5001 * scale.double()).all()


@both
@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("lowest", [-FLOAT32_MAX, -FLOAT32_MAX / 3, 0.0])
def test_huge_stays_finite(lowest: float, bits: int, symmetric: bool) -> None:
    weight = torch.tensor([lowest, 0.0, FLOAT32_MAX])
    q, scale, zero_point = quantize_weight(weight, bits, symmetric=symmetric)
    back = dequantize_weight(q, scale, zero_point)
    assert torch.isfinite(scale)
    assert torch.isfinite(back).all()
    assert back[1] == 0
    assert ((back.double() - weight.double()).abs() <= 0.5001 * scale.double()).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_keep_their_accuracy(dtype: torch.dtype) -> None:
    weight = (torch.randn(50, generator=torch.Generator().manual_seed(5)) * 1e-3).to(dtype)
    q, scale, zero_point = quantize_weight(weight)
    assert scale.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    error = dequantize_weight(q, scale, zero_point).double() - weight.double()
    assert (error.abs() <= 0.5001 * scale.double()).all()
    assert round_trip(weight).dtype == dtype
    assert torch.isfinite(round_trip(torch.tensor([-3e4, 6.55e4]).to(dtype), 3)).all()


def test_the_weight_is_not_changed_and_no_gradient_is_kept() -> None:
    weight = torch.randn(3, 4, requires_grad=True)
    before = weight.detach().clone()
    back = round_trip(weight, 4, axis=0)
    assert torch.equal(weight, before)
    assert not back.requires_grad


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1.0, float("nan")], r"1 NaN and 0 infinite.*\(1,\)"),
        ([-float("inf"), 1.0], r"0 NaN and 1 infinite.*\(0,\)"),
    ],
)
def test_values_without_a_range_are_refused(values: list[float], words: str) -> None:
    with pytest.raises(InputError, match=words):
        quantize_weight(torch.tensor(values))


@pytest.mark.parametrize("bits", [-1, 1, 9, 16])
def test_other_bit_widths_are_refused(bits: int) -> None:
    with pytest.raises(InputError, match=f"num_bits is {bits}"):
        quantize_weight(torch.ones(2), bits)


@pytest.mark.parametrize("axis", [2, -3])
def test_a_wrong_axis_is_refused(axis: int) -> None:
    with pytest.raises(InputError, match=f"axis is {axis}"):
        quantize_weight(torch.ones(2, 3), axis=axis)


def test_integers_are_refused() -> None:
    with pytest.raises(InputError, match=r"torch\.int64"):
        quantize_weight(torch.ones(2, dtype=torch.int64))


def test_dequantize_needs_the_axis_of_the_scale() -> None:
    q, scale, zero_point = quantize_weight(torch.randn(3, 3), axis=0)
    with pytest.raises(InputError, match=r"scale has shape \(3,\)"):
        dequantize_weight(q, scale, zero_point)


def test_affine_parameters_widen_to_zero() -> None:
    lo, hi = torch.tensor([1.0, -2.0, -1.0]), torch.tensor([2.0, -1.0, 2.0])
    scale, zero_point = affine_parameters(lo, hi, 0, 255)
    torch.testing.assert_close(scale, torch.tensor([2.0, 2.0, 3.0]) / 255)
    assert zero_point.tolist() == [0, 255, 85]


def test_symmetric_scale_is_the_largest_magnitude_over_qmax() -> None:
    weight = torch.tensor([[1.0, -6.0], [3.0, 0.0]])
    assert float(symmetric_scale(weight, 3)) == 2.0
    assert symmetric_scale(weight, 3, 0).tolist() == [2.0, 1.0]
    assert symmetric_scale(weight, 3, 1).tolist() == [1.0, 2.0]
