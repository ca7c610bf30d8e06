"""What every registered decomposition must keep, whatever it is, for every kind of layer."""

import dataclasses
import warnings

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sft.core.errors import InputError
from sft.core.geometry import Geometry
from sft.core.statistics import Statistics
from sft.decompositions import decompositions, factorize
from sft.decompositions.base import kernel_of
from sft.layers import build_layer, geometry_of
from sft.profiling.statistics import gather_statistics

NAMES = list(decompositions)
KINDS = ["linear", "conv1d", "conv2d", "conv3d", "transpose1d", "transpose2d", "transpose3d"]
CASES_OF_KIND = 75  # times schemes and kinds: more than 3,000 geometries in the slow suite

Case = tuple[nn.Module, Tensor]


@st.composite
def geometries(draw: st.DrawFn, kind: str) -> Geometry:
    """A small geometry of one kind: any stride, padding, dilation, mode and groups."""
    groups = draw(st.integers(1, 3))
    ends = [groups * draw(st.integers(2 if groups > 1 else 1, 4)) for _ in range(2)]
    if kind == "linear":
        return Geometry(ends[0], ends[1])
    axes, transposed = int(kind[-2]), kind.startswith("transpose")

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(axes))

    kernel, stride, dilation = each(1, 3), each(1, 2), each(1, 2)
    if not transposed and draw(st.integers(0, 4)) == 0:
        mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        return Geometry(*ends, kernel, (1,) * axes, "same", dilation, groups, mode)
    mode = (
        "zeros"
        if transposed
        else draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    )
    padding = each(0, 1)
    extra = tuple(
        draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
    )
    return Geometry(
        *ends, kernel, stride, padding, dilation, groups, mode, transposed,
        extra if transposed else (),
    )  # fmt: skip


@st.composite
def cases(draw: st.DrawFn, kind: str) -> Case:
    """A float64 layer of one kind, and an input that it takes."""
    geometry = draw(geometries(kind))
    torch.manual_seed(draw(st.integers(0, 10_000)))
    layer = build_layer(geometry, draw(st.booleans()), dtype=torch.float64)
    for parameter in layer.parameters():
        parameter.data.normal_()
    size = {0: (5,), 1: (13,), 2: (7, 8), 3: (6, 5, 7)}[geometry.axes]
    channels = (geometry.inputs,)
    shape = size + channels if geometry.axes == 0 else channels + size
    return layer, torch.randn(2, *shape, dtype=torch.float64) + 0.3


def any_case(kinds: list[str] = KINDS) -> st.SearchStrategy[Case]:
    return st.one_of(*(cases(kind) for kind in kinds))


def statistics_of(layer: nn.Module, x: Tensor, **options: object) -> Statistics:
    return gather_statistics(nn.Sequential(layer), ["0"], [x], **options)[0]["0"]


def check_exact(name: str, case: Case, data_aware: bool) -> None:
    """Full rank computes what the layer does, or the scheme says why it does not split it."""
    layer, x = case
    method = decompositions[name]
    if method.unsupported(layer):
        with pytest.raises(InputError, match="cannot be split"):
            factorize(layer, name, 1)
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel")
        statistics = statistics_of(layer, x) if data_aware else None
        small = factorize(layer, name, method.full_rank(geometry_of(layer)), statistics)
        wanted, got = layer(x).detach(), small(x).detach()
    assert got.shape == wanted.shape
    assert float((got - wanted).abs().max()) < 1e-10 * (1 + float(wanted.abs().max()))


@pytest.mark.parametrize("name", NAMES)
@given(case=any_case(), data_aware=st.booleans())
@settings(max_examples=40, deadline=None)
def test_full_rank_is_exact(name: str, case: Case, data_aware: bool) -> None:
    check_exact(name, case, data_aware)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=CASES_OF_KIND, deadline=None)
def test_full_rank_is_exact_on_many_geometries(name: str, kind: str, data: st.DataObject) -> None:
    check_exact(name, data.draw(cases(kind)), data.draw(st.booleans()))


@pytest.mark.parametrize("name", NAMES)
@given(case=any_case(["linear", "conv1d", "conv2d", "transpose2d"]), data_aware=st.booleans())
@settings(max_examples=25, deadline=None)
def test_errors_fall_with_the_rank_to_zero(name: str, case: Case, data_aware: bool) -> None:
    layer, x = case
    method = decompositions[name]
    if method.unsupported(layer):
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel")
        statistics = statistics_of(layer, x) if data_aware else None
    geometry = geometry_of(layer)
    errors = method.analyse(kernel_of(layer), geometry, statistics).errors
    assert tuple(errors.shape) == method.full_rank(geometry)
    for axis in range(errors.ndim):
        assert bool((errors.diff(dim=axis) <= 0).all())
    assert abs(float(errors.flatten()[-1])) < 1e-12


