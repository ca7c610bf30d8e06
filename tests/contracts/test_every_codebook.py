"""What every registered codebook must keep, for any weight."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sft.core.errors import InputError
from sft.quantizers.codebook import codebooks, decode

every = pytest.mark.parametrize("name", list(codebooks))
FLOAT32_MAX = torch.finfo(torch.float32).max


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """Float32 tensors of 0 to 4 axes, any magnitude, often one-signed or with zeros."""
    shape = draw(st.lists(st.integers(1, 5), max_size=4))
    count = int(torch.tensor(shape).prod())
    value = st.floats(-1, 1, width=32) | st.sampled_from([0.0, 1.0, -1.0])
    values = draw(st.lists(value, min_size=count, max_size=count))
    offset = draw(st.sampled_from([0.0, 2.0, -2.0]))
    size = draw(st.sampled_from([1e-30, 1e-3, 1.0, 1e30]))
    return ((torch.tensor(values) + offset) * size).reshape(shape)


@every
@given(weight=weights(), bits=st.integers(2, 8))
@settings(max_examples=60, deadline=None)
def test_every_weight_takes_the_nearest_level(name: str, weight: Tensor, bits: int) -> None:
    before = weight.clone()
    indices, codebook = codebooks[name](weight, bits)
    assert torch.equal(weight, before)
    assert (indices.dtype, indices.shape) == (torch.uint8, weight.shape)
    assert (codebook.dtype, codebook.shape) == (torch.float32, (2**bits,))
    assert bool((codebook.diff() >= 0).all())
    assert bool((codebook == 0).any())
    back = decode(indices, codebook)
    assert back.shape == weight.shape
    assert bool((back[weight == 0] == 0).all())
    gaps = (weight.double()[..., None] - codebook.double()).abs()
    least = gaps.min(-1).values
    torch.testing.assert_close((weight.double() - back.double()).abs(), least, rtol=1e-12, atol=0)
    assert float((back.double() - weight).square().sum()) <= float(weight.double().square().sum())


@every
def test_it_is_deterministic_and_leaves_the_global_generator(name: str) -> None:
    weight = torch.randn(300, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    first, second = (codebooks[name](weight, 4) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@every
def test_more_bits_lose_less(name: str) -> None:
    weight = torch.randn(2000, generator=torch.Generator().manual_seed(1))
    errors = [
        float((decode(*codebooks[name](weight, bits)) - weight).square().sum()) for bits in (2, 3)
    ]
    assert errors[1] < errors[0]


@every
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (4, 2)])
@pytest.mark.parametrize("value", [0.0, 1e-45, -1e-40, 2.0**100, -(2.0**-20)])
def test_constant_and_empty_weights_are_exact(
    name: str, value: float, shape: tuple[int, ...]
) -> None:
    weight = torch.full(shape, value)
    indices, codebook = codebooks[name](weight, 2)
    back = decode(indices, codebook)
    assert back.shape == shape
    exact = name != "power_of_two" or value != -1e-40
    assert torch.equal(back, weight) or not exact
    assert bool(torch.isfinite(codebook).all())


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_huge_weights_stay_finite_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    limit = torch.finfo(dtype).max
    weight = torch.tensor([-limit, 0.0, limit, limit / 3], dtype=dtype)
    indices, codebook = codebooks[name](weight, 8)
    assert codebook.dtype == torch.promote_types(dtype, torch.float32)
    assert bool(torch.isfinite(codebook).all())
    back = decode(indices, codebook)
    assert float((back[2] / 2).abs() / limit) == pytest.approx(0.5, rel=0.51)
    assert float(back[1]) == 0


@every
def test_gradients_are_not_kept(name: str) -> None:
    weight = torch.randn(9, requires_grad=True)
    assert not codebooks[name](weight, 3)[1].requires_grad


@every
def test_wrong_weights_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"1 NaN and 0 infinite.*\(1,\)"):
        codebooks[name](torch.tensor([1.0, float("nan")]), 4)
    with pytest.raises(InputError, match="num_bits is 9"):
        codebooks[name](torch.ones(2), 9)
    with pytest.raises(InputError, match=r"torch\.int64"):
        codebooks[name](torch.ones(2, dtype=torch.int64), 4)
