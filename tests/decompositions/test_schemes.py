"""Each scheme's menu against singular value decompositions and against measured errors."""

import dataclasses
import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from sft.core.geometry import Geometry
from sft.core.statistics import Statistics
from sft.decompositions import Metric, decompositions
from sft.decompositions.base import unsupported_layer
from sft.layers import compose, geometry_of, to_canonical

CHAINS = ["channel_in", "channel_out", "separable", "spatial", "tucker2"]
GEOMETRIES = [
    Geometry(6, 8, (3, 3), (1, 1), (1, 1), (1, 1)),
    Geometry(6, 8, (2, 3), (1, 2), (1, 1), (1, 1), groups=2),
    Geometry(4, 1, (3, 2), (1, 1), (0, 0), (1, 1)),
    Geometry(1, 9, (2, 2), (1, 1), (0, 0), (1, 1)),
    Geometry(4, 6, (2, 1, 3), (1, 1, 1), (0, 0, 0), (1, 1, 1)),
    Geometry(6, 4, (3, 2), (2, 1), (0, 0), (1, 1), transposed=True, output_padding=(1, 0)),
]


def every_rank(full: tuple[int, ...]) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(1, most + 1) for most in full)))


def product(name: str, kernels: list[Tensor], geometry: Geometry, rank: tuple[int, ...]) -> Tensor:
    return compose(kernels, decompositions[name].factors(geometry, rank), geometry)


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize(
    "geometry", GEOMETRIES, ids=lambda g: "x".join(map(str, (g.inputs, g.outputs, *g.kernel)))
)
@pytest.mark.parametrize("aware", [False, True])
def test_the_menu_is_measured_at_every_rank(
    name: str, geometry: Geometry, aware: bool, seen
) -> None:
    case = seen(geometry, gradients=aware, separable=True)
    statistics = _along_axes(case.statistics, geometry, name) if aware else None
    method, kernel = decompositions[name], case.kernel
    found = method.analyse(kernel, geometry, statistics)
    full = method.full_rank(geometry)
    assert tuple(found.errors.shape) == full
    metric = Metric.of(statistics, kernel)
    for rank in every_rank(full)[:: 1 if len(full) == 1 else 5]:
        approximation = product(name, found.factors(rank), geometry, rank)
        predicted = float(found.errors[tuple(r - 1 for r in rank)])
        assert metric.error(kernel, approximation) == pytest.approx(predicted, abs=2e-5)
        if aware and name == "channel_out":
            measured = case.output_error(approximation, weighted=True)
            assert measured == pytest.approx(predicted, abs=1e-5)


def _along_axes(statistics: Statistics, geometry: Geometry, name: str) -> Statistics:
    """For `spatial`, whose metric is the product of marginals: taps whose covariance is one."""
    if name != "spatial":
        return statistics
    covariance = torch.ones(1, 1, dtype=torch.float64)
    for extent in geometry.kernel:
        place = torch.arange(extent, dtype=torch.float64)
        covariance = torch.kron(covariance, 0.7 ** (place[:, None] - place).abs())
    return dataclasses.replace(statistics, tap_covariance=covariance)


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize(
    "geometry", GEOMETRIES, ids=lambda g: "x".join(map(str, (g.inputs, g.outputs, *g.kernel)))
)
@pytest.mark.parametrize("aware", [False, True])
def test_errors_do_not_rise_and_end_at_zero(
    name: str, geometry: Geometry, aware: bool, seen
) -> None:
    case = seen(geometry)
    found = decompositions[name].analyse(case.kernel, geometry, case.statistics if aware else None)
    for axis in range(found.errors.ndim):
        assert bool((found.errors.diff(dim=axis) <= 0).all())
    assert float(found.errors.flatten()[-1]) == 0
    assert float(found.errors.max()) <= 1


def unfolded(name: str, kernel: Tensor, geometry: Geometry) -> Tensor:
    """The matrix whose singular values make the plain menu, group by group."""
    if name == "channel_out":
        return kernel.flatten(2)
    if name == "channel_in":
        return kernel.permute(0, 2, 1, 3).flatten(2)
    axis = next(a for a, extent in enumerate(geometry.kernel) if extent > 1)
    opened = kernel.reshape(*kernel.shape[:3], *geometry.kernel).movedim(3 + axis, 3)
    return opened.flatten(4).permute(0, 2, 3, 1, 4).flatten(1, 2).flatten(2)


