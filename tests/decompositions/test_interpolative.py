"""The interpolative scheme: the function of channel_out, in fewer weights."""

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sft.core.errors import InputError
from sft.core.geometry import Geometry
from sft.core.statistics import Statistics
from sft.decompositions import decompositions, factorize
from sft.decompositions.base import kernel_of
from sft.decompositions.interpolative import LARGEST, _interpolate, choose_rows
from sft.layers import InterpolativeSFT, geometry_of
from sft.profiling.statistics import gather_statistics

SCHEME = "interpolative"
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(7, 9), (4, 7)),
    "wide linear": (lambda: nn.Linear(3, 9), (3,)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, 2, padding=1), (4, 11)),
    "conv2d": (lambda: nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"), (3, 7, 6)),
    "grouped": (lambda: nn.Conv2d(6, 8, (3, 1), groups=2, bias=False), (6, 6, 6)),
    "pointwise": (lambda: nn.Conv2d(5, 8, 1, 2), (5, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 5, 2, dilation=2), (2, 5, 5, 4)),
    "transpose1d": (lambda: nn.ConvTranspose1d(6, 6, 3, 2, groups=3), (6, 7)),
    "transpose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1), (4, 4, 5)),
    "transpose3d": (lambda: nn.ConvTranspose3d(2, 6, 2, bias=False), (2, 3, 4, 3)),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


def made(name: str) -> tuple[nn.Module, Tensor]:
    """A float64 layer and inputs with a mean, far from white."""
    torch.manual_seed(1)
    make, shape = LAYERS[name]
    layer = make().double()
    x = torch.randn(12, *shape, dtype=torch.float64).cumsum(1) + 0.5
    return layer, x


def known(layer: nn.Module, x: Tensor) -> Statistics:
    return gather_statistics(nn.Sequential(layer), ["0"], [x], patch_covariances=["0"])[0]["0"]


def ranks(layer: nn.Module) -> range:
    return range(1, decompositions[SCHEME].full_rank(geometry_of(layer))[0] + 1)


@each_layer
@pytest.mark.parametrize("aware", [False, True])
def test_it_is_channel_out_s_function_at_every_rank(name: str, aware: bool) -> None:
    layer, x = made(name)
    statistics = known(layer, x) if aware else None
    assert ranks(layer)[-1] == decompositions["channel_out"].full_rank(geometry_of(layer))[0]
    for rank in ranks(layer):
        one = factorize(layer, SCHEME, rank, statistics)
        other = factorize(layer, "channel_out", rank, statistics)
        assert isinstance(one, InterpolativeSFT)
        torch.testing.assert_close(one(x), other(x), rtol=0, atol=1e-10)
        torch.testing.assert_close(one.merge()(x), other(x), rtol=0, atol=1e-10)
        torch.testing.assert_close(one.bias, other.bias, rtol=0, atol=1e-10)
    torch.testing.assert_close(one(x), layer(x), rtol=0, atol=1e-10)


@each_layer
@pytest.mark.parametrize("aware", [False, True])
def test_the_menu_is_channel_out_s(name: str, aware: bool) -> None:
    layer, x = made(name)
    statistics = known(layer, x) if aware else None
    found, wanted = (
        decompositions[scheme].analyse(kernel_of(layer), geometry_of(layer), statistics)
        for scheme in (SCHEME, "channel_out")
    )
    assert torch.equal(found.errors, wanted.errors)
    method = decompositions[SCHEME]
    for rank in ranks(layer):
        parts = method.factors(geometry_of(layer), (rank,))
        shapes = [(p.groups, p.outputs // p.groups, p.inputs // p.groups, p.taps) for p in parts]
        assert [tuple(kernel.shape) for kernel in found.factors((rank,))] == shapes


def test_the_error_on_the_data_is_the_one_of_the_menu() -> None:
    layer, x = made("grouped")
    statistics = known(layer, x)
    errors = decompositions[SCHEME].analyse(kernel_of(layer), geometry_of(layer), statistics).errors
    wanted = layer(x).detach()
    variance = (wanted - wanted.mean((0, 2, 3), keepdim=True)).square().sum()
    for rank in ranks(layer):
        lost = factorize(layer, SCHEME, rank, statistics)(x).detach() - wanted
        assert float(lost.square().sum() / variance) == pytest.approx(
            float(errors[rank - 1]), abs=1e-5
        )


@each_layer
def test_weights_are_the_degrees_of_freedom_and_macs_are_counted(name: str) -> None:
    layer, x = made(name)
    geometry, method = geometry_of(layer), decompositions[SCHEME]
    groups = geometry.groups
    outputs, read = geometry.outputs // groups, geometry.inputs // groups * geometry.taps
    size = tuple(x.shape[1:-1] if geometry.axes == 0 else x.shape[2:])
    for rank in ranks(layer):
        small = factorize(layer, SCHEME, rank)
        weights = sum(p.numel() for n, p in small.named_parameters() if n.endswith("weight"))
        assert weights == groups * rank * (read + outputs - rank) <= geometry.params
        assert weights == method.params(geometry, (rank,))
        with FlopCounterMode(display=False) as counter:
            small(x[:1])
        assert method.macs(geometry, (rank,), size) == counter.get_total_flops() // 2
        if rank < outputs and not geometry.transposed:
            assert method.params(geometry, (rank,)) < decompositions["channel_out"].params(
                geometry, (rank,)
            )


@given(
    rank=st.integers(1, 12), more=st.integers(0, 40), seed=st.integers(0, 10_000),
    steep=st.floats(0, 6),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_chosen_rows_span_the_others_with_bounded_weights(
    rank: int, more: int, seed: int, steep: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(rank + more, rank, generator=generator, dtype=torch.float64)
    basis *= torch.logspace(0, -steep, rank, dtype=torch.float64)
    rows = choose_rows(basis)
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert len(rows) == rank
    mixing = torch.linalg.solve(basis[rows].T, basis.T).T
    assert float(mixing.abs().max()) <= LARGEST * (1 + 1e-6)
    assert int(torch.linalg.matrix_rank(basis[rows] / basis.norm(dim=0))) == rank


def test_rows_are_exchanged_where_pivoting_alone_leaves_a_large_entry() -> None:
    """The matrix of Kahan, for which the greedy choice is bad; here made of its rows."""
    size, c = 30, 0.285
    s = (1 - c**2) ** 0.5
    upper = torch.eye(size, dtype=torch.float64) - c * torch.ones(size, size).double().triu(1)
    kahan = torch.diag(s ** torch.arange(size, dtype=torch.float64)) @ upper
    basis = kahan.T[:, : size - 1].contiguous()
    greedy = torch.linalg.solve(basis[: size - 1].T, basis.T).T
    assert float(greedy.abs().max()) > LARGEST
    rows = choose_rows(basis)
    mixing = torch.linalg.solve(basis[rows].T, basis.T).T
    assert float(mixing.abs().max()) <= LARGEST * (1 + 1e-6)


def test_the_rows_have_the_greatest_volume_up_to_the_bound() -> None:
    torch.manual_seed(0)
    basis = torch.randn(7, 3, dtype=torch.float64)
    volumes = {
        rows: float(basis[list(rows)].det().abs()) for rows in itertools.combinations(range(7), 3)
    }
    chosen = tuple(choose_rows(basis).tolist())
    neighbours = [v for rows, v in volumes.items() if len(set(rows) & set(chosen)) == 2]
    assert max(neighbours) <= LARGEST * volumes[chosen] * (1 + 1e-9)


def test_weights_stay_moderate_where_outputs_nearly_repeat() -> None:
    """Doubled outputs: a bad choice would take one output from the small difference of two."""
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 12, 3).double()
    with torch.no_grad():
        conv.weight[6:] = conv.weight[:6] + 1e-7 * torch.randn_like(conv.weight[6:])
    for rank in (3, 6, 9):
        small = factorize(conv, SCHEME, rank)
        assert float(small.second.weight.detach().abs().max()) <= LARGEST * (1 + 1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_is_that_of_the_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 10, 3)
    whole = factorize(conv.to(dtype).double(), SCHEME, 5)
    small = factorize(conv.to(dtype), SCHEME, 5)
    assert {p.dtype for p in small.parameters()} == {dtype}
    lost = kernel_of(small.merge()) - kernel_of(whole.merge())
    assert float(lost.norm() / kernel_of(whole.merge()).norm()) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("rank", [0, 9, (2, 2)])
def test_a_rank_that_does_not_fit_is_named(rank: int | tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="does not fit"):
        factorize(nn.Conv2d(4, 8, 3), SCHEME, rank)
    with pytest.raises(InputError, match="does not fit"):
        factorize(nn.Linear(4, 8), SCHEME, 5)


def test_what_is_trained_stays_what_was_trained() -> None:
    conv = nn.Conv2d(4, 8, 3)
    assert all(p.requires_grad for p in factorize(conv, SCHEME, 3).parameters())
    conv.requires_grad_(False)
    assert not any(p.requires_grad for p in factorize(conv, SCHEME, 3).parameters())


def test_the_gradient_s_metric_chooses_the_subspace_here_too(seen) -> None:
    geometry = Geometry(6, 8, (2, 3), (1, 2), (1, 1), (1, 1), groups=2)
    case = seen(geometry, gradients=True)
    for rank in (1, 2, 3, 4):
        one, other = (
            decompositions[s].analyse(case.kernel, geometry, case.statistics).factors((rank,))
            for s in (SCHEME, "channel_out")
        )
        layer = InterpolativeSFT(geometry, rank, dtype=torch.float64)
        chosen = _interpolate(*other)[0]
        layer.select(chosen)
        wanted = (other[1][..., 0] @ other[0].flatten(2)).view(case.kernel.shape)
        torch.testing.assert_close(layer.product(one), wanted, rtol=0, atol=1e-10)
