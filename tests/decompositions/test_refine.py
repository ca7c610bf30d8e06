"""Alternating least squares against data, closed forms and tensorly."""

import dataclasses
import itertools
import sys

import numpy
import pytest
import torch
from torch import Tensor, nn

from sft.core.errors import InputError
from sft.core.geometry import Geometry
from sft.decompositions import data_error, decompositions, factorize, refine
from sft.decompositions.solvers import conjugate_gradients, orthonormal_but, solve_spd
from sft.decompositions.tucker2 import rotate_subspaces
from sft.layers import compose, geometry_of, to_canonical

CONV = Geometry(6, 8, (3, 3), (1, 1), (1, 1), (1, 1))
GROUPED = Geometry(8, 6, (2, 3), (1, 1), (1, 1), (1, 1), groups=2)
TRANSPOSED = Geometry(6, 4, (3, 2), (2, 1), (0, 0), (1, 1), transposed=True, output_padding=(1, 0))
RANKS = {"channel_in": (2,), "spatial": (3,), "separable": (4,), "tucker2": (2, 3)}


def started(name: str, case, geometry: Geometry) -> tuple[list[Tensor], tuple[Geometry, ...]]:
    method = decompositions[name]
    found = method.analyse(case.kernel, geometry, case.statistics)
    return found.factors(RANKS[name]), method.factors(geometry, RANKS[name])


@pytest.mark.parametrize("name", sorted(RANKS))
@pytest.mark.parametrize(
    "geometry", [CONV, GROUPED, TRANSPOSED], ids=["conv", "groups", "transposed"]
)
@pytest.mark.parametrize("gradients", [False, True])
def test_the_error_falls_and_is_that_on_the_data(
    name: str, geometry: Geometry, gradients: bool, seen
) -> None:
    case = seen(geometry, 3, gradients=gradients)
    kernels, parts = started(name, case, geometry)
    before = [kernel.clone() for kernel in kernels]
    found, errors = refine(case.kernel, kernels, parts, geometry, case.statistics)
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))
    assert len(errors) > 1
    for error, factors in ((errors[0], kernels), (errors[-1], found)):
        measured = case.output_error(compose(factors, parts, geometry), weighted=gradients)
        assert error == pytest.approx(measured, rel=1e-6)
        norm = data_error(case.kernel, factors, parts, geometry, case.statistics)
        assert norm == pytest.approx(measured, rel=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(kernels, before, strict=True))


@pytest.mark.parametrize("name", sorted(RANKS))
def test_it_ends_where_no_factor_can_be_improved(name: str, seen) -> None:
    case = seen(CONV, 1)
    kernels, parts = started(name, case, CONV)
    found, errors = refine(case.kernel, kernels, parts, CONV, case.statistics, 300, 1e-10)

    def error(*factors: Tensor) -> Tensor:
        lost = (case.kernel - compose(factors, parts, CONV)).flatten(2)
        return (lost @ case.statistics.patch_covariance * lost).sum()

    slopes = torch.func.grad(error, argnums=tuple(range(len(found))))(*found)
    steps = [1e-4 * slope for slope in slopes]
    gain = sum(float((slope * step).sum()) for slope, step in zip(slopes, steps, strict=True))
    assert errors[-1] > 1e-3
    assert gain < 1e-4 * float(error(*found))


@pytest.mark.parametrize("name", ["channel_in", "spatial", "separable"])
def test_the_last_factor_is_the_least_squares_one(name: str, seen) -> None:
    case = seen(CONV, 2)
    kernels, parts = started(name, case, CONV)
    found, _ = refine(case.kernel, kernels, parts, CONV, case.statistics, sweeps=2, tolerance=0)
    unit = torch.eye(found[-1][0, 0].numel(), dtype=torch.float64)
    picks = [found[-1].new_tensor(row.tolist()).view(1, 1, *found[-1].shape[2:]) for row in unit]
    single = dataclasses.replace(CONV, outputs=1)
    one = (*parts[:-1], dataclasses.replace(parts[-1], outputs=1))
    inputs = torch.cat([compose([*found[:-1], p], one, single) for p in picks], 1).flatten(2)
    patches = case.patches[0] - case.patches[0].mean(1, keepdim=True)
    wanted = case.kernel[0].flatten(1) @ patches
    solution = torch.linalg.lstsq((inputs[0] @ patches).T, wanted.T).solution.T
    torch.testing.assert_close(found[-1][0].flatten(1), solution, rtol=1e-4, atol=1e-5)