@pytest.mark.parametrize("name", ["channel_in", "channel_out", "spatial"])
@pytest.mark.parametrize(
    "geometry", GEOMETRIES, ids=lambda g: "x".join(map(str, (g.inputs, g.outputs, *g.kernel)))
)
def test_plain_menus_are_optimal_as_eckart_and_young_say(
    name: str, geometry: Geometry, seen
) -> None:
    kernel = seen(geometry).kernel
    found = decompositions[name].analyse(kernel, geometry, None)
    s = torch.linalg.svdvals(unfolded(name, kernel, geometry)).square()
    for rank, error in enumerate(found.errors.tolist(), start=1):
        wanted = float(s[:, rank:].sum() / s.sum())
        assert error == pytest.approx(wanted, abs=1e-6)
        best = product(name, found.factors((rank,)), geometry, (rank,))
        measured = float((kernel - best).square().sum() / kernel.square().sum())
        assert measured == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(
    "geometry", GEOMETRIES[:3], ids=lambda g: "x".join(map(str, (g.inputs, g.outputs, *g.kernel)))
)
def test_channel_out_is_the_whitened_svd(geometry: Geometry, gradients: bool, seen) -> None:
    case = seen(geometry, gradients=gradients)
    found = decompositions["channel_out"].analyse(case.kernel, geometry, case.statistics)
    root = torch.linalg.cholesky(case.statistics.patch_covariance)
    rows = case.kernel.flatten(2) @ root
    if gradients:
        rows = torch.linalg.cholesky(case.statistics.gradient_covariance).mT @ rows
    s = torch.linalg.svdvals(rows).square()
    for rank, error in enumerate(found.errors.tolist(), start=1):
        assert error == pytest.approx(float(s[:, rank:].sum() / s.sum()), abs=1e-5)


@pytest.mark.parametrize("name", ["channel_in", "separable", "tucker2"])
def test_a_separable_covariance_makes_the_menu_the_error_on_the_data(name: str, seen) -> None:
    geometry = GEOMETRIES[0]
    case = seen(geometry, separable=True)
    method = decompositions[name]
    found = method.analyse(case.kernel, geometry, case.statistics)
    rank = tuple(max(1, r // 2) for r in method.full_rank(geometry))
    approximation = product(name, found.factors(rank), geometry, rank)
    predicted = float(found.errors[tuple(r - 1 for r in rank)])
    assert case.output_error(approximation) == pytest.approx(predicted, rel=1e-3)
    plain = product(name, method.analyse(case.kernel, geometry, None).factors(rank), geometry, rank)
    assert predicted < case.output_error(plain)


@pytest.mark.parametrize("name", ["channel_in", "spatial", "separable", "tucker2"])
def test_factors_have_one_root_mean_square(name: str, seen) -> None:
    geometry = GEOMETRIES[0]
    case = seen(geometry)
    rank = (3, 3) if name == "tucker2" else (3,)
    kernels = decompositions[name].analyse(case.kernel, geometry, case.statistics).factors(rank)
    if name == "separable":
        norms = torch.stack([kernels[0].norm(dim=2).flatten(), kernels[1].norm(dim=3).flatten()])
        torch.testing.assert_close(norms[0], norms[1])
        torch.testing.assert_close(kernels[2].norm(dim=1).flatten(), norms[0])
    else:
        sizes = torch.stack([kernel.square().mean() for kernel in kernels])
        torch.testing.assert_close(sizes, sizes[:1].expand(len(sizes)))


def test_separable_terms_are_orthogonal_and_nested(seen) -> None:
    geometry = GEOMETRIES[0]
    kernel = seen(geometry).kernel
    found = decompositions["separable"].analyse(kernel, geometry, None)
    first, taps, last = found.factors(decompositions["separable"].full_rank(geometry))
    terms = torch.einsum(
        "ri,rs,or->rois", first[0, ..., 0], taps[:, 0, 0], last[0, ..., 0]
    ).flatten(1)
    gram = terms @ terms.T
    assert float((gram - gram.diagonal().diag()).abs().max()) < 1e-12 * float(gram.max())
    torch.testing.assert_close(gram.diagonal(), found.energies[0][0], rtol=1e-9, atol=1e-9)
    smaller = found.factors((5,))
    torch.testing.assert_close(smaller[0], first[:, :5])


def test_a_kernel_of_low_rank_is_recognised() -> None:
    torch.manual_seed(0)
    geometry = GEOMETRIES[0]
    for name, rank in [("channel_in", 2), ("channel_out", 3), ("spatial", 2), ("separable", 1)]:
        parts = decompositions[name].factors(geometry, (rank,))
        kernels = [
            torch.randn(p.groups, p.outputs // p.groups, p.inputs // p.groups, p.taps).double()
            for p in parts
        ]
        kernel = compose(kernels, parts, geometry)
        errors = decompositions[name].analyse(kernel, geometry, None).errors
        assert float(errors[rank - 1]) < 1e-14
        assert rank == 1 or float(errors[rank - 2]) > 1e-3


@pytest.mark.parametrize("name", list(decompositions))
def test_a_kernel_of_zeros_is_split_without_error(name: str) -> None:
    geometry = GEOMETRIES[0]
    method = decompositions[name]
    zero = torch.zeros(1, 8, 6, 9, dtype=torch.float64)
    found = method.analyse(zero, geometry, None)
    assert not found.errors.any()
    for kernel in found.factors(tuple(1 for _ in method.full_rank(geometry))):
        assert bool(torch.isfinite(kernel).all())


@given(seed=st.integers(0, 10_000), dead=st.integers(0, 5))
@settings(max_examples=15, deadline=None)
@pytest.mark.parametrize("name", CHAINS)
def test_dead_channels_and_constant_data_keep_full_rank_exact(
    name: str, seed: int, dead: int, seen
) -> None:
    geometry = Geometry(6, 5, (3, 2), (1, 1), (0, 0), (1, 1))
    case = seen(geometry, seed)
    patches = case.patches.clone().view(1, 6, 6, -1)
    patches[:, : dead + 1] = 1.5
    centred = patches.flatten(1, 2) - patches.flatten(1, 2).mean(2, keepdim=True)
    covariance = centred @ centred.mT / centred.shape[2]
    rows = case.kernel.flatten(2)
    changed = dataclasses.replace(
        case.statistics,
        patch_covariance=covariance,
        input_covariance=covariance.view(1, 6, 6, 6, 6).diagonal(dim1=2, dim2=4).mean(-1),
        output_covariance=rows @ covariance @ rows.mT,
    )
    full = decompositions[name].full_rank(geometry)
    kernels = decompositions[name].analyse(case.kernel, geometry, changed).factors(full)
    error = (product(name, kernels, geometry, full) - case.kernel).abs().max()
    assert float(error) < 1e-10 * float(case.kernel.abs().max())


@pytest.mark.parametrize("name", CHAINS)
def test_singular_covariances_on_every_mode_keep_full_rank_exact(name: str, seen) -> None:
    """All covariances of rank one, so that every root has the condition that is allowed at most."""
    geometry = Geometry(9, 2, (2, 2), (1, 1), (0, 0), (1, 1))
    case = seen(geometry)
    size = case.statistics.patch_mean.shape[1]
    ones = case.statistics.patch_mean.new_ones
    rows = case.kernel.flatten(2).sum(2, keepdim=True)
    singular = dataclasses.replace(
        case.statistics,
        tap_covariance=ones(4, 4),
        input_covariance=ones(1, 9, 9),
        patch_covariance=ones(1, size, size),
        output_covariance=rows @ rows.mT,
        gradient_covariance=ones(1, 2, 2),
    )
    full = decompositions[name].full_rank(geometry)
    kernels = decompositions[name].analyse(case.kernel, geometry, singular).factors(full)
    error = (product(name, kernels, geometry, full) - case.kernel).abs().max()
    assert float(error) < 1e-9 * float(case.kernel.abs().max())


def test_the_same_kernel_gives_the_same_factors(seen) -> None:
    geometry = GEOMETRIES[1]
    case = seen(geometry)
    for name in CHAINS:
        method = decompositions[name]
        rank = tuple(max(1, r - 1) for r in method.full_rank(geometry))
        runs = [
            method.analyse(case.kernel.clone(), geometry, case.statistics).factors(rank)
            for _ in range(2)
        ]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.Conv2d(8, 8, 3, groups=8), "depthwise"),
        (nn.BatchNorm2d(4), "BatchNorm2d"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), "parametrisation"),
        (nn.Linear(4, 4).half().requires_grad_(False), None),
        (nn.Conv2d(4, 4, 3, dtype=torch.complex64), "complex64"),
    ],
)
def test_what_no_scheme_splits(layer: nn.Module, words: str | None) -> None:
    reason = unsupported_layer(layer)
    assert reason is None if words is None else words in reason


