"""The layer that computes some outputs and mixes the others, against its own parts by hand."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sft.core.errors import InputError
from sft.core.geometry import Geometry
from sft.layers import InterpolativeSFT, geometry_of, interpolative_like

KINDS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(5, 6),
    "conv1d": lambda: nn.Conv1d(4, 6, 3, 2, padding=1),
    "conv2d": lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 2), (1, 2), padding_mode="circular"),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False),
    "conv3d": lambda: nn.Conv3d(2, 6, 2, padding="valid"),
    "transpose1d": lambda: nn.ConvTranspose1d(4, 6, 3, 2, output_padding=1),
    "transpose2d": lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2, dilation=2),
    "transpose3d": lambda: nn.ConvTranspose3d(3, 6, 2, bias=False),
}
SIZES = {0: (), 1: (9,), 2: (7, 8), 3: (5, 4, 5)}
GEOMETRY = Geometry(4, 6, (3, 3), (1, 1), (1, 1), (1, 1), 2)
each_kind = pytest.mark.parametrize("kind", KINDS)


def random_layer(kind: str, rank: int = 2, seed: int = 0) -> tuple[InterpolativeSFT, Tensor]:
    """A float64 layer whose chosen outputs are not the first ones, and an input."""
    torch.manual_seed(seed)
    geometry = geometry_of(KINDS[kind]())
    layer = InterpolativeSFT(geometry, rank, dtype=torch.float64)
    layer.select(chosen_of(geometry, rank))
    x = torch.randn(3, geometry.inputs, *SIZES[geometry.axes], dtype=torch.float64)
    return layer, x


def chosen_of(geometry: Geometry, rank: int) -> Tensor:
    outputs = geometry.outputs // geometry.groups
    return torch.stack([torch.randperm(outputs)[:rank] for _ in range(geometry.groups)])


def by_hand(layer: InterpolativeSFT, chosen: Tensor, x: Tensor) -> Tensor:
    """Each output put in its own place, group by group."""
    groups, rank = chosen.shape
    outputs = layer.geometry.outputs // groups
    axis = -1 if layer.geometry.axes == 0 else 1
    own = layer.first(x)
    rest = layer.second(own)
    result = own.new_full([*own.shape], torch.nan).repeat_interleave(2, axis)
    result = result.narrow(axis, 0, 1).repeat_interleave(layer.geometry.outputs, axis).clone()
    for group in range(groups):
        others = [o for o in range(outputs) if o not in chosen[group].tolist()]
        for place, output in enumerate(chosen[group].tolist()):
            part = own.select(axis, group * rank + place)
            result.select(axis, group * outputs + output).copy_(part)
        for place, output in enumerate(others):
            part = rest.select(axis, group * (outputs - rank) + place)
            result.select(axis, group * outputs + output).copy_(part)
    return result


@each_kind
def test_outputs_stand_where_they_were_chosen(kind: str) -> None:
    layer, x = random_layer(kind)
    chosen = chosen_of(layer.geometry, 2)
    layer.select(chosen)
    torch.testing.assert_close(layer(x), by_hand(layer, chosen, x), rtol=0, atol=0)


@each_kind
@pytest.mark.parametrize("full", [False, True])
def test_merge_computes_the_same_and_keeps_the_flags(kind: str, full: bool) -> None:
    outputs, groups = 6, geometry_of(KINDS[kind]()).groups
    layer, x = random_layer(kind, outputs // groups if full else 2)
    layer.eval()
    merged = layer.merge()
    assert type(merged) is type(KINDS[kind]())
    assert not merged.training
    assert merged.weight.requires_grad
    assert merged.bias.requires_grad
    torch.testing.assert_close(merged(x), layer(x), rtol=1e-12, atol=1e-12)
    layer.requires_grad_(False)
    assert not any(p.requires_grad for p in layer.merge().parameters())


@each_kind
def test_bias_is_what_an_input_of_zeros_gives(kind: str) -> None:
    layer, x = random_layer(kind)
    zero = layer(torch.zeros_like(x))
    axis = -1 if layer.geometry.axes == 0 else 1
    wanted = zero.movedim(axis, 0).flatten(1)
    torch.testing.assert_close(layer.bias, wanted[:, 0])
    assert layer.bias.requires_grad


def test_a_layer_without_bias() -> None:
    for rank in (2, 3):
        layer = InterpolativeSFT(GEOMETRY, rank, bias=False)
        assert layer.bias is None
        assert not layer(torch.zeros(1, 4, 5, 5)).any()
        assert layer.merge().bias is None


@each_kind
def test_kernels_and_the_whole_bias_are_loaded(kind: str) -> None:
    layer, x = random_layer(kind)
    dense, kernels = layer.merge(), layer._kernels()
    other = InterpolativeSFT(layer.geometry, 2, dtype=torch.float64)
    other.order.copy_(layer.order)
    other.load_factors(kernels, dense.bias)
    torch.testing.assert_close(other(x), layer(x))
    other.load_factors(kernels)
    assert float(other.bias.detach().abs().max()) < 1e-14


@each_kind
@pytest.mark.parametrize("full", [False, True])
def test_any_independent_mixing_can_be_loaded(kind: str, full: bool) -> None:
    groups = geometry_of(KINDS[kind]()).groups
    rank = 6 // groups if full else 2
    layer, x = random_layer(kind, rank)
    before = layer.first(x)
    mixing = torch.randn(groups, 6 // groups, rank, dtype=torch.float64)
    bias = torch.randn(6, dtype=torch.float64)
    axis = -1 if layer.geometry.axes == 0 else 1
    z = before.movedim(axis, -1).unflatten(-1, (groups, rank))
    wanted = (torch.einsum("gor,...gr->...go", mixing, z).flatten(-2) + bias).movedim(-1, axis)
    layer.load_mixing(mixing, bias)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(layer.merge()(x), wanted, rtol=1e-9, atol=1e-9)


@each_kind
def test_mixing_is_that_of_the_layer(kind: str) -> None:
    layer, x = random_layer(kind)
    groups, axis = layer.geometry.groups, -1 if layer.geometry.axes == 0 else 1
    mixing = layer.mixing()
    assert mixing.shape == (groups, 6 // groups, 2)
    own = layer.first.bias.detach().view(groups, 2, 1)
    bias = layer.bias.detach() - (mixing @ own).flatten()
    z = layer.first(x).movedim(axis, -1).unflatten(-1, (groups, 2))
    made = torch.einsum("gor,...gr->...go", mixing, z).flatten(-2) + bias
    torch.testing.assert_close(made.movedim(-1, axis), layer(x))
    wanted = layer(x)
    layer.load_mixing(mixing, bias)
    torch.testing.assert_close(layer(x), wanted)


def test_a_mixing_with_dependent_rows_is_refused_and_nothing_is_changed() -> None:
    layer, _ = random_layer("conv2d")
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(InputError, match="no longer independent"):
        layer.load_mixing(torch.ones(1, 6, 2, dtype=torch.float64), torch.zeros(6))
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_the_state_goes_into_a_new_layer() -> None:
    layer, x = random_layer("grouped")
    state = layer.state_dict()
    assert sorted(state) == ["first.bias", "first.weight", "order", "second.bias", "second.weight"]
    other = InterpolativeSFT(layer.geometry, 2, dtype=torch.float64)
    other.load_state_dict(state)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@each_kind
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_it_is_exported(kind: str) -> None:
    layer, x = random_layer(kind)
    program = torch.export.export(layer.eval(), (x,))
    torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.parametrize("kind", ["linear", "grouped"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_it_is_compiled_in_one_graph(kind: str) -> None:
    layer, x = random_layer(kind)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_and_place_are_kept(dtype: torch.dtype) -> None:
    layer = InterpolativeSFT(GEOMETRY, 2, dtype=dtype)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert layer.order.dtype == torch.long
    merged = layer.merge()
    assert {merged.weight.dtype, merged.bias.dtype, layer.bias.dtype} == {dtype}
    x = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(
        layer.float()(x), merged.float()(x), rtol=0, atol=8 * torch.finfo(dtype).eps
    )
    assert all(
        t.is_meta for t in InterpolativeSFT(GEOMETRY, 2, device="meta").state_dict().values()
    )
    with torch.device("meta"):
        assert InterpolativeSFT(GEOMETRY, 2).order.is_meta


def test_inputs_without_batch_and_with_further_axes() -> None:
    conv, x = random_layer("conv2d")
    torch.testing.assert_close(conv(x[0]), conv(x)[0])
    linear = InterpolativeSFT(Geometry(5, 6), 2)
    x = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(linear(x), linear(x.view(-1, 5)).view(2, 3, 4, 6))


@pytest.mark.parametrize("rank", [0, 4, -1, (1, 2), ()])
def test_a_rank_that_does_not_fit_is_refused(rank: int | tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="takes one rank, 1 to 3"):
        InterpolativeSFT(GEOMETRY, rank)
    with pytest.raises(InputError, match="quantised"):
        InterpolativeSFT(Geometry(4, 4, (3,), (1,), (0,), (1,), 4), 1)


@pytest.mark.parametrize(
    "chosen", [[[0, 1]], [[0, 0], [0, 1]], [[0, 3], [0, 1]], [[-1, 0], [0, 1]]]
)
def test_outputs_that_cannot_be_chosen_are_refused(chosen: list[list[int]]) -> None:
    layer = InterpolativeSFT(GEOMETRY, 2)
    before = layer.order.clone()
    with pytest.raises(InputError, match="2 different outputs of the 3 of each of 2 groups"):
        layer.select(torch.tensor(chosen))
    assert torch.equal(layer.order, before)


def test_kernels_of_another_shape_are_refused_and_nothing_is_changed() -> None:
    layer = InterpolativeSFT(GEOMETRY, 2)
    before = copy.deepcopy(layer.state_dict())
    first, second = torch.randn(2, 2, 2, 9), torch.randn(2, 1, 2, 1)
    for kernels, bias in [
        ([first], None),
        ([first.view(2, 2, 9, 2), second], None),
        ([first, second], torch.zeros(5)),
    ]:
        with pytest.raises(InputError, match=r"holds kernels|has a bias"):
            layer.load_factors(kernels, bias)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


@each_kind
def test_the_stand_in_carries_everything_over(kind: str) -> None:
    dense = KINDS[kind]().to(torch.bfloat16).eval().requires_grad_(False)
    before = torch.get_rng_state()
    layer = interpolative_like(dense, (2,))
    assert torch.equal(before, torch.get_rng_state())
    assert layer.geometry == geometry_of(dense)
    assert layer.rank == (2,)
    assert not any(module.training for module in layer.modules())
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in layer.parameters())
    wanted = torch.zeros(6).bfloat16() if dense.bias is None else dense.bias
    assert torch.equal(layer.bias, wanted)
    meta = interpolative_like(dense.to("meta"), (2,))
    assert all(p.is_meta for p in meta.state_dict().values())


def test_a_new_layer_is_drawn_as_torch_draws() -> None:
    torch.manual_seed(0)
    layer = InterpolativeSFT(Geometry(32, 64, (3,), (1,), (0,), (1,)), 16)
    for factor, fan_in in ((layer.first, 96), (layer.second, 16)):
        bound = fan_in**-0.5
        for tensor in (factor.weight, factor.bias):
            assert 0.8 * bound < float(tensor.detach().abs().max()) <= bound