def test_core_and_last_factor_of_tucker2_are_the_reduced_rank_regression(seen) -> None:
    case = seen(CONV, 2)
    torch.manual_seed(0)
    parts = decompositions["tucker2"].factors(CONV, RANKS["tucker2"])
    start = [torch.randn_like(k) for k in started("tucker2", case, CONV)[0]]
    (first, *rest), _ = refine(case.kernel, start, parts, CONV, case.statistics, sweeps=1)
    patches = case.patches[0] - case.patches[0].mean(1, keepdim=True)
    inputs = torch.einsum("ri,isn->rsn", first[0, ..., 0], patches.view(6, 9, -1)).flatten(0, 1)
    wanted = case.kernel[0].flatten(1) @ patches
    fit = torch.linalg.lstsq(inputs.T, wanted.T).solution.T @ inputs
    dropped = torch.linalg.svdvals(fit).square()[RANKS["tucker2"][1] :].sum()
    best = float(((wanted - fit).square().sum() + dropped) / wanted.square().sum())
    found = case.output_error(compose([first, *rest], parts, CONV))
    assert found == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", ["channel_in", "channel_out"])
def test_two_factors_with_one_tap_behind_are_solved_at_once_from_anywhere(
    name: str, gradients: bool, seen
) -> None:
    geometry = CONV if name == "channel_out" else Geometry(9, 7)
    case = seen(geometry, gradients=gradients)
    method = decompositions[name]
    parts = method.factors(geometry, (3,))
    best = method.analyse(case.kernel, geometry, case.statistics)
    torch.manual_seed(1)
    start = [torch.randn_like(kernel) for kernel in best.factors((3,))]
    found, _ = refine(case.kernel, start, parts, geometry, case.statistics, sweeps=1)
    error = case.output_error(compose(found, parts, geometry), weighted=gradients)
    assert error == pytest.approx(float(best.errors[2]), rel=1e-4)


@pytest.mark.parametrize("name", sorted(RANKS))
@pytest.mark.parametrize("seed", range(4))
def test_a_refined_layer_is_never_worse_than_plain_or_unrefined(name: str, seed: int, seen) -> None:
    case = seen(CONV, seed)
    layer = nn.Conv2d(6, 8, 3, padding=1).double()
    layer.weight.data.copy_(case.kernel.view(8, 6, 3, 3))
    plain, aware, refined = (
        case.output_error(factorize(layer, name, RANKS[name], s, refine=r).kernel().detach())
        for s, r in ((None, False), (case.statistics, False), (case.statistics, True))
    )
    assert refined <= min(plain, aware) + 1e-12
    assert refined < aware


@pytest.mark.parametrize("rank", [(2, 3), (4, 4)])
def test_tucker2_is_as_good_as_tensorly(rank: tuple[int, int], seen) -> None:
    from tensorly.decomposition import partial_tucker

    kernel = seen(CONV).kernel
    core_factors = partial_tucker(
        kernel[0].numpy(), rank[::-1], modes=[0, 1], n_iter_max=200, tol=1e-10
    )[0]
    (core, (u, v)) = core_factors
    theirs = numpy.einsum("qrs,oq,ir->ois", core, u, v)
    their_error = float(((kernel[0].numpy() - theirs) ** 2).sum() / (kernel**2).sum())
    method = decompositions["tucker2"]
    start = method.analyse(kernel, CONV, None).factors(rank)
    ours = refine(kernel, start, method.factors(CONV, rank), CONV, None, 50, 1e-9)[1][-1]
    assert ours <= 1.01 * their_error


def test_separable_is_as_good_as_tensorly(seen) -> None:
    from tensorly.decomposition import parafac

    kernel = seen(CONV).kernel
    found = parafac(kernel[0].numpy(), 6, n_iter_max=300, init="svd", tol=1e-9)
    weights, (u, v, c) = found
    theirs = numpy.einsum("r,or,ir,sr->ois", weights, u, v, c)
    their_error = float(((kernel[0].numpy() - theirs) ** 2).sum() / (kernel**2).sum())
    method = decompositions["separable"]
    start = method.analyse(kernel, CONV, None).factors((6,))
    ours = refine(kernel, start, method.factors(CONV, (6,)), CONV, None, 100, 1e-7)[1][-1]
    assert ours <= 1.05 * their_error


@pytest.mark.parametrize("bound", [4.0, torch.inf])
def test_terms_that_would_grow_without_bound_are_stopped(
    bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["sft.decompositions.refine"], "GROWTH", bound)
    a, b = torch.eye(2, dtype=torch.float64)
    kernel = sum(torch.einsum("o,i,s->ois", *t) for t in ((a, a, b), (a, b, a), (b, a, a)))[None]
    geometry = Geometry(2, 2, (2,), (1,), (0,), (1,))
    method = decompositions["separable"]
    start = method.analyse(kernel, geometry, None).factors((2,))
    start = [k + 0.1 * torch.arange(1, k.numel() + 1).view(k.shape) for k in start]
    parts = method.factors(geometry, (2,))
    (first, taps, last), errors = refine(kernel, start, parts, geometry, None, 300, 0.0)
    energies = first[0].square().sum((1, 2)) * taps.square().sum((1, 2, 3))
    energies = energies * last[0].square().sum((0, 2))
    stayed = float(energies.sum()) <= 4 * float(kernel.square().sum()) * 1.001
    assert stayed == (bound == 4)
    assert errors[-1] < errors[0]


