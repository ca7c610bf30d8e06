"""What every registered decomposition must keep, whatever it is."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sft.core.errors import InputError
from sft.core.statistics import Statistics
from sft.decompositions import decompositions, factorize
from sft.profiling.statistics import gather_statistics

NAMES = list(decompositions)


@st.composite
def geometries(draw: st.DrawFn) -> tuple[nn.Conv2d, torch.Tensor]:
    """A float64 convolution that is not 1x1, and an input for it."""
    kernel = draw(st.sampled_from([(3, 3), (1, 3), (3, 1), (2, 2), (5, 3)]))
    even = kernel == (2, 2)  # torch warns that "same" may copy the input there
    dilation = draw(st.integers(1, 2))
    padding: str | tuple[int, int] = draw(
        st.sampled_from([(0, 0), (1, 1), (2, 1), "valid" if even else "same", "valid"])
    )
    stride = 1 if padding == "same" else draw(st.sampled_from([1, 2, (2, 1)]))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    torch.manual_seed(draw(st.integers(0, 10_000)))
    conv = nn.Conv2d(
        draw(st.integers(1, 6)),
        draw(st.integers(1, 6)),
        kernel,
        stride,
        padding,
        dilation,
        bias=draw(st.booleans()),
        padding_mode=mode,
    ).double()
    return conv, torch.randn(2, conv.in_channels, 11, 12, dtype=torch.float64)


def statistics_of(conv: nn.Conv2d, x: torch.Tensor) -> Statistics:
    return gather_statistics(nn.Sequential(conv), ["0"], [x])[0]["0"]


@pytest.mark.parametrize("name", NAMES)
@given(case=geometries(), data_aware=st.booleans())
@settings(max_examples=40, deadline=None)
def test_full_rank_is_exact(
    name: str, case: tuple[nn.Conv2d, torch.Tensor], data_aware: bool
) -> None:
    conv, x = case
    statistics = statistics_of(conv, x) if data_aware else None
    small = factorize(conv, name, decompositions[name].full_rank(conv.weight.shape), statistics)
    torch.testing.assert_close(small(x), conv(x), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@given(case=geometries(), data_aware=st.booleans())
@settings(max_examples=1000, deadline=None)
def test_full_rank_is_exact_on_many_geometries(
    name: str, case: tuple[nn.Conv2d, torch.Tensor], data_aware: bool
) -> None:
    conv, x = case
    statistics = statistics_of(conv, x) if data_aware else None
    full = decompositions[name].full_rank(tuple(conv.weight.shape))
    error = (factorize(conv, name, full, statistics)(x) - conv(x)).detach().abs().max()
    assert float(error) < 1e-9 * (1 + float(conv(x).detach().abs().max()))


@pytest.mark.parametrize("name", NAMES)
@given(case=geometries(), data_aware=st.booleans())
@settings(max_examples=25, deadline=None)
def test_error_falls_with_the_rank_to_zero(
    name: str, case: tuple[nn.Conv2d, torch.Tensor], data_aware: bool
) -> None:
    conv, x = case
    method = decompositions[name]
    errors = method.errors(conv.weight, statistics_of(conv, x) if data_aware else None)
    assert len(errors) == method.full_rank(tuple(conv.weight.shape))
    assert bool((errors[1:] <= errors[:-1] + 1e-12).all())
    assert abs(float(errors[-1])) < 1e-9


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stride", [1, 2])
def test_predicted_parameters_and_macs_are_the_counted_ones(name: str, stride: int) -> None:
    conv = nn.Conv2d(12, 20, 3, stride, padding=1)
    small = factorize(conv, name, 5)
    x = torch.randn(1, 12, 14, 14)
    with FlopCounterMode(display=False) as counter:
        y = small(x)
    method, shape = decompositions[name], tuple(conv.weight.shape)
    weights = sum(p.numel() for n, p in small.named_parameters() if n.endswith("weight"))
    assert method.params(shape, 5) == weights
    assert method.macs(shape, 5, 14 * 14, y.shape[2] * y.shape[3]) == counter.get_total_flops() // 2


@pytest.mark.parametrize("name", NAMES)
def test_plain_error_is_that_of_the_best_approximation(name: str) -> None:
    conv = nn.Conv2d(6, 9, 3).double()
    for rank, error in enumerate(decompositions[name].errors(conv.weight, None), start=1):
        dense = factorize(conv, name, rank).merge()
        measured = (dense.weight - conv.weight).square().sum() / conv.weight.square().sum()
        assert float(measured.detach()) == pytest.approx(float(error), abs=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_the_layer_itself_is_not_changed(name: str) -> None:
    conv = nn.Conv2d(6, 8, 3)
    before = {k: v.clone() for k, v in conv.state_dict().items()}
    factorize(conv, name, 2)
    assert all(torch.equal(v, before[k]) for k, v in conv.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("layer", "word"),
    [
        (nn.Conv2d(8, 8, 3, groups=8), "groups"),
        (nn.Conv2d(8, 8, 1), "1x1"),
        (nn.Linear(4, 4), "Linear"),
    ],
)
def test_unsupported_layers_are_refused_with_a_reason(
    name: str, layer: nn.Module, word: str
) -> None:
    with pytest.raises(InputError, match=word):
        factorize(layer, name, 2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rank", [0, 1000])
def test_an_impossible_rank_is_refused(name: str, rank: int) -> None:
    with pytest.raises(InputError, match=f"Rank {rank} does not fit"):
        factorize(nn.Conv2d(8, 8, 3), name, rank)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept(name: str, dtype: torch.dtype) -> None:
    small = factorize(nn.Conv2d(8, 8, 3).to(dtype), name, 3)
    assert {p.dtype for p in small.parameters()} == {dtype}
