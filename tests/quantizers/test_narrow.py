"""Narrow layers side by side: against every integer there is, and against one after the other."""

import itertools

import torch

from sft.quantizers.grid import Grid
from sft.quantizers.narrow import group_scales, round_groups
from sft.quantizers.rounding import roundings
from sft.quantizers.scale import best_scale


def problem(groups: int, outputs: int, depth: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(groups, outputs, depth, generator=generator)
    seen = torch.randn(groups, depth, 40, generator=generator) + 2  # a mean that correlates all
    return rows, seen @ seen.mT / 40


def errors(rows: torch.Tensor, q: torch.Tensor, s: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    lost = (rows - q * s[:, :, None]).double()
    return ((lost @ m.double()) * lost).sum(2)


def test_near_the_best_of_all_integers() -> None:
    rows, moments = problem(6, 2, 3)
    scales = rows.abs().amax(2) / 3
    q = round_groups(rows, scales, moments, 3)
    found = errors(rows, q, scales, moments)
    choices = torch.tensor(list(itertools.product(range(-3, 4), repeat=3)), dtype=torch.float32)
    best = torch.stack([errors(rows, c.expand_as(rows), scales, moments) for c in choices]).amin(0)
    nearest = errors(rows, (rows / scales[:, :, None]).round(), scales, moments)
    assert bool((found >= best - 1e-9).all())
    assert float(found.sum()) < 1.2 * float(best.sum())
    assert float(found.sum()) < 0.7 * float(nearest.sum())


def test_never_worse_than_nearest_and_near_gptq() -> None:
    rows, moments = problem(32, 1, 9)
    scales = group_scales(rows, moments.diagonal(dim1=1, dim2=2), 127, 36)
    q = round_groups(rows, scales, moments, 127)
    found = errors(rows, q, scales, moments)
    nearest = (rows / scales[:, :, None]).round().clamp(-127, 127)
    assert bool((found <= errors(rows, nearest, scales, moments) + 1e-12).all())
    other = torch.stack(
        [
            roundings["gptq"](r, Grid(s, -127, 127), m)
            for r, s, m in zip(rows, scales, moments, strict=True)
        ]
    )
    assert float(found.sum()) < 1.5 * float(errors(rows, other, scales, moments).sum())


def test_scales_are_those_of_single_layers() -> None:
    rows, moments = problem(5, 3, 9)
    variances = moments.diagonal(dim1=1, dim2=2)
    alone = torch.stack(
        [best_scale(r, 7, v, None, 36) for r, v in zip(rows, variances, strict=True)]
    )
    torch.testing.assert_close(group_scales(rows, variances, 7, 36), alone)


def test_zero_rows_and_singular_moments() -> None:
    rows, moments = problem(6, 1, 9)
    rows[0], moments[1] = 0, 0
    scales = group_scales(rows, moments.diagonal(dim1=1, dim2=2), 7, 36)
    q = round_groups(rows, scales, moments, 7)
    assert float(scales[0]) == 1
    assert not bool(q[0].any())
    assert int(q.abs().max()) <= 7
