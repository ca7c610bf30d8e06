"""Rounded factors: identities, brute force on tiny layers, and the gain over the baseline."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sft.core.errors import InputError
from sft.quantizers.factors import (
    QuantizedFactors,
    balance,
    balanced_nearest,
    equalize_inner,
    excess,
    quantize_factors,
)
from sft.quantizers.gptq import gptq_symmetric
from sft.quantizers.grid import offending_pairs
from sft.quantizers.metric import energy
from sft.quantizers.plus_low_rank import quantized_plus_low_rank


def layer(outputs: int, entries: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A kernel and the moment of correlated inputs, both float64."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(entries, 3 * entries, generator=generator).double()
    inputs = inputs + 0.8 * inputs.roll(1, 0) + 0.5 * inputs.roll(2, 0)
    sizes = torch.arange(1, outputs + 1).double()[:, None] ** -0.5
    weight = torch.randn(outputs, entries, generator=generator).double() * sizes
    return weight, inputs @ inputs.T / (3 * entries)


def best_factors(weight: Tensor, moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    a = torch.linalg.eigh(weight @ moment @ weight.T)[1][:, -rank:]
    return a, a.T @ weight


@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_excess_error_is_far_below_the_balanced_split(bits: int, seed: int) -> None:
    weight, moment = layer(40, 90, seed)
    a, b = best_factors(weight, moment, 16)
    base = excess(weight, balanced_nearest(a, b, bits, bits).product(), a @ b, moment)
    found = [
        excess(weight, q.product(), a @ b, moment)
        for q in (
            quantize_factors(a, b, moment, bits, bits, weight=weight, rotate=rotate, ridge=0)
            for rotate in (False, True)
        )
    ]
    print(f"{bits} bits: {base:.4f}, {found[0] / base:.3f} of it, rotated {found[1] / base:.3f}")
    assert found[1] <= found[0] < 0.7 * base


def test_rank_one_is_near_the_best_of_all_integers() -> None:
    """2 x 2, rank 1, 2 bits: all integers, with the best scale of each of the two rows of A."""
    found = best = base = 0.0
    levels = torch.tensor(list(itertools.product([-1.0, 0.0, 1.0], repeat=2))).double()
    for seed in range(20):
        weight, moment = layer(2, 2, seed)
        a, b = best_factors(weight, moment, 1)
        along = (levels @ moment * levels).sum(1)
        gains = (weight @ moment @ levels.T).square() / along.clamp_min(1e-9)
        best += energy(weight, moment) - float(gains.sum(0).max())
        q = quantize_factors(a, b, moment, 2, 2, weight=weight, ridge=0)
        found += energy(weight - q.product(), moment)
        base += energy(weight - balanced_nearest(a, b, 2, 2).product(), moment)
    assert best - 1e-9 <= found < 1.2 * best
    assert base > found


@given(st.integers(1, 6), st.integers(1, 7), st.data(), st.sampled_from([None, 128]), st.booleans())
@settings(max_examples=30, deadline=None)
def test_never_worse_than_the_baseline(
    outputs: int, entries: int, data: st.DataObject, pair_sum: int | None, aware: bool
) -> None:
    rank = data.draw(st.integers(1, min(outputs, entries)))
    bits = data.draw(st.tuples(st.integers(2, 8), st.integers(2, 8)))
    weight, full = layer(outputs, entries, data.draw(st.integers(0, 999)))
    moment = full if aware else None
    a, b = best_factors(weight, full, rank)
    q = quantize_factors(a, b, moment, *bits, pair_sum=pair_sum, ridge=0)
    base = balanced_nearest(a, b, *bits, pair_sum=pair_sum)
    assert energy(a @ b - q.product(), moment) <= energy(a @ b - base.product(), moment) + 1e-12
    shapes = [(outputs, rank), (outputs,), (rank, entries), (rank,)]
    assert [tuple(t.shape) for t in (q.a_q, q.a_scale, q.b_q, q.b_scale)] == shapes
    assert bool((q.a_scale > 0).all())
    assert bool((q.b_scale > 0).all())
    for integers, n in ((q.a_q, bits[0]), (q.b_q, bits[1])):
        assert int(integers.abs().max()) <= 2 ** (n - 1) - 1
        assert pair_sum is None or offending_pairs(integers, pair_sum) == 0


def test_a_given_weight_and_a_seed_change_the_result() -> None:
    weight, moment = layer(12, 20)
    a, b = best_factors(weight, moment, 5)
    plain = quantize_factors(a, b, moment, 3, 3, ridge=0)
    aware = quantize_factors(a, b, moment, 3, 3, weight=weight, ridge=0)
    assert energy(weight - aware.product(), moment) < energy(weight - plain.product(), moment)
    rotated = [
        energy(
            a @ b - quantize_factors(a, b, moment, 3, 3, rotate=True, seed=s, ridge=0).product(),
            moment,
        )
        for s in (0, 0, 1, 2, 3)
    ]
    assert rotated[0] == rotated[1]
    assert len(set(rotated)) > 1


@pytest.mark.parametrize(("name", "less"), [("BALANCES", (0.0,)), ("SWEEPS", 1)])
def test_gauges_and_alternations_each_lower_the_error(
    name: str, less: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, moment = layer(24, 40)
    a, b = best_factors(weight, moment, 12)
    if name == "BALANCES":
        monkeypatch.setattr("sft.quantizers.factors.SWEEPS", 1)
    full = quantize_factors(a, b, moment, 3, 3, weight=weight, ridge=0)
    monkeypatch.setattr(f"sft.quantizers.factors.{name}", less)
    plain = quantize_factors(a, b, moment, 3, 3, weight=weight, ridge=0)
    assert energy(weight - full.product(), moment) < energy(weight - plain.product(), moment)


def test_single_precision_and_rank_deficient_factors() -> None:
    weight, moment = layer(6, 8)
    a, b = (t.float() for t in best_factors(weight, moment, 3))
    a[:, 2] = 0
    q = quantize_factors(a, b, moment.float(), 8, 8, ridge=0)
    assert q.a_scale.dtype == q.b_scale.dtype == q.product().dtype == torch.float32
    assert energy(a @ b - q.product(), moment) < 1e-3 * energy(a @ b, moment)
    nothing = quantize_factors(a * 0, b * 0, moment, 4, 4, ridge=0)
    assert not nothing.product().any()


def test_the_balanced_split_is_the_product_with_equal_sizes() -> None:
    weight, moment = layer(7, 9)
    a, b = best_factors(weight, moment, 4)
    first, second = balance(a, b)
    assert torch.allclose(first @ second, a @ b)
    sizes = torch.linalg.svdvals(a @ b)[:4]
    assert torch.allclose(first.T @ first, sizes.diag(), atol=1e-10)
    assert torch.allclose(second @ second.T, sizes.diag(), atol=1e-10)


def test_excess_is_zero_for_the_best_and_one_without_it() -> None:
    weight, moment = layer(5, 6)
    a, b = best_factors(weight, moment, 5)
    assert excess(weight, a @ b, a @ b, moment) == 0
    assert excess(weight, torch.zeros(5, 6), a @ b, moment) == pytest.approx(1)


def test_inner_channels_come_to_one_range() -> None:
    weight, moment = layer(5, 6)
    a, b = best_factors(weight, moment, 4)
    inputs = torch.randn(6, 50, generator=torch.Generator().manual_seed(1)).double()
    b[3] = 0
    ranges = (b @ inputs).abs().amax(1)
    first, second = equalize_inner(a, b, ranges)
    assert torch.allclose(first @ second, a @ b)
    after = (second @ inputs).abs().amax(1)
    assert torch.allclose(after[:3], ranges.mean().expand(3))
    with pytest.raises(InputError, match="4 that are finite"):
        equalize_inner(a, b, ranges[:3])
    with pytest.raises(InputError, match="not negative"):
        equalize_inner(a, b, -ranges)


@pytest.mark.parametrize("aware", [False, True])
def test_a_low_rank_residual_helps_and_more_sweeps_never_hurt(aware: bool) -> None:
    weight, full = layer(20, 40)
    moment = full if aware else None
    q, scale = gptq_symmetric(weight, 2, moment)
    alone = energy(weight - q.double() * scale[:, None], moment)
    errors = []
    for sweeps in range(4):
        q, scale, a, b = quantized_plus_low_rank(weight, moment, 2, 3, sweeps)
        assert (tuple(a.shape), tuple(b.shape), q.dtype) == ((20, 3), (3, 40), torch.int8)
        assert int(q.abs().max()) <= 1
        errors.append(energy(weight - q.double() * scale[:, None] - a @ b, moment))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] < 0.9 * alone


def test_the_low_rank_part_is_the_best_for_its_integers() -> None:
    """Against the whitened SVD, which Eckart and Young prove to be the best."""
    weight, moment = layer(8, 10)
    q, scale, a, b = quantized_plus_low_rank(weight, moment, 3, 2)
    residual = weight - q.double() * scale[:, None]
    sizes = torch.linalg.svdvals(residual @ torch.linalg.cholesky(moment))
    assert energy(residual - a @ b, moment) == pytest.approx(float(sizes[2:].square().sum()))


def test_wrong_factors_are_refused() -> None:
    a, b = torch.ones(3, 2), torch.ones(2, 4)
    with pytest.raises(InputError, match="no product"):
        quantize_factors(a, b.T, None, 4, 4)
    with pytest.raises(InputError, match="rank 5"):
        quantize_factors(torch.ones(3, 5), torch.ones(5, 4), None, 4, 4)
    with pytest.raises(InputError, match="weight has shape"):
        quantize_factors(a, b, None, 4, 4, weight=torch.ones(4, 4))
    with pytest.raises(InputError, match="second factor"):
        quantize_factors(a, b * float("nan"), None, 4, 4)
    with pytest.raises(InputError, match="moment"):
        quantize_factors(a, b, torch.ones(3, 3), 4, 4)
    with pytest.raises(InputError, match="1 bits"):
        quantize_factors(a, b, None, 1, 4)
    with pytest.raises(InputError, match="rank 4"):
        quantized_plus_low_rank(torch.ones(3, 5), None, 4, 4)


def test_the_product_is_that_of_the_scaled_integers() -> None:
    factors = QuantizedFactors(
        torch.tensor([[1], [-2]], dtype=torch.int8), torch.tensor([0.5, 2.0]),
        torch.tensor([[3, 4]], dtype=torch.int8), torch.tensor([10.0]),
    )  # fmt: skip
    assert factors.product().tolist() == [[15, 20], [-120, -160]]
