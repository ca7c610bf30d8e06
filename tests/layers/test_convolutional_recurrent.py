"""Convolutional cells: with one tap those of `torch.nn`, and in general the formulas."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from sft.core.errors import InputError
from sft.layers import ConvGRU, ConvGRUCell, ConvLSTM, ConvLSTMCell, factorized_like

SEQUENCES = pytest.mark.parametrize("kind", [ConvLSTM, ConvGRU])


def flat(state: Any) -> list[torch.Tensor]:
    return list(state) if isinstance(state, tuple) else [state]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("kind", "reference"), [(ConvLSTMCell, nn.LSTMCell), (ConvGRUCell, nn.GRUCell)]
)
def test_one_tap_cells_are_those_of_torch(kind: Any, reference: Any, bias: bool) -> None:
    torch.manual_seed(0)
    cell, wanted = kind(3, 4, 1, bias, dtype=torch.float64), reference(3, 4, bias).double()
    with torch.no_grad():
        wanted.weight_ih.copy_(cell.input_conv.weight[..., 0, 0])
        wanted.weight_hh.copy_(cell.hidden_conv.weight[..., 0, 0])
        if bias:
            wanted.bias_ih.copy_(cell.input_conv.bias)
            hidden_bias = cell.hidden_conv.bias
            wanted.bias_hh.copy_(torch.zeros(16) if hidden_bias is None else hidden_bias)
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    rows = x.permute(0, 2, 3, 1).reshape(-1, 3)
    got, state = cell(x, cell(x)), wanted(rows, wanted(rows))
    for one, other in zip(flat(got), flat(state), strict=True):
        torch.testing.assert_close(one.permute(0, 2, 3, 1).reshape(-1, 4), other)
    for one, other in zip(flat(cell(x[0])), flat(cell(x)), strict=True):
        torch.testing.assert_close(one, other[0])


def test_lstm_cell_is_the_formula() -> None:
    torch.manual_seed(0)
    cell, x = ConvLSTMCell(2, 3, (3, 5)), torch.randn(1, 2, 6, 7)
    hidden, memory = torch.randn(1, 3, 6, 7), torch.randn(1, 3, 6, 7)
    assert cell.hidden_conv.bias is None
    gates = functional.conv2d(x, cell.input_conv.weight, cell.input_conv.bias, padding=(1, 2))
    gates = gates + functional.conv2d(hidden, cell.hidden_conv.weight, padding=(1, 2))
    i, f, g, o = (gates[:, 3 * k : 3 * k + 3] for k in range(4))
    new = torch.sigmoid(f) * memory + torch.sigmoid(i) * torch.tanh(g)
    got = cell(x, (hidden, memory))
    torch.testing.assert_close(got, (torch.sigmoid(o) * torch.tanh(new), new))


def test_gru_cell_is_the_formula() -> None:
    torch.manual_seed(0)
    cell, x, hidden = ConvGRUCell(2, 3, 3), torch.randn(1, 2, 6, 7), torch.randn(1, 3, 6, 7)
    a = functional.conv2d(x, cell.input_conv.weight, cell.input_conv.bias, padding=1)
    b = functional.conv2d(hidden, cell.hidden_conv.weight, cell.hidden_conv.bias, padding=1)
    r, z = torch.sigmoid(a[:, :3] + b[:, :3]), torch.sigmoid(a[:, 3:6] + b[:, 3:6])
    n = torch.tanh(a[:, 6:] + r * b[:, 6:])
    torch.testing.assert_close(cell(x, hidden), (1 - z) * n + z * hidden)


@SEQUENCES
def test_sequence_is_the_cell_step_by_step(kind: Any) -> None:
    torch.manual_seed(0)
    module, x = kind(2, 3, 3), torch.randn(2, 4, 2, 5, 6)
    outputs, state = module(x)
    assert outputs.shape == (2, 4, 3, 5, 6)
    step = None
    for t in range(4):
        step = module.cell(x[:, t], step)
        torch.testing.assert_close(outputs[:, t], flat(step)[0])
    torch.testing.assert_close(state, step)
    more, end = module(x, state)
    torch.testing.assert_close(more[:, 0], flat(module.cell(x[:, 0], state))[0])
    torch.testing.assert_close(flat(end)[0], more[:, -1])


@SEQUENCES
def test_sequence_exports_compiles_and_takes_split_convolutions(kind: Any) -> None:
    torch.manual_seed(0)
    module, x = kind(2, 3, 3), torch.randn(2, 3, 2, 4, 4)
    assert torch.compile(module, fullgraph=True, backend="aot_eager")(x)[0].shape == (2, 3, 3, 4, 4)
    split = factorized_like(module.cell.hidden_conv, (2,), "spatial")
    nn.init.normal_(split.first.weight)
    nn.init.normal_(split.second.weight)
    module.cell.hidden_conv = split
    split_outputs = module(x)
    program = torch.export.export(module, (x,))
    torch.testing.assert_close(program.module()(x), split_outputs)
    module.cell.hidden_conv = split.merge()
    torch.testing.assert_close(module(x), split_outputs)


@SEQUENCES
def test_refusals_name_what_is_wrong(kind: Any) -> None:
    with pytest.raises(InputError, match="in_channels must be at least 1"):
        kind(0, 3, 3)
    with pytest.raises(InputError, match="out_channels must be at least 1"):
        kind(2, 0, 3)
    module = kind(2, 3, 3)
    for shape in ((2, 2, 4, 4), (2, 3, 1, 4, 4), (2, 0, 2, 4, 4)):
        with pytest.raises(InputError, match="must be"):
            module(torch.zeros(shape))
