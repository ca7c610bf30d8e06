"""Grids, and the mending of pairs against all admissible pairs."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sft.core.errors import InputError
from sft.quantizers.grid import (
    Grid,
    dequantize,
    error,
    mend_pairs,
    offending_pairs,
    round_nearest,
    top_of,
)


@given(
    top=st.integers(2, 9),
    extra=st.integers(0, 6),
    aims=st.tuples(st.floats(-15, 15), st.floats(-15, 15)),
)
@settings(max_examples=300, deadline=None)
def test_a_mended_pair_is_the_nearest_of_all(
    top: int, extra: int, aims: tuple[float, float]
) -> None:
    pair_sum, wanted = top + extra, torch.tensor([aims], dtype=torch.float64)
    q = mend_pairs(wanted.round().clamp(-top, top).to(torch.int8), pair_sum, wanted)

    def distance(a: float, b: float) -> float:
        return (a - aims[0]) ** 2 + (b - aims[1]) ** 2

    levels = range(-top, top + 1)
    safe = [
        (a, b)
        for a, b in itertools.product(levels, levels)
        if a * b <= 0 or abs(a) + abs(b) <= pair_sum
    ]
    assert tuple(q[0].tolist()) in safe
    best = min(distance(a, b) for a, b in safe)
    assert distance(*q[0].tolist()) == pytest.approx(best, abs=1e-9)


@given(st.integers(0, 10_000), st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_mending_touches_only_what_offends_and_only_once(seed: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-127, 128, (5, columns), generator=generator, dtype=torch.int8)
    mended = mend_pairs(q, 128)
    assert mended.dtype == torch.int8
    assert offending_pairs(mended, 128) == 0
    assert torch.equal(mend_pairs(mended, 128), mended)
    changed = 0
    for row, after in zip(q.tolist(), mended.tolist(), strict=True):
        for c in range(0, columns - 1, 2):
            a, b = row[c : c + 2]
            offends = a * b > 0 and abs(a) + abs(b) > 128
            assert offends or after[c : c + 2] == [a, b]
            changed += offends
        if columns % 2:
            assert after[-1] == row[-1]
    assert offending_pairs(q, 128) == changed


def test_a_pair_wanted_lower_is_not_left_at_the_limit() -> None:
    q = torch.tensor([[127, 127, -127, -127]], dtype=torch.int8)
    wanted = torch.tensor([[10.2, 20.0, -400.0, -90.0]])
    assert mend_pairs(q, 128, wanted).tolist() == [[10, 20, -127, -1]]


def test_the_limit_is_that_of_sixteen_bits() -> None:
    assert 255 * 128 <= 2**15 - 1 < 255 * 129


def test_error_is_the_double_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, root = torch.randn(3, 4, generator=generator), torch.randn(4, 4, generator=generator)
    grid, moment = Grid(torch.tensor([0.5, 0.2, 1.0]), -3, 3), root @ root.T
    q = round_nearest(rows, grid)
    lost = rows - dequantize(q, grid)
    for r in range(3):
        pairs = itertools.product(range(4), range(4))
        wanted = sum(float(lost[r, i] * moment[i, j] * lost[r, j]) for i, j in pairs)
        assert float(error(rows, q, grid, moment)[r]) == pytest.approx(wanted, rel=1e-5)
        plain = float(lost[r].square().sum())
        assert float(error(rows, q, grid, None)[r]) == pytest.approx(plain, rel=1e-5)


def test_nearest_clamps_and_mends() -> None:
    rows = torch.tensor([[3.4, 3.4, -9.0, 1.0, 9.0]])
    assert round_nearest(rows, Grid(torch.ones(1), -4, 4)).tolist() == [[3, 3, -4, 1, 4]]
    assert round_nearest(rows, Grid(torch.ones(1), -4, 4, 5)).tolist() == [[2, 3, -4, 1, 4]]


@pytest.mark.parametrize(
    ("scale", "qmin", "qmax", "pair_sum", "words"),
    [
        (torch.zeros(2), -7, 7, None, "positive"),
        (torch.tensor([1.0, float("nan")]), -7, 7, None, "finite"),
        (torch.ones(2, 1), -7, 7, None, "shape"),
        (torch.ones(2, dtype=torch.int32), -7, 7, None, "floating"),
        (torch.ones(2), -200, 7, None, "-200 to 7"),
        (torch.ones(2), -7, 0, None, "-7 to 0"),
        (torch.ones(2), -7, 7, 6, "pair_sum=6"),
    ],
)
def test_impossible_grids_are_refused(
    scale: torch.Tensor, qmin: int, qmax: int, pair_sum: int | None, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        Grid(scale, qmin, qmax, pair_sum)


def test_rows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="2 scales"):
        round_nearest(torch.ones(3, 4), Grid(torch.ones(2), -7, 7))
    with pytest.raises(InputError, match="flatten"):
        round_nearest(torch.ones(2, 4, 1), Grid(torch.ones(2), -7, 7))
    with pytest.raises(InputError, match="9 bits"):
        top_of(9)
    assert [top_of(bits) for bits in (2, 4, 8)] == [1, 7, 127]
