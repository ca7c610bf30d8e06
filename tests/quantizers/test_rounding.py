"""GPTQ, its polish, AdaRound and the scales, against brute force and independent forms."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sft.core.errors import InputError
from sft.quantizers.adaround import adaround
from sft.quantizers.gptq import gptq, gptq_symmetric
from sft.quantizers.grid import Grid, error, mend_pairs, offending_pairs, round_nearest
from sft.quantizers.linear import symmetric_scale
from sft.quantizers.polish import polish
from sft.quantizers.scale import best_scale


def correlated(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights and a full-rank moment whose eigenvalues fall as 1/i."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(columns, columns, generator=generator))[0]
    sizes = torch.arange(1, columns + 1.0) ** -0.5
    inputs = (basis * sizes) @ torch.randn(columns, 4 * columns, generator=generator)
    weights = torch.randn(rows, columns, generator=generator)
    return weights.double(), (inputs @ inputs.T / (4 * columns)).double()


def total(rows: Tensor, q: Tensor, grid: Grid, moment: Tensor) -> float:
    return float(error(rows, q, grid, moment).sum())


def published_gptq(levels: Tensor, moment: Tensor, top: int) -> Tensor:
    """The paper's own form: Cholesky of the inverse, each error spread over the later columns."""
    mean = moment.diagonal().mean()
    order = torch.argsort(moment.diagonal(), descending=True)
    damped = (moment + 0.01 * mean * torch.eye(len(moment)))[order][:, order]
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    w, q = levels[:, order].clone(), torch.zeros_like(levels)
    for i in range(w.shape[1]):
        rounded = w[:, i].round().clamp(-top, top)
        q[:, order[i]] = rounded
        w[:, i:] -= torch.outer((w[:, i] - rounded) / upper[i, i], upper[i, i:])
    return q.to(torch.int8)


@pytest.mark.parametrize("columns", [20, 300])
def test_gptq_gives_the_integers_of_the_paper(columns: int) -> None:
    rows, moment = correlated(6, columns)
    grid = Grid(best_scale(rows, 7, moment.diagonal()), -7, 7)
    published = published_gptq(rows / grid.scale[:, None], moment, 7)
    nearest = round_nearest(rows, grid)
    better = error(rows, published, grid, moment) < error(rows, nearest, grid, moment)
    assert int(better.sum()) >= 3
    wanted = torch.where(better[:, None], published, nearest)
    assert torch.equal(gptq(rows, grid, moment, sweeps=0), wanted)


@pytest.mark.parametrize("pair_sum", [None, 3])
def test_the_polish_ends_where_no_single_change_helps(pair_sum: int | None) -> None:
    rows, moment = correlated(5, 9)
    grid = Grid(torch.full((5,), 0.4).double(), -3, 3, pair_sum)
    q = polish(rows, round_nearest(rows, grid), grid, moment, 50)
    least = error(rows, q, grid, moment)
    for column, level in itertools.product(range(9), range(-3, 4)):
        other = q.clone()
        other[:, column] = level
        free = torch.tensor([not pair_sum or not offending_pairs(r[None], pair_sum) for r in other])
        assert bool((error(rows, other, grid, moment)[free] >= least[free] - 1e-12).all())


def test_each_sweep_of_the_polish_lowers_the_error() -> None:
    rows, moment = correlated(16, 150)
    grid = Grid(symmetric_scale(rows, 3, 0), -3, 3)
    q = round_nearest(rows, grid)
    errors = [error(rows, polish(rows, q, grid, moment, n), grid, moment) for n in range(4)]
    assert torch.equal(polish(rows, q, grid, moment, 0), q)
    for before, after in itertools.pairwise(errors):
        assert bool((after <= before).all())
    assert float(errors[2].sum()) < float(errors[1].sum()) < 0.8 * float(errors[0].sum())


@pytest.mark.parametrize("rounding", [gptq, adaround])
def test_learned_integers_are_near_the_best_of_all(rounding: object) -> None:
    """On 5 columns of 5 levels the best is found by trying all; nearest is far from it."""
    found = best = nearest = 0.0
    levels = torch.tensor(list(itertools.product(range(-2, 3), repeat=5)), dtype=torch.float64)
    for seed in range(8):
        rows, moment = correlated(1, 5, seed)
        grid = Grid(symmetric_scale(rows, 2, 0), -2, 2)
        lost = rows - levels * grid.scale
        best += float(((lost @ moment) * lost).sum(1).min())
        nearest += total(rows, round_nearest(rows, grid), grid, moment)
        found += total(rows, rounding(rows, grid, moment), grid, moment)  # type: ignore[operator]
    assert found < 1.15 * best
    assert nearest > 1.25 * best


@pytest.mark.parametrize("bits", [4, 3])
def test_what_each_method_gains_on_correlated_inputs(bits: int) -> None:
    rows, moment = correlated(32, 96)
    top = 2 ** (bits - 1) - 1
    grid = Grid(best_scale(rows, top, moment.diagonal()), -top, top)
    base = total(rows, round_nearest(rows, grid), grid, moment)
    plain = total(rows, gptq(rows, grid, moment, sweeps=0), grid, moment) / base
    polished = total(rows, gptq(rows, grid, moment), grid, moment) / base
    learned = total(rows, adaround(rows, grid, moment), grid, moment) / base
    print(f"{bits} bits: gptq {plain:.3f}, polished {polished:.3f}, adaround {learned:.3f}")
    assert polished < plain < 0.6
    assert learned < plain


