"""Freely fitted terms of a separable kernel, against exact terms, nested ones and tensorly."""

import pytest
import torch
from torch import Tensor, nn

from sft.core.geometry import Geometry
from sft.decompositions import data_error, decompositions, factorize
from sft.decompositions.polyadic import fit_terms

GROUPED = Geometry(8, 12, (2, 3), (1, 1), (1, 1), (1, 1), groups=2)
CONV = Geometry(12, 16, (3, 3), (1, 1), (1, 1), (1, 1))
TRANSPOSED = Geometry(12, 8, (3,), (2,), (0,), (1,), transposed=True, output_padding=(1,))
SEPARABLE = decompositions["separable"]


def drawn(geometry: Geometry, seed: int = 0) -> Tensor:
    """A canonical kernel whose channels and taps differ in strength."""
    torch.manual_seed(seed)
    groups, outputs, inputs = geometry.groups, geometry.outputs, geometry.inputs
    kernel = torch.randn(groups, outputs // groups, inputs // groups, geometry.taps).double()
    for axis in (1, 2, 3):
        size = kernel.shape[axis]
        scale = torch.arange(1, size + 1).double() ** -0.7
        basis = torch.linalg.qr(torch.randn(size, size).double()).Q * scale
        kernel = (kernel.movedim(axis, -1) @ basis.T).movedim(-1, axis)
    return kernel


def error(kernel: Tensor, kernels: list[Tensor], geometry: Geometry, rank: int) -> float:
    return data_error(kernel, kernels, SEPARABLE.factors(geometry, (rank,)), geometry, None)


def growth(kernel: Tensor, kernels: list[Tensor]) -> float:
    """Energies of all terms, relative to the kernel's."""
    first, taps, last = kernels
    groups = len(kernel)
    energies = first.square().sum((2, 3)) * taps.square().sum((1, 2, 3)).view(groups, -1)
    energies = energies * last.square().sum((1, 3))
    return float(energies.sum() / kernel.square().sum())


@pytest.mark.parametrize("geometry", [CONV, GROUPED, TRANSPOSED], ids=["conv", "groups", "t"])
@pytest.mark.parametrize("rank", [1, 3, 6, 10])
def test_free_terms_are_better_than_nested_ones(geometry: Geometry, rank: int) -> None:
    kernel = drawn(geometry)
    nested = SEPARABLE.analyse(kernel, geometry, None).factors((rank,))
    free = fit_terms(kernel, rank, 1e-4)
    assert [k.shape for k in free] == [k.shape for k in nested]
    assert all(k.dtype == torch.float64 and not k.is_inference() for k in free)
    assert error(kernel, free, geometry, rank) <= error(kernel, nested, geometry, rank) + 1e-9


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_terms_that_a_kernel_is_made_of_are_found(scale: float) -> None:
    torch.manual_seed(0)
    a, b, c = (torch.randn(2, size, 3).double() for size in (12, 10, 9))
    kernel = scale * torch.einsum("gor,gir,gsr->gois", a, b, c)
    geometry = Geometry(20, 24, (3, 3), (1, 1), (1, 1), (1, 1), groups=2)
    found = fit_terms(kernel, 3, 1e-5, sweeps=400, tolerance=0.0)
    assert error(kernel, found, geometry, 3) < 1e-6
    levels = [float(vector.norm()) for vector in (found[0][0, 0], found[1][0], found[2][0, :, 0])]
    assert max(levels) < 1.001 * min(levels)


def test_it_is_as_good_as_tensorly_with_many_iterations() -> None:
    pytest.importorskip("tensorly")
    from tensorly.decomposition import parafac

    kernel, rank = drawn(CONV), 9
    weights, (u, v, c) = parafac(
        kernel[0].numpy(), rank, n_iter_max=100, init="random", random_state=0, tol=1e-9
    )
    u, v, c = (torch.as_tensor(factor) for factor in (u * weights, v, c))
    theirs = torch.einsum("or,ir,sr->ois", u, v, c)
    their_error = float((kernel[0] - theirs).square().sum() / kernel.square().sum())
    assert error(kernel, fit_terms(kernel, rank, 1e-4), CONV, rank) <= 1.02 * their_error


def test_the_penalty_bounds_terms_that_would_grow_without_bound() -> None:
    a, b = torch.eye(2, dtype=torch.float64)
    kernel = sum(torch.einsum("o,i,s->ois", *t) for t in ((a, a, b), (a, b, a), (b, a, a)))[None]
    geometry = Geometry(2, 2, (2,), (1,), (0,), (1,))
    found = [fit_terms(kernel, 2, penalty, 400, 0.0) for penalty in (1e-1, 1e-3, 1e-5)]
    levels = [growth(kernel, kernels) for kernels in found]
    errors = [error(kernel, kernels, geometry, 2) for kernels in found]
    assert levels[0] < 1.5
    assert levels[0] < levels[1] < levels[2] < 200
    assert errors[0] > errors[1] > errors[2] > 0


def test_sweeps_and_tolerance_end_it() -> None:
    kernel = drawn(CONV)
    few, many = (error(kernel, fit_terms(kernel, 6, sweeps=n), CONV, 6) for n in (2, 60))
    assert many < few
    strict, loose = (
        error(kernel, fit_terms(kernel, 6, sweeps=20, tolerance=t), CONV, 6) for t in (0.0, 0.5)
    )
    assert strict < loose


def test_a_kernel_of_zeros_and_one_group_of_zeros_stay_finite() -> None:
    kernel = drawn(GROUPED)
    kernel[1] = 0
    found = fit_terms(kernel, 3)
    assert all(bool(torch.isfinite(k).all()) for k in found)
    assert error(kernel, found, GROUPED, 3) < 0.5
    assert all(bool(torch.isfinite(k).all()) for k in fit_terms(0 * kernel, 3))


def test_the_global_random_state_is_not_touched_and_results_repeat() -> None:
    kernel = drawn(CONV)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = fit_terms(kernel, 14)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first, fit_terms(kernel, 14), strict=True))


def test_a_refined_layer_takes_the_better_of_free_and_nested_terms() -> None:
    layer = nn.Conv2d(12, 16, 3).double()
    layer.weight.data.copy_(drawn(CONV).view(16, 12, 3, 3))
    for rank in (4, 9 * 12):
        lost = [
            float((layer.weight - small.merge().weight).detach().square().sum())
            for small in (factorize(layer, "separable", rank, refine=r) for r in (False, True))
        ]
        assert lost[1] < lost[0] if rank == 4 else lost[1] < 1e-20
