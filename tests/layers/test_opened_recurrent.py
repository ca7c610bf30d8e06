"""LSTM and GRU made of linear layers against those of `torch.nn`."""

import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from sft.core.errors import InputError
from sft.layers import (
    GRUSFT,
    LSTMSFT,
    GRUCellSFT,
    LinearSFT,
    LSTMCellSFT,
    close_recurrent,
    factorized_like,
    open_recurrent,
)

FORMS = list(itertools.product([False, True], [False, True], [1, 2], [False, True]))
forms = pytest.mark.parametrize(("backward", "batch_first", "layers", "bias"), FORMS)


def flat(state: Any) -> list[torch.Tensor]:
    return list(state) if isinstance(state, tuple) else [state]


def assert_same(module: nn.Module, other: nn.Module, *arguments: Any) -> Any:
    outputs, state = module(*arguments)
    got, got_state = other(*arguments)
    for wanted, given in zip([outputs, *flat(state)], [got, *flat(got_state)], strict=True):
        torch.testing.assert_close(given, wanted, rtol=1e-12, atol=1e-12)
    return state


@forms
@pytest.mark.parametrize("projected", [None, False, True])
def test_opened_is_equal_to_closed(
    projected: bool | None, backward: bool, batch_first: bool, layers: int, bias: bool
) -> None:
    torch.manual_seed(0)
    more = {"proj_size": 2} if projected else {}
    kind = nn.GRU if projected is None else nn.LSTM
    closed = kind(3, 5, layers, bias, batch_first, 0.0, backward, dtype=torch.float64, **more)
    opened = open_recurrent(closed)
    assert isinstance(opened, GRUSFT if projected is None else LSTMSFT)
    assert len(opened.input_maps) == len(opened.hidden_maps) == layers * (1 + backward)
    for shape in ((4, 2, 3), (4, 3)):  # with and without samples
        x = torch.randn(shape, dtype=torch.float64)
        state = assert_same(closed, opened, x)
        assert_same(closed, opened, x, state)
    back = close_recurrent(opened)
    assert repr(back) == repr(closed)
    assert all(torch.equal(value, back.state_dict()[k]) for k, value in closed.state_dict().items())
    assert torch.equal(back(x)[0], closed(x)[0])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(2, 3), (3,)])
def test_cells_are_equal(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    for kind, wanted in ((nn.LSTMCell, LSTMCellSFT), (nn.GRUCell, GRUCellSFT)):
        closed = kind(3, 5, bias, dtype=torch.float64)
        opened = open_recurrent(closed)
        assert isinstance(opened, wanted)
        state = closed(x)
        again, mine = closed(x, state), opened(x, opened(x))
        for one, other in zip(flat(again), flat(mine), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)
        back = close_recurrent(opened)
        assert repr(back) == repr(closed)
        assert all(torch.equal(v, back.state_dict()[k]) for k, v in closed.state_dict().items())


def test_flags_go_along_and_the_random_state_is_left() -> None:
    closed = nn.LSTM(3, 4, 2, dropout=0.5, dtype=torch.bfloat16).eval()
    closed.weight_hh_l1.requires_grad_(False)
    before = torch.get_rng_state()
    opened = open_recurrent(closed)
    back = close_recurrent(opened)
    assert torch.equal(before, torch.get_rng_state())
    assert opened.dropout == back.dropout == 0.5
    assert not opened.training
    assert not back.training
    assert [m.weight.requires_grad for m in opened.hidden_maps] == [True, False]
    assert not back.weight_hh_l1.requires_grad
    assert opened.input_maps[0].weight.dtype == torch.bfloat16
    assert opened.input_maps[0].weight.data_ptr() != closed.weight_ih_l0.data_ptr()


def test_dropout_acts_between_layers_while_training() -> None:
    torch.manual_seed(0)
    opened = open_recurrent(nn.GRU(3, 4, 2, dropout=0.5))
    x = torch.randn(6, 2, 3)
    assert not torch.equal(opened(x)[0], opened(x)[0])
    opened.eval()
    assert torch.equal(opened(x)[0], opened(x)[0])


def test_the_input_map_is_applied_once_to_all_steps() -> None:
    opened = LSTMSFT(3, 4)
    shapes: list[tuple[int, ...]] = []
    opened.input_maps[0].register_forward_hook(lambda *args: shapes.append(tuple(args[2].shape)))
    opened(torch.zeros(5, 2, 3))
    assert shapes == [(5, 2, 16)]


def test_default_initialisation_is_that_of_torch() -> None:
    torch.manual_seed(0)
    for module in (GRUSFT(3, 16, 2), LSTMCellSFT(3, 16)):
        largest = max(float(p.detach().abs().max()) for p in module.parameters())
        assert 0.95 * 0.25 < largest <= 0.25


def test_split_maps_close_into_their_product() -> None:
    torch.manual_seed(0)
    closed = nn.LSTM(3, 4, bidirectional=True)
    opened = open_recurrent(closed)
    split = factorized_like(opened.hidden_maps[1], (2,), "channel_in")
    assert isinstance(split, LinearSFT)
    nn.init.normal_(split.first.weight)
    nn.init.normal_(split.second.weight)
    opened.hidden_maps[1] = split
    back = close_recurrent(opened)
    assert not torch.equal(back.weight_hh_l0_reverse, closed.weight_hh_l0_reverse)
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(back(x), opened(x))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_opened_modules_export_and_compile(kind: type[nn.LSTM]) -> None:
    opened, x = (
        open_recurrent(kind(3, 4, batch_first=True, bidirectional=True)),
        torch.randn(2, 4, 3),
    )
    wanted = opened(x)
    torch.testing.assert_close(torch.export.export(opened, (x,)).module()(x), wanted)
    compiled = torch.compile(opened, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), wanted)


