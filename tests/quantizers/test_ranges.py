"""Ranges against brute force, numpy's quantiles and the published fixed point."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sft.quantizers.clipping import Problem, squared_errors
from sft.quantizers.linear import symmetric_scale
from sft.quantizers.ranges import ranges, weight_scale

SHRUNK = np.linspace(0.05, 1, 200)


def made(kind: str, rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=generator)
    return {
        "normal": normal,
        "relu": normal.relu(),
        "skewed": normal.exp() - 0.5,
        "laplace": normal * torch.randn(rows, columns, generator=generator).abs() * 2,
    }[kind]


def error_of(
    values: Tensor, low: float, high: float, qmin: int, qmax: int, symmetric: bool
) -> float:
    """Squared error of one row in numpy float64, written without the code under test."""
    v = values.double().numpy()
    if symmetric:
        scale, zero, qmin = high / qmax, 0.0, -qmax
    else:
        scale = (high - low) / (qmax - qmin)
        zero = np.clip(np.round(qmin - low / scale), qmin, qmax) if scale > 0 else 0.0
    scale = scale if scale > 0 else 1.0
    q = np.clip(np.round(v / scale) + zero, qmin, qmax)
    return float((((q - zero) * scale - v) ** 2).sum())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["normal", "laplace", "skewed"])
def test_mse_symmetric_is_near_brute_force(kind: str, bits: int) -> None:
    values, qmax = made(kind, 2, 600), 2 ** (bits - 1) - 1
    _, high = ranges["mse"](values, None, -qmax, qmax, True)
    for row, end in zip(values, high.tolist(), strict=True):
        top = float(row.abs().max())
        tried = np.linspace(0.03, 1, 1500) * top
        best = min(error_of(row, -h, h, -qmax, qmax, True) for h in tried)
        assert error_of(row, -end, end, -qmax, qmax, True) <= 1.01 * best


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", ["normal", "relu", "skewed"])
def test_mse_affine_is_near_brute_force(kind: str, bits: int) -> None:
    row, qmin, qmax = made(kind, 1, 400), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    low, high = (float(end) for end in ranges["mse"](row, None, qmin, qmax, False))
    shrunk = np.linspace(0.05, 1, 60)
    least, most = min(0.0, float(row.min())), float(row.max())
    lows = shrunk * least if least else [0.0]
    best = min(error_of(row, a, b * most, qmin, qmax, False) for a in lows for b in shrunk)
    assert error_of(row, low, high, qmin, qmax, False) <= 1.03 * best


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=12),
    st.integers(2, 8),
    st.booleans(),
    st.sampled_from([0.0, 2.0, -2.0]),
)
def test_mse_is_never_worse_than_minmax(
    values: list[float], bits: int, symmetric: bool, offset: float
) -> None:
    row = torch.tensor([values]) + offset
    qmax = 2 ** (bits - 1) - 1
    grid = (-qmax if symmetric else -qmax - 1, qmax, symmetric)
    ends = {n: [float(e) for e in ranges[n](row, None, *grid)] for n in ("mse", "minmax")}
    errors = {n: error_of(row, *e, *grid) for n, e in ends.items()}
    slack = 1e-9 * float(row.square().sum())  # of float32 sums and of ties
    assert errors["mse"] <= errors["minmax"] * (1 + 1e-4) + slack


def test_mse_gains_much_at_few_bits() -> None:
    row = made("normal", 1, 4608)
    ends = [float(ranges[n](row, None, -1, 1, True)[1]) for n in ("mse", "minmax")]
    errors = [error_of(row, -e, e, -1, 1, True) for e in ends]
    assert errors[0] < 0.3 * errors[1]
    assert ends[0] == pytest.approx(1.22, rel=0.05)  # the known optimum of three levels


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_search_sees_the_error_of_the_real_grid(symmetric: bool) -> None:
    values = made("skewed", 3, 70)
    counts = torch.randint(1, 4, values.shape, generator=torch.Generator().manual_seed(5)).float()
    top = values.abs().amax(1)
    low, high = (-top, top) if symmetric else (values.amin(1), values.amax(1))
    grid = (-7 if symmetric else -8, 7, symmetric)
    factors = torch.tensor([[0.9, 0.9], [0.3, 0.3]])[:, :, None].expand(2, 2, 3)
    got = squared_errors(Problem(values, counts, low, high, *grid), factors)
    for candidate, factor in enumerate((0.9, 0.3)):
        for row in range(3):
            repeated = values[row].repeat_interleave(counts[row].long())
            ends = [float(e[row]) * factor for e in (low, high)]
            wanted = error_of(repeated, *ends, *grid) / float(top[row]) ** 2
            assert float(got[candidate, row]) == pytest.approx(wanted, rel=1e-3)


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    values, counts = made("skewed", 5, 130), made("relu", 5, 130, seed=1)
    for symmetric in (True, False):
        whole = ranges["mse"](values, counts, -7, 7, symmetric)
        monkeypatch.setattr("sft.quantizers.clipping.BLOCK", 200)
        # the room's attribute `ranges` is the table, not the module
        monkeypatch.setattr(sys.modules["sft.quantizers.ranges"], "BLOCK", 300)
        torch.testing.assert_close(ranges["mse"](values, counts, -7, 7, symmetric), whole)
        monkeypatch.undo()


@pytest.mark.parametrize("columns", [1, 100, 40_000])
@pytest.mark.parametrize("weighted", [False, True])
def test_percentile_is_numpys_quantile(columns: int, weighted: bool) -> None:
    values = made("skewed", 2, columns)
    counts = torch.randint(1, 9, values.shape, generator=torch.Generator().manual_seed(6)).float()
    low, high = ranges["percentile"](values, counts if weighted else None, -128, 127, False)
    _, even = ranges["percentile"](values, counts if weighted else None, -127, 127, True)
    for row in range(2):
        copies = counts[row].long() if weighted else torch.ones(columns, dtype=torch.int64)
        data = values[row].repeat_interleave(copies).numpy()
        ends = np.quantile(data, [5e-5, 1 - 5e-5], method="inverted_cdf")
        assert float(low[row]) == min(0.0, ends[0])
        assert float(high[row]) == max(0.0, ends[1])
        assert float(even[row]) == np.quantile(np.abs(data), 0.9999, method="inverted_cdf")
    assert columns < 10_000 or bool((high < values.amax(1)).all())


def published_clip(values: np.ndarray, bits: int, noise: float) -> float:
    """The iteration of the paper, with the noise 4^-bits / 3 (signed) or 4^-bits / 12."""
    x = np.abs(values[values != 0])
    clip = x.mean()
    for _ in range(100):
        above = x[x > clip]
        clip = above.sum() / (4.0**-bits * noise * (x.size - above.size) + above.size)
    return float(clip)


def test_octav_on_one_signed_data_is_the_published_fixed_point() -> None:
    row = made("relu", 1, 3000)
    for bits in (3, 4, 6):
        grid = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, False)
        low, high = (float(e) for e in ranges["octav"](row, None, *grid))
        levels = (2**bits - 1) / 2**bits  # the paper counts 2^bits steps
        wanted = published_clip(row[0].double().numpy(), bits, 1 / 12 / levels**2)
        assert low == 0
        assert high == pytest.approx(wanted, rel=1e-5)


def test_octav_on_symmetric_data_is_the_published_fixed_point() -> None:
    row = made("laplace", 1, 3000)
    for bits in (3, 4, 6):
        qmax = 2 ** (bits - 1) - 1
        high = float(ranges["octav"](row, None, -qmax, qmax, True)[1])
        levels = qmax / 2 ** (bits - 1)
        wanted = published_clip(row[0].double().numpy(), bits, 1 / 3 / levels**2)
        assert high == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("kind", ["normal", "skewed"])
def test_octav_of_two_ends_is_near_the_least_error(kind: str) -> None:
    row = made(kind, 1, 4000)
    ends = {n: [float(e) for e in ranges[n](row, None, -8, 7, False)] for n in ("octav", "mse")}
    errors = {n: error_of(row, *e, -8, 7, False) for n, e in ends.items()}
    assert errors["octav"] <= 1.15 * errors["mse"]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_octav_of_two_ends_makes_the_derivative_of_the_modelled_error_zero(bits: int) -> None:
    """The error is a step squared over 12 for each value inside, whose number is held."""
    row, grid = made("normal", 1, 4000) + 0.4, (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, False)
    values = row[0].double().numpy()
    low, high = (float(e) for e in ranges["octav"](row, None, *grid))
    inside = ((values >= low) & (values <= high)).sum()
    noise = (high - low) * inside / 12 / (2**bits - 1) ** 2
    assert noise == pytest.approx((values - high)[values > high].sum(), rel=1e-3)
    assert noise == pytest.approx((low - values)[values < low].sum(), rel=1e-3)


def test_mse_shrinks_only_the_end_that_has_an_outlier() -> None:
    row = made("relu", 1, 4000)
    row[0, 0] = -6.0
    low, high = (float(e) for e in ranges["mse"](row, None, -4, 3, False))
    together = min(error_of(row, -6 * f, float(row.max()) * f, -4, 3, False) for f in SHRUNK)
    assert error_of(row, low, high, -4, 3, False) < 0.9 * together
    assert -low / 6 < 0.5 * high / float(row.max())


def test_minmax_weight_scale_is_the_linear_one() -> None:
    rows = made("normal", 4, 30)
    torch.testing.assert_close(weight_scale(rows, 7, "minmax"), symmetric_scale(rows, 7, 0))
    assert bool((weight_scale(rows, 1) < symmetric_scale(rows, 1, 0)).all())