def test_a_kernel_with_nan_is_refused() -> None:
    layer = nn.Linear(3, 3)
    layer.weight.data[0, 0] = torch.nan
    assert "NaN" in unsupported_layer(layer)


def test_a_subclass_is_refused() -> None:
    class Own(nn.Conv2d):
        pass

    assert "Own" in unsupported_layer(Own(4, 4, 3))


@pytest.mark.parametrize(
    ("name", "layer", "words"),
    [
        ("spatial", nn.Conv2d(4, 4, (3, 1)), "two axes"),
        ("spatial", nn.Linear(4, 4), "two axes"),
        ("tucker2", nn.Conv1d(4, 4, 1), "one tap"),
        ("separable", nn.Linear(4, 4), "one tap"),
        ("channel_in", nn.Conv2d(4, 4, 1), None),
        ("residual", nn.Linear(4, 4), None),
    ],
)
def test_what_a_scheme_in_particular_does_not_split(
    name: str, layer: nn.Module, words: str | None
) -> None:
    reason = decompositions[name].unsupported(layer)
    assert reason is None if words is None else words in reason


def test_channel_in_of_one_tap_equals_channel_out(seen) -> None:
    layer = nn.Linear(7, 5).double()
    geometry = geometry_of(layer)
    case = seen(geometry)
    kernel = to_canonical(layer.weight.detach(), geometry)
    for statistics in (None, case.statistics):
        one, other = (
            decompositions[name].analyse(kernel, geometry, statistics)
            for name in ("channel_in", "channel_out")
        )
        torch.testing.assert_close(one.errors, other.errors)
