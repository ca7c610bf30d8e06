"""A histogram of batches against numpy, against itself in another order, and as input of `mse`."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sft.core.errors import InputError
from sft.quantizers.histogram import BINS, Histogram
from sft.quantizers.linear import affine_parameters
from sft.quantizers.ranges import ranges


def observed(*batches: Tensor) -> Histogram:
    histogram = Histogram()
    for batch in batches:
        histogram.add(batch)
    return histogram


def same(one: Histogram, two: Histogram) -> None:
    assert (one.low, one.high, one.zeros, one.count) == (two.low, two.high, two.zeros, two.count)
    means, counts = zip(one.values_and_counts(), two.values_and_counts(), strict=True)
    assert torch.equal(*counts)
    slack = 1e-12 * max(one.high, -one.low)  # of sums within a bin
    torch.testing.assert_close(*means, rtol=1e-9, atol=slack)


def made(kind: str, seed: int) -> list[Tensor]:
    """Four batches of different scale."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(4, 20_000, generator=generator)
    uniform = torch.rand(4, 20_000, generator=generator) - 0.3
    centred = uniform - 0.2
    laplace = -centred.sign() * (1 - 2 * centred.abs()).clamp(min=1e-7).log()
    data = {"normal": normal, "relu": normal.relu(), "laplace": laplace, "uniform": uniform}[kind]
    return [batch * scale for batch, scale in zip(data, (0.1, 1.0, 0.5, 3.0), strict=True)]


values = st.floats(width=32, allow_nan=False, allow_infinity=False) | st.sampled_from(
    [0.0, -0.0, 1.0, 2.0**-20, -1.0]
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(values, max_size=8), max_size=4), st.data())
def test_any_order_and_any_split_count_the_same(
    batches: list[list[float]], draw: st.DataObject
) -> None:
    tensors = [torch.tensor(batch) for batch in batches]
    together = observed(torch.cat([torch.zeros(0), *tensors]))
    shuffled = draw.draw(st.permutations(tensors))
    same(observed(*shuffled), together)
    cut = draw.draw(st.integers(0, len(shuffled)))
    one, two = observed(*shuffled[:cut]), observed(*shuffled[cut:])
    before = copy.deepcopy(two)
    one.merge(two)
    same(one, together)
    same(two, before)


@settings(max_examples=100, deadline=None)
@given(st.lists(values, min_size=1, max_size=40))
def test_counts_extremes_and_zeros_are_exact(drawn: list[float]) -> None:
    x = torch.tensor(drawn)
    histogram = observed(x)
    places, counts = histogram.values_and_counts()
    assert places.shape == counts.shape == (1, BINS + 3)
    assert histogram.count == counts.sum() == x.numel()
    assert bool((counts >= 0).all())
    assert histogram.zeros == int((x == 0).sum()) == int(counts[0, BINS])
    assert histogram.low == min(0.0, float(x.min()))
    assert histogram.high == max(0.0, float(x.max()))
    present = places[counts > 0]
    assert min(0.0, float(present.min())) == histogram.low
    assert max(0.0, float(present.max())) == histogram.high
    mean = (places * counts).sum() / x.numel()
    torch.testing.assert_close(mean, x.double().mean(), rtol=1e-9, atol=1e-12 * x.abs().max())


def test_bins_hold_what_numpy_counts_between_their_edges() -> None:
    x = torch.cat(made("normal", 0)).double()
    histogram = observed(*made("normal", 0))
    width = 2.0**-6  # of 2,048 bins, about the data from -12.5 to 13
    edges = np.arange(np.floor(float(x.min()) / width), np.ceil(float(x.max()) / width) + 1) * width
    assert BINS / 2 <= len(edges) <= BINS + 1
    wanted, _ = np.histogram(x.numpy(), edges)
    places, counts = histogram.values_and_counts()
    got, _ = np.histogram(places[0].numpy(), edges, weights=counts[0].numpy())
    assert np.array_equal(got, wanted)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["normal", "relu", "laplace", "uniform"])
def test_the_mse_range_is_as_good_as_that_of_all_data(kind: str, bits: int) -> None:
    batches = made(kind, 1)
    data = torch.cat(batches)[None].double()
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def error(low: Tensor, high: Tensor) -> float:
        scale, zero = affine_parameters(low, high, qmin, qmax)
        q = ((data / scale).round() + zero).clamp(qmin, qmax)
        return float(((q - zero) * scale - data).square().sum())

    whole = ranges["mse"](data, None, qmin, qmax, False)
    binned = ranges["mse"](*observed(*batches).values_and_counts(), qmin, qmax, False)
    assert error(*binned) <= 1.02 * error(*whole)


def test_minmax_of_a_histogram_is_exact() -> None:
    x = torch.tensor([0.3, -1.7, 0.123456789, 5.4321])
    low, high = ranges["minmax"](*observed(x).values_and_counts(), -128, 127, False)
    assert (float(low), float(high)) == (float(x.min()), float(x.max()))


def test_large_tensors_are_counted_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    x = made("relu", 2)[1].reshape(100, 200)
    whole = observed(x)
    monkeypatch.setattr("sft.quantizers.histogram.CHUNK", 700)
    same(observed(x), whole)


def test_an_empty_histogram_has_the_range_zero() -> None:
    places, counts = observed(torch.zeros(0, 3)).values_and_counts()
    assert not counts.any()
    assert [float(e) for e in ranges["mse"](places, counts, -128, 127, False)] == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_and_gradients(dtype: torch.dtype) -> None:
    x = torch.tensor([[1.0, -2.0], [0.0, 0.5]], dtype=dtype, requires_grad=True)
    histogram = observed(x)
    assert (histogram.low, histogram.high, histogram.zeros, histogram.count) == (-2.0, 1.0, 1, 4)
    assert not histogram.values_and_counts()[0].requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_and_nothing_is_counted(bad: float) -> None:
    histogram = observed(torch.ones(2))
    with pytest.raises(InputError, match=r"shape \(1, 2\)"):
        histogram.add(torch.tensor([[1.0, bad]]))
    same(histogram, observed(torch.ones(2)))


def test_integers_are_refused() -> None:
    with pytest.raises(InputError, match=r"torch\.int64"):
        Histogram().add(torch.ones(2, dtype=torch.int64))
