"""k-means against scipy and against linear quantisation; power-of-two levels by brute force."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.vq import kmeans2
from torch import Tensor

from sft.quantizers import codebook as module
from sft.quantizers.codebook import SortedValues, decode, kmeans, power_of_two
from sft.quantizers.linear import round_trip


def made(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def error_of(weight: Tensor, back: Tensor) -> float:
    return float((back.double() - weight.double()).square().sum())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=60), st.integers(2, 8))
def test_kmeans_is_never_worse_than_linear(values: list[float], bits: int) -> None:
    weight = torch.tensor(values)
    linear = error_of(weight, round_trip(weight, bits, symmetric=True))
    slack = 1e-12 * float(weight.double().square().sum())  # of the float32 codebook
    assert error_of(weight, decode(*kmeans(weight, bits))) <= linear + slack


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_kmeans_gains_on_heavy_tails(bits: int) -> None:
    weight = made(3000) * made(3000, 1).abs()
    linear = error_of(weight, round_trip(weight, bits, symmetric=True))
    assert error_of(weight, decode(*kmeans(weight, bits))) < 0.5 * linear


@pytest.mark.parametrize("bits", [2, 3, 5])
def test_kmeans_is_a_fixed_point_for_scipy(bits: int) -> None:
    """From our levels scipy's Lloyd step moves none but the one that is held at zero."""
    weight = made(2000).double()
    _, codebook = kmeans(weight, bits)
    moved, _ = kmeans2(weight.numpy(), codebook.numpy(), iter=1, minit="matrix", missing="raise")
    free = codebook.numpy() != 0
    assert free.sum() == 2**bits - 1
    np.testing.assert_allclose(moved[free], codebook.numpy()[free], rtol=1e-9)


def test_lloyd_is_scipys_from_the_same_start() -> None:
    weight = made(500).double()
    weight = torch.cat([weight, -weight, torch.zeros(1)])  # the mean of the middle stays zero
    start = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0], dtype=torch.float64)
    data = SortedValues(weight)
    got = module._improve(data, start / data.unit) * data.unit
    wanted, _ = kmeans2(weight.numpy(), start.numpy(), iter=100, minit="matrix")
    np.testing.assert_allclose(got.numpy(), wanted, atol=1e-9)
    assert not np.allclose(wanted, start.numpy(), atol=1e-2)


def test_the_error_of_levels_is_that_of_the_nearest_one() -> None:
    weight, levels = made(200), torch.tensor([-1.0, 0.0, 0.3, 0.4, 9.0], dtype=torch.float64)
    data = SortedValues(weight)
    nearest = (weight.double()[:, None] - levels * data.unit).square().min(dim=1).values.sum()
    assert data.error(levels) * data.unit**2 == pytest.approx(float(nearest), rel=1e-9)


def test_kmeans_keeps_few_different_values_exactly() -> None:
    levels = torch.tensor([-0.7, 0.0, 0.1, 2.3])
    weight = levels[torch.arange(40) % 4].reshape(5, 8)
    assert torch.equal(decode(*kmeans(weight, 3)), weight)


def test_each_start_has_its_weights() -> None:
    """Levels that follow the density suit many values, the grid far outliers at many bits."""
    normal, few = made(20_000), made(3000)
    for weight, share in ((normal, 0.7), (few * few.abs(), 0.8)):
        linear = error_of(weight, round_trip(weight, 8, symmetric=True))
        assert error_of(weight, decode(*kmeans(weight, 8))) < share * linear


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("size", [1.0, 3.3, 1e-4])
def test_power_of_two_is_the_best_of_all_top_exponents(bits: int, size: float) -> None:
    weight = made(400).double() * size
    indices, codebook = power_of_two(weight, bits)
    positive = codebook[codebook > 0]
    assert positive.numel() == 2 ** (bits - 1) - 1
    exponents = positive.log2()
    assert torch.equal(exponents, exponents.round())
    assert bool((exponents.diff() == 1).all())
    assert torch.equal(codebook, -codebook.flip(0))
    errors = []
    for top in range(-25, 6):
        powers = 2.0 ** torch.arange(top, top - positive.numel(), -1, dtype=torch.float64)
        levels = torch.cat([-powers, torch.zeros(1, dtype=torch.float64), powers])
        errors.append(float((weight[:, None] - levels).square().min(dim=1).values.sum()))
    assert error_of(weight, decode(indices, codebook)) == pytest.approx(min(errors), rel=1e-9)


def test_power_of_two_keeps_powers_of_two() -> None:
    weight = torch.tensor([1.0, -0.5, 0.25, 0.0, -1.0])
    assert torch.equal(decode(*power_of_two(weight, 3)), weight)
