"""Convolutional LSTM and GRU over sequences of images; PyTorch has none.

All gates of a cell are one convolution of the input and one of the hidden state, so whatever splits
a convolution splits the cell, and the gates share the first factor.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sft.core.errors import InputError
from sft.core.geometry import SAME
from sft.layers.factorized import dense_geometry
from sft.layers.gates import gru_step, lstm_step
from sft.layers.recurrent import LSTMState

Kernel = int | tuple[int, int]
CHANNELS = -3


class _ConvCell(nn.Module):
    """What the cells share: `input_conv` and `hidden_conv`, both with "same" padding."""

    gates: ClassVar[int]
    hidden_bias: ClassVar[bool]

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        kernel_size: Kernel,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        wide = self.gates * hidden_channels
        common: dict[str, Any] = {"kernel_size": kernel_size, "padding": SAME}
        for inputs in (in_channels, hidden_channels):
            dense_geometry(nn.Conv2d, in_channels=inputs, out_channels=wide, **common)
        common |= {"device": device, "dtype": dtype}
        self.in_channels, self.hidden_channels = in_channels, hidden_channels
        self.input_conv = nn.Conv2d(in_channels, wide, bias=bias, **common)
        self.hidden_conv = nn.Conv2d(
            hidden_channels, wide, bias=bias and self.hidden_bias, **common
        )

    def zeros(self, x: Tensor) -> Tensor:
        """A hidden state of zeros for inputs of the size of x."""
        return x.new_zeros(*x.shape[:-3], self.hidden_channels, *x.shape[-2:])


class ConvLSTMCell(_ConvCell):
    """One time step of a convolutional LSTM (Shi et al. 2015, without peepholes).

    `input_conv` (``I -> 4H``, with the bias) and `hidden_conv` (``H -> 4H``); the gates in the
    order of `nn.LSTMCell`: input, forget, cell, output. ``(N, I, H, W)`` and a state of two such
    tensors, hidden and cell, to the next state; also without batch axis.
    """

    gates, hidden_bias = 4, False

    def forward(self, x: Tensor, state: LSTMState | None = None) -> LSTMState:
        return self.step(
            self.input_conv(x), (self.zeros(x), self.zeros(x)) if state is None else state
        )

    def step(self, from_input: Tensor, state: LSTMState) -> LSTMState:
        """The next state; from_input : what `input_conv` gave at this time."""
        return lstm_step(from_input + self.hidden_conv(state[0]), state[1], CHANNELS)


class ConvGRUCell(_ConvCell):
    """One time step of a convolutional GRU (after Ballas et al. 2016).

    `input_conv` (``I -> 3H``) and `hidden_conv` (``H -> 3H``), each with a bias; gates and meaning
    are those of `nn.GRUCell`: reset, update, new, and the reset acts after the hidden map.
    ``(N, I, H, W)`` and a hidden state to the next one; also without batch axis.
    """

    gates, hidden_bias = 3, True

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        return self.step(self.input_conv(x), self.zeros(x) if state is None else state)

    def step(self, from_input: Tensor, state: Tensor) -> Tensor:
        """The next hidden state; from_input : what `input_conv` gave at this time."""
        return gru_step(from_input, self.hidden_conv(state), state, CHANNELS)


class ConvLSTM(nn.Module):
    """A `ConvLSTMCell` along a sequence ``(N, T, I, H, W)``.

    Returns the hidden states ``(N, T, hidden, H, W)`` and the last state, a pair. The input's
    convolution is applied once to all time steps.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        kernel_size: Kernel,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.cell = ConvLSTMCell(
            in_channels, hidden_channels, kernel_size, bias, device=device, dtype=dtype
        )

    def forward(self, x: Tensor, state: LSTMState | None = None) -> tuple[Tensor, LSTMState]:
        steps = _over_time(self.cell, x)
        if state is None:
            state = (self.cell.zeros(x[:, 0]), self.cell.zeros(x[:, 0]))
        outputs = []
        for step in steps:
            state = self.cell.step(step, state)
            outputs.append(state[0])
        return torch.stack(outputs, 1), state


class ConvGRU(nn.Module):
    """A `ConvGRUCell` along a sequence ``(N, T, I, H, W)``.

    Returns the hidden states ``(N, T, hidden, H, W)`` and the last one. The input's convolution is
    applied once to all time steps.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        kernel_size: Kernel,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.cell = ConvGRUCell(
            in_channels, hidden_channels, kernel_size, bias, device=device, dtype=dtype
        )

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        steps = _over_time(self.cell, x)
        state = self.cell.zeros(x[:, 0]) if state is None else state
        outputs = []
        for step in steps:
            state = self.cell.step(step, state)
            outputs.append(state)
        return torch.stack(outputs, 1), state


def _over_time(cell: _ConvCell, x: Tensor) -> tuple[Tensor, ...]:
    """The input's convolution at each time; x : ``(N, T, I, H, W)``."""
    if x.ndim != 5 or x.shape[2] != cell.in_channels or x.shape[1] == 0:
        raise InputError(
            f"The sequence must be (N, T, {cell.in_channels}, H, W) with at least one time step, "
            f"not {tuple(x.shape)}."
        )
    mapped: Tensor = cell.input_conv(x.flatten(0, 1))
    return mapped.reshape(*x.shape[:2], *mapped.shape[1:]).unbind(1)
