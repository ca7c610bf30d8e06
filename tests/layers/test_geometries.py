"""Drawn layers of every kind: geometry, canonical kernel, and factors against the merged layer."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sft.core.errors import InputError
from sft.core.geometry import chain_macs, chain_params
from sft.layers import (
    CHAINS,
    build_layer,
    factorized_like,
    from_canonical,
    geometry_of,
    residual_like,
    to_canonical,
)

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
SIZES = (7, 6, 5)
even_kernels = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def per_axis(draw: st.DrawFn, axes: int, low: int, high: int) -> int | tuple[int, ...]:
    one = st.integers(low, high)
    return draw(st.one_of(one, st.tuples(*[one] * axes)))


def as_tuple(value: Any, axes: int) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,) * axes


@st.composite
def convolution_arguments(draw: st.DrawFn, axes: int, transposed: bool) -> dict[str, Any]:
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    arguments: dict[str, Any] = {
        "in_channels": groups * draw(st.integers(1, 3)),
        "out_channels": groups * draw(st.integers(1, 3)),
        "kernel_size": per_axis(draw, axes, 1, 3),
        "stride": per_axis(draw, axes, 1, 3),
        "padding": per_axis(draw, axes, 0, 2),
        "dilation": per_axis(draw, axes, 1, 2),
        "groups": groups,
    }
    if transposed:
        stride, dilation = (as_tuple(arguments[k], axes) for k in ("stride", "dilation"))
        room = [max(s, d) - 1 for s, d in zip(stride, dilation, strict=True)]
        arguments["output_padding"] = tuple(draw(st.integers(0, most)) for most in room)
        return arguments
    arguments["padding_mode"] = draw(
        st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"])
    )
    named = draw(st.sampled_from([None, None, "same", "valid"]))
    if named:
        arguments["padding"] = named
    if named == "same":
        arguments["stride"] = 1
    return arguments


@st.composite
def layers(draw: st.DrawFn) -> tuple[nn.Module, torch.Tensor]:
    """A layer in float64 with random weights, and an input that is large enough for it."""
    axes, transposed = draw(st.integers(0, 3)), draw(st.booleans())
    bias, batch = draw(st.booleans()), draw(st.sampled_from([(), (1,), (2,)]))
    torch.manual_seed(draw(st.integers(0, 9)))
    if axes == 0:
        inputs, outputs = draw(st.integers(1, 5)), draw(st.integers(1, 5))
        x = torch.randn(*batch, inputs, dtype=torch.float64)
        return nn.Linear(inputs, outputs, bias, dtype=torch.float64), x
    kind = (TRANSPOSED if transposed else CONVOLUTIONS)[axes - 1]
    arguments = draw(convolution_arguments(axes, transposed))
    layer = kind(**arguments, bias=bias, dtype=torch.float64)
    x = torch.randn(*batch, arguments["in_channels"], *SIZES[:axes], dtype=torch.float64)
    try:
        assume(min(layer(x).shape) > 0)
    except RuntimeError:  # a kernel larger than its padded input
        assume(False)
    return layer, x


def counted_macs(run: Callable[[], Any]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2


def ranks(draw: Any, scheme: str) -> tuple[int, ...]:
    return tuple(draw(st.integers(1, 4)) for _ in range(2 if scheme == "tucker2" else 1))


@even_kernels
@settings(max_examples=120, deadline=None)
@given(layers())
def test_geometry_and_layer_are_each_other_s_inverse(case: tuple[nn.Module, torch.Tensor]) -> None:
    layer, x = case
    geometry = geometry_of(layer)
    assert geometry.weight_shape == layer.weight.shape
    assert geometry.params == layer.weight.numel()
    built = build_layer(geometry, layer.bias is not None, dtype=torch.float64)
    assert type(built) is type(layer)
    assert geometry_of(built) == geometry
    assert not any(parameter.any() for parameter in built.parameters())
    built.load_state_dict(layer.state_dict())
    assert torch.equal(built(x), layer(x))


@even_kernels
@settings(max_examples=120, deadline=None)
@given(layers())
def test_output_size_and_macs_are_the_counted_ones(case: tuple[nn.Module, torch.Tensor]) -> None:
    layer, x = case
    geometry = geometry_of(layer)
    x = x if x.ndim == geometry.axes + 1 else x[0]
    size = tuple(x.shape[1:])
    assert geometry.output_size(size) == layer(x).shape[1:]
    assert geometry.macs(size) == counted_macs(lambda: layer(x[None]))


@settings(max_examples=100, deadline=None)
@given(layers(), st.data())
@even_kernels
def test_canonical_kernel_holds_each_weight_in_its_place(
    case: tuple[nn.Module, torch.Tensor], data: st.DataObject
) -> None:
    layer, _ = case
    geometry, weight = geometry_of(layer), layer.weight.detach()
    groups = geometry.groups
    wide, narrow = geometry.outputs // groups, geometry.inputs // groups
    kernel = to_canonical(weight, geometry)
    assert kernel.shape == (groups, wide, narrow, math.prod(geometry.kernel))
    assert torch.equal(from_canonical(kernel, geometry), weight)
    g, o, i = (data.draw(st.integers(0, most - 1)) for most in (groups, wide, narrow))
    tap = tuple(data.draw(st.integers(0, extent - 1)) for extent in geometry.kernel)
    flat = 0
    for position, extent in zip(tap, geometry.kernel, strict=True):
        flat = flat * extent + position
    ends = (g * narrow + i, o) if geometry.transposed else (g * wide + o, i)
    assert kernel[g, o, i, flat] == weight[(*ends, *tap)]


@even_kernels
@settings(max_examples=200, deadline=None)
@given(layers(), st.sampled_from(sorted(CHAINS)), st.data())
def test_factors_compute_what_the_merged_layer_computes(
    case: tuple[nn.Module, torch.Tensor], scheme: str, data: st.DataObject
) -> None:
    layer, x = case
    geometry, rank = geometry_of(layer), ranks(data.draw, scheme)
    assume(not geometry.depthwise)
    try:
        CHAINS[scheme](geometry, rank)
    except InputError:
        assume(False)
    small = factorized_like(layer, rank, scheme)
    assert small(x).shape == layer(x).shape
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.normal_()
    merged = small.merge()
    assert type(merged) is type(layer)
    assert geometry_of(merged) == geometry
    torch.testing.assert_close(small(x), merged(x), rtol=1e-10, atol=1e-10)
    weights = sum(factor.weight.numel() for factor in small.factors)
    assert chain_params(small.parts) == weights
    single = x if x.ndim == geometry.axes + 1 else x[0]
    size = tuple(single.shape[1:])
    assert chain_macs(small.parts, size) == counted_macs(lambda: small(single[None]))


@even_kernels
@settings(max_examples=60, deadline=None)
@given(layers())
def test_residual_branch_computes_what_the_merged_layer_computes(
    case: tuple[nn.Module, torch.Tensor],
) -> None:
    layer, x = case
    assume(not geometry_of(layer).depthwise)
    small = residual_like(layer, (2,))
    torch.testing.assert_close(small(x), layer(x), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.normal_()
    before = copy.deepcopy(small.state_dict())
    torch.testing.assert_close(small(x), small.merge()(x), rtol=1e-10, atol=1e-10)
    assert all(torch.equal(before[name], value) for name, value in small.state_dict().items())