def test_opening_refuses_what_it_cannot_carry() -> None:
    with pytest.raises(InputError, match="RNN is no recurrent module that can be opened"):
        open_recurrent(nn.RNN(3, 4))
    module = nn.GRU(3, 4)
    nn.utils.parametrize.register_parametrization(module, "weight_hh_l0", nn.Identity())
    with pytest.raises(InputError, match="remove_parametrizations"):
        open_recurrent(module)
    pruned = nn.GRU(3, 4)
    prune.identity(pruned, "weight_hh_l0")
    with pytest.raises(InputError, match="weight_hh_l0"):
        open_recurrent(pruned)


def test_closing_refuses_other_maps_and_a_projection_s_bias() -> None:
    opened = open_recurrent(nn.LSTM(3, 4, proj_size=2))
    opened.projections[0] = nn.Linear(4, 2)
    with pytest.raises(InputError, match="weight_hr_l0"):
        close_recurrent(opened)
    opened.input_maps[0] = nn.Identity()
    with pytest.raises(InputError, match="Identity"):
        close_recurrent(opened)


@pytest.mark.parametrize(
    ("x", "state", "word"),
    [
        (torch.zeros(4, 2, 5), None, r"\(4, 2, 5\)"),
        (torch.zeros(1, 4, 2, 3), None, r"takes \(T, N, I\)"),
        (torch.zeros(0, 2, 3), None, "no time steps"),
        (torch.zeros(4, 2, 3), torch.zeros(1, 3, 4), "1 x 2 x 4"),
        (nn.utils.rnn.pack_sequence([torch.zeros(4, 3)]), None, "PackedSequence"),
    ],
)
def test_forward_refuses_by_name(x: Any, state: Any, word: str) -> None:
    with pytest.raises(InputError, match=word):
        GRUSFT(3, 4)(x, state)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"hidden_size": 0}, "hidden_size=0"),
        ({"proj_size": 4}, "proj_size=4"),
        ({"dropout": 2.0}, "dropout=2.0"),
    ],
)
def test_constructor_refuses_by_name(arguments: dict[str, Any], word: str) -> None:
    with pytest.raises(InputError, match=word):
        LSTMSFT(**{"input_size": 3, "hidden_size": 4, **arguments})
    with pytest.raises(InputError, match="input_size=0"):
        GRUCellSFT(0, 4)
