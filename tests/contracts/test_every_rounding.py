"""What every registered rounding must keep, whatever it is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sft.core.errors import InputError
from sft.quantizers.grid import Grid, error, offending_pairs, round_nearest
from sft.quantizers.rounding import roundings

NAMES = list(roundings)
every = pytest.mark.parametrize("name", NAMES)
both_signs = pytest.mark.parametrize("pair_sum", [None, 128])
Case = tuple[Tensor, Grid, Tensor | None]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Rows, a grid that clips some of them, and a moment of any rank (or none)."""
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    bits = draw(st.integers(2, 8))
    top = 2 ** (bits - 1) - 1
    pair_sum = draw(st.sampled_from([None, top, top + top // 4]))
    weights = torch.randn(rows, columns, generator=generator, dtype=dtype)
    clip = draw(st.floats(0.4, 1.2))
    scale = weights.abs().amax(1) * clip / top
    sizes = torch.rand(columns, generator=generator, dtype=dtype)
    rank = draw(st.integers(0, columns + 2))
    inputs = torch.randn(columns, rank, generator=generator, dtype=dtype) * sizes[:, None]
    moment = None if draw(st.integers(0, 4)) == 0 else inputs @ inputs.T
    low = -top - 1 if pair_sum is None and draw(st.booleans()) else -top
    return weights, Grid(scale, low, top, pair_sum), moment


def correlated(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(columns, 4 * columns, generator=generator)
    inputs = inputs + 0.8 * inputs.roll(1, 0) + inputs[:1]
    return torch.randn(rows, columns, generator=generator), inputs @ inputs.T / 40


@every
@given(case=cases())
@settings(max_examples=25, deadline=None)
def test_integers_fit_and_no_row_is_worse_than_nearest(name: str, case: Case) -> None:
    rows, grid, moment = case
    before = rows.clone()
    q = roundings[name](rows, grid, moment)
    assert (q.dtype, q.shape) == (torch.int8, rows.shape)
    assert torch.equal(rows, before)
    assert int(q.min()) >= grid.qmin
    assert int(q.max()) <= grid.qmax
    assert grid.pair_sum is None or offending_pairs(q, grid.pair_sum) == 0
    nearest = error(rows, round_nearest(rows, grid), grid, moment)
    found = error(rows, q, grid, moment)
    assert bool((found <= nearest * (1 + 1e-9) + 1e-12).all())


@every
@both_signs
@pytest.mark.parametrize("columns", [255, 300])
def test_several_blocks_of_columns(name: str, columns: int, pair_sum: int | None) -> None:
    """Wider than a block, at 8 bits with clipping, so that many pairs reach their limit."""
    rows, moment = correlated(3, columns)
    grid = Grid(rows.abs().amax(1) / 250, -127, 127, pair_sum)
    q = roundings[name](rows, grid, moment)
    found, nearest = (error(rows, x, grid, moment) for x in (q, round_nearest(rows, grid)))
    assert bool((found <= nearest).all())
    assert pair_sum is None or offending_pairs(q, pair_sum) == 0


@every
@both_signs
def test_grid_points_are_fixed_points(name: str, pair_sum: int | None) -> None:
    _, moment = correlated(1, 7)
    generator = torch.Generator().manual_seed(3)
    q = torch.randint(-60, 61, (4, 7), generator=generator, dtype=torch.int8)
    grid = Grid(torch.rand(4, generator=generator) + 0.1, -127, 127, pair_sum)
    assert torch.equal(roundings[name](q * grid.scale[:, None], grid, moment), q)


@every
@both_signs
@pytest.mark.parametrize("kind", ["none", "zero", "singular", "unread"])
def test_any_moment_and_rows_of_zeros(name: str, kind: str, pair_sum: int | None) -> None:
    rows, moment = correlated(3, 5)
    rows[1] = 0
    moments = {
        "none": None,
        "zero": torch.zeros(5, 5),
        "singular": torch.ones(5, 5),
        "unread": moment * torch.tensor([1, 0, 1, 0, 1])[:, None] * torch.tensor([1, 0, 1, 0, 1]),
    }
    grid = Grid(torch.full((3,), 0.4), -7, 7, None if pair_sum is None else 8)
    q = roundings[name](rows, grid, moments[kind])
    assert not q[1].any()
    if kind in ("none", "zero"):
        assert torch.equal(q, round_nearest(rows, grid))


@every
def test_the_same_at_each_call_and_no_shared_generator_is_touched(name: str) -> None:
    rows, moment = correlated(4, 12)
    grid = Grid(torch.full((4,), 0.5), -7, 7)
    state = torch.get_rng_state()
    first = roundings[name](rows, grid, moment)
    assert torch.equal(first, roundings[name](rows.clone().requires_grad_(), grid, moment))
    assert torch.equal(state, torch.get_rng_state())


@every
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(name: str, value: float) -> None:
    rows, moment = correlated(2, 4)
    grid = Grid(torch.ones(2), -7, 7)
    bad_rows, bad_moment = rows.clone(), moment.clone()
    bad_rows[0, 1] = value
    bad_moment[2, 2] = value
    with pytest.raises(InputError, match="rows"):
        roundings[name](bad_rows, grid, moment)
    with pytest.raises(InputError, match="moment"):
        roundings[name](rows, grid, bad_moment)
    with pytest.raises(InputError, match="moment"):
        roundings[name](rows, grid, moment[:3, :3])