@pytest.mark.parametrize("name", NAMES)
@given(case=any_case(), share=st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_predicted_parameters_and_macs_are_the_counted_ones(
    name: str, case: Case, share: float
) -> None:
    layer, x = case
    method = decompositions[name]
    if method.unsupported(layer):
        return
    geometry = geometry_of(layer)
    rank = tuple(1 + int(share * (full - 1)) for full in method.full_rank(geometry))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel")
        small = factorize(layer, name, rank)
        with FlopCounterMode(display=False) as counter:
            small(x[:1])
    weights = sum(p.numel() for n, p in small.named_parameters() if n.endswith("weight"))
    assert method.params(geometry, rank) == weights
    size = tuple(x.shape[1:-1] if geometry.axes == 0 else x.shape[2:])
    assert method.macs(geometry, rank, size) == counter.get_total_flops() // 2


@pytest.mark.parametrize("name", NAMES)
def test_plain_error_is_that_of_the_approximation(name: str) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 9, 3).double()
    method = decompositions[name]
    geometry, kernel = geometry_of(conv), kernel_of(conv)
    errors = method.analyse(kernel, geometry, None).errors
    for rank in (errors > -1).nonzero()[::4].tolist():
        dense = kernel_of(factorize(conv, name, tuple(r + 1 for r in rank)).merge())
        measured = float((dense - kernel).square().sum() / kernel.square().sum())
        predicted = float(errors[tuple(rank)])
        assert measured <= predicted + 1e-9
        assert name == "residual" or measured == pytest.approx(predicted, abs=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_the_layer_itself_is_not_changed(name: str) -> None:
    conv = nn.Conv2d(6, 8, 3)
    before = {k: v.clone() for k, v in conv.state_dict().items()}
    state = torch.get_rng_state()
    factorize(conv, name, 2, refine=True)
    assert all(torch.equal(v, before[k]) for k, v in conv.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.Conv2d(8, 8, 3, groups=8), "depthwise"),
        (nn.BatchNorm2d(4), "BatchNorm2d"),
        (nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)), "parametrisation"),
    ],
)
def test_unsupported_layers_are_refused_with_a_reason(
    name: str, layer: nn.Module, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        factorize(layer, name, 2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rank", [(0, 0), (1000, 1000)])
def test_an_impossible_rank_is_refused(name: str, rank: tuple[int, int]) -> None:
    conv = nn.Conv2d(8, 8, 3)
    ranks = rank[: len(decompositions[name].full_rank(geometry_of(conv)))]
    with pytest.raises(InputError, match="does not fit"):
        factorize(conv, name, ranks)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept_and_the_rounding_is_that_of_the_dtype(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3).to(dtype)
    full = decompositions[name].full_rank(geometry_of(conv))
    small = factorize(conv, name, full)
    assert {p.dtype for p in small.parameters()} == {dtype}
    lost = kernel_of(small.merge()) - kernel_of(conv)
    error = float(lost.norm() / kernel_of(conv).norm())
    assert error < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", NAMES)
def test_the_split_layer_takes_flags_and_always_has_a_bias(name: str) -> None:
    conv = nn.Conv2d(6, 8, 3, bias=False).eval().requires_grad_(False)
    small = factorize(conv, name, 2)
    assert not small.training
    assert not any(p.requires_grad for n, p in small.named_parameters() if "weight" in n)
    assert small.bias is not None
    assert not small.bias.any()


@pytest.mark.parametrize("name", NAMES)
def test_statistics_in_single_parts_are_enough(name: str) -> None:
    """Whatever a scheme reads of the statistics, the optional moments may be missing."""
    torch.manual_seed(0)
    conv, x = nn.Conv2d(4, 5, 3).double(), torch.randn(3, 4, 9, 9).double()
    whole = statistics_of(conv, x, patch_covariances=["0"])
    nothing = {"input_mean": None, "input_covariance": None, "gradient_covariance": None}
    for kept in ("output_covariance", "patch_covariance"):
        dropped = {"output_covariance": None, "patch_covariance": None, **nothing}
        dropped[kept] = (
            getattr(whole, kept)
            if kept == "patch_covariance"
            else (whole.covariance_of_outputs(kernel_of(conv)))
        )
        small = factorize(conv, name, 2, dataclasses.replace(whole, **dropped))
        assert bool(torch.isfinite(small(x)).all())