def test_the_covariance_of_patches_is_needed(seen) -> None:
    case = seen(CONV)
    kernels, parts = started("channel_in", case, CONV)
    without = dataclasses.replace(case.statistics, patch_covariance=None)
    with pytest.raises(InputError, match="covariance of its patches"):
        refine(case.kernel, kernels, parts, CONV, without)


def test_sweeps_and_tolerance_end_it(seen) -> None:
    case = seen(CONV)
    kernels, parts = started("separable", case, CONV)
    few = refine(case.kernel, kernels, parts, CONV, case.statistics, sweeps=3, tolerance=0)[1]
    assert len(few) == 4
    assert len(refine(case.kernel, kernels, parts, CONV, case.statistics, tolerance=0.9)[1]) == 2
    assert len(refine(case.kernel, kernels, parts, CONV, case.statistics, sweeps=0)[1]) == 1


def test_full_rank_has_nothing_to_refine(seen) -> None:
    case = seen(CONV)
    method = decompositions["tucker2"]
    full = method.full_rank(CONV)
    kernels = method.analyse(case.kernel, CONV, case.statistics).factors(full)
    parts = method.factors(CONV, full)
    found, _ = refine(case.kernel, kernels, parts, CONV, case.statistics)
    torch.testing.assert_close(compose(found, parts, CONV), case.kernel, rtol=1e-9, atol=1e-9)


def test_conjugate_gradients_and_ridge_solve_small_systems() -> None:
    torch.manual_seed(0)
    factor = torch.randn(1, 5, 9, dtype=torch.float64)
    matrix, right = factor @ factor.mT, torch.randn(1, 5, 2, dtype=torch.float64)
    exact = torch.linalg.solve(matrix, right)
    torch.testing.assert_close(solve_spd(matrix, right), exact, rtol=1e-6, atol=1e-7)
    step = conjugate_gradients(lambda x: matrix @ x, right)
    assert float((matrix @ step - right).norm()) < float(right.norm())
    singular = torch.ones(1, 4, 4, dtype=torch.float64)
    found = solve_spd(singular, singular[..., :1])
    torch.testing.assert_close(singular @ found, singular[..., :1], rtol=1e-6, atol=1e-6)
    assert bool(torch.isfinite(solve_spd(0 * singular, singular)).all())


@pytest.mark.parametrize("name", sorted(RANKS))
@pytest.mark.parametrize("place", [0, 1])
def test_the_gauge_changes_no_product(name: str, place: int, seen) -> None:
    case = seen(GROUPED)
    kernels, parts = started(name, case, GROUPED)
    moved = orthonormal_but(kernels, parts, place)
    torch.testing.assert_close(
        compose(moved, parts, GROUPED), compose(kernels, parts, GROUPED), rtol=1e-9, atol=1e-9
    )
    if name in ("channel_in", "tucker2") and place == 0:
        columns = moved[-1].mT.flatten(1, 2)
        identity = torch.eye(columns.shape[2], dtype=torch.float64).expand(2, -1, -1)
        torch.testing.assert_close(columns.mT @ columns, identity)


def test_geometry_of_the_layer_is_the_one_refined() -> None:
    layer = nn.ConvTranspose1d(6, 4, 3, stride=2).double()
    torch.manual_seed(0)
    plain = factorize(layer, "tucker2", (3, 2))
    better = factorize(layer, "tucker2", (3, 2), refine=True)
    kernel = to_canonical(layer.weight.detach(), geometry_of(layer))
    errors = [float((kernel - s.kernel().detach()).square().sum()) for s in (plain, better)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("geometry", [CONV, GROUPED, TRANSPOSED], ids=["c", "groups", "transposed"])
def test_plain_tucker2_is_rotated_monotonically_to_the_orthogonal_iteration(
    geometry: Geometry, seen
) -> None:
    kernel, rank = seen(geometry).kernel, RANKS["tucker2"]
    method = decompositions["tucker2"]
    parts = method.factors(geometry, rank)
    chain = method.analyse(kernel, geometry, None).factors(rank)
    errors = [data_error(kernel, chain, parts, geometry, None)]
    for _ in range(4):
        chain = rotate_subspaces(kernel, chain, sweeps=1)
        errors.append(data_error(kernel, chain, parts, geometry, None))
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < errors[0] or rank[1] == geometry.outputs // geometry.groups
    solved = rotate_subspaces(kernel, chain, sweeps=200, powers=20)
    best = data_error(kernel, solved, parts, geometry, None)
    gauge = refine(kernel, solved, parts, geometry, None, 50, 1e-9)[1][-1]
    assert best <= gauge * (1 + 1e-6)