def test_pairs_at_their_limit_are_rounded_in_the_metric() -> None:
    """At 8 bits a third of the pairs offend: what the mending loses is made up elsewhere."""
    rows, moment = correlated(16, 97)
    grid = Grid(rows.abs().amax(1) / 250, -127, 127, 128)
    free = round_nearest(rows, Grid(grid.scale, -127, 127))
    assert offending_pairs(free, 128) > 100
    nearest = total(rows, mend_pairs(free, 128), grid, moment)
    once = gptq(rows, grid, moment, sweeps=0)
    q = gptq(rows, grid, moment)
    assert offending_pairs(once, 128) == offending_pairs(q, 128) == 0
    assert total(rows, q, grid, moment) < total(rows, once, grid, moment) < 0.8 * nearest


def test_a_lone_pair_at_its_limit_is_nearly_the_best_of_all() -> None:
    """Two correlated columns, both wanted beyond the limit: the split is that of the metric."""
    levels = torch.tensor(list(itertools.product(range(-9, 10), repeat=2)), dtype=torch.float64)
    levels = levels[levels.sum(1).abs() <= 10]
    moment = torch.tensor([[4.0, 1.2], [1.2, 1.0]], dtype=torch.float64)
    rows = 3 + 6 * torch.rand(40, 2, generator=torch.Generator().manual_seed(0)).double()
    grid = Grid(torch.ones(40).double(), -9, 9, 10)
    lost = rows[:, None] - levels
    best = float(((lost @ moment) * lost).sum(-1).amin(1).sum())
    assert total(rows, round_nearest(rows, grid), grid, moment) > 1.3 * best
    assert total(rows, gptq(rows, grid, moment, sweeps=0), grid, moment) < 1.03 * best


def test_adaround_makes_up_for_clipping() -> None:
    """With a third of the weights clipped, what is learned beats GPTQ and its polish."""
    rows, moment = correlated(24, 64)
    grid = Grid(rows.abs().amax(1) / 6, -3, 3)
    learned = total(rows, adaround(rows, grid, moment), grid, moment)
    assert learned < 0.95 * total(rows, gptq(rows, grid, moment), grid, moment)


def test_more_iterations_change_adaround() -> None:
    rows, moment = correlated(16, 32)
    grid = Grid(symmetric_scale(rows, 3, 0), -3, 3)
    none, many = (
        total(rows, adaround(rows, grid, moment, iterations=n), grid, moment) for n in (1, 400)
    )
    assert many < none


@given(st.integers(0, 10_000), st.integers(1, 6), st.sampled_from([None, 5]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_scale_is_the_best_of_its_candidates(
    seed: int, columns: int, pair_sum: int | None, weighted: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(3, columns, generator=generator).double()
    diagonal = torch.rand(columns, generator=generator).double() if weighted else None
    moment = None if diagonal is None else diagonal.diag()
    found = best_scale(rows, 4, diagonal, pair_sum)
    least = error(
        rows, round_nearest(rows, Grid(found, -4, 4, pair_sum)), Grid(found, -4, 4), moment
    )
    widest = rows.abs().amax(1) / 4
    for share in torch.linspace(0.3, 1.0 if pair_sum is None else 2.0, 36):
        grid = Grid(widest * float(share), -4, 4, pair_sum)
        other = error(rows, round_nearest(rows, grid), grid, moment)
        assert bool((least <= other * (1 + 1e-9) + 1e-12).all())
    assert bool((found >= 0.299 * widest).all())


def test_scales_of_zeros_of_chunks_and_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    rows[4] = 0
    whole = best_scale(rows, 7, torch.rand(6, generator=torch.Generator().manual_seed(1)))
    assert float(whole[4]) > 0
    monkeypatch.setattr("sft.quantizers.scale.CHUNK", 20)
    again = best_scale(rows, 7, torch.rand(6, generator=torch.Generator().manual_seed(1)))
    assert torch.allclose(whole, again, rtol=1e-6)
    same = torch.ones(1, 2)  # both at the limit: 64 levels each are enough, so the step doubles
    assert float(best_scale(same, 127, None, 128)[0]) == pytest.approx(1 / 64, rel=0.02)
    assert float(best_scale(same, 127, None, None)[0]) == pytest.approx(1 / 127)
    assert float(best_scale(rows, 7, candidates=1)[0]) == pytest.approx(
        0.3 * float(rows[0].abs().max()) / 7
    )


def test_bad_scales_are_refused() -> None:
    with pytest.raises(InputError, match="finite"):
        best_scale(torch.tensor([[float("nan")]]), 7)
    with pytest.raises(InputError, match="diagonal"):
        best_scale(torch.ones(2, 3), 7, torch.ones(2))
    with pytest.raises(InputError, match="candidate"):
        best_scale(torch.ones(2, 3), 7, candidates=0)
    with pytest.raises(InputError, match="1 bits"):
        gptq_symmetric(torch.ones(2, 3), 1, None)
