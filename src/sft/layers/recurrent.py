"""LSTM and GRU made of linear layers, so that whatever splits a linear layer splits them too.

All gates of a cell are one weight: ``4H`` outputs (input, forget, cell, output) of an LSTM, ``3H``
(reset, update, new) of a GRU, as in `torch.nn`. `sft.layers.opened` turns the recurrent modules of
`torch.nn` into these and back.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from sft.core.errors import InputError
from sft.layers.gates import gru_step, lstm_step

LSTMState = tuple[Tensor, Tensor]


class _RecurrentSFT(nn.Module):
    """What LSTM and GRU share: maps for each layer and direction, and the walk along the time.

    `input_maps` and `hidden_maps` hold an `nn.Linear` for each layer and direction, in the order
    of `torch.nn` (layer 0 forward, layer 0 backward, layer 1 ...).
    """

    gates: ClassVar[int]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout = bias, batch_first, float(dropout)
        self.bidirectional, self.proj_size = bidirectional, proj_size
        self._check_arguments()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        wide, width = self.gates * hidden_size, self.state_sizes[0]
        self.input_maps, self.hidden_maps = nn.ModuleList(), nn.ModuleList()
        for index in range(num_layers * self.directions):
            inputs = input_size if index < self.directions else width * self.directions
            self.input_maps.append(nn.Linear(inputs, wide, bias, **made))
            self.hidden_maps.append(nn.Linear(width, wide, bias, **made))
        self.projections = nn.ModuleList(
            nn.Linear(hidden_size, proj_size, False, **made) for _ in self.input_maps if proj_size
        )
        self.reset_parameters()

    @property
    def directions(self) -> int:
        """2 for a bidirectional module, else 1."""
        return 2 if self.bidirectional else 1

    @property
    def state_sizes(self) -> tuple[int, ...]:
        """Channels of each part of the state; the first is the hidden state."""
        raise NotImplementedError

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew, within ``1 / sqrt(H)`` as `torch.nn` does."""
        bound = self.hidden_size**-0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def _step(self, index: int, gates: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The next state of one layer and direction; gates : the input's map at this time."""
        raise NotImplementedError

    def _walk(
        self, x: Tensor, state: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Outputs and last state of all layers, in the form of `torch.nn`."""
        self._check_input(x)
        batched, batch_first = x.ndim == 3, self.batch_first
        if not batched:
            x = x.unsqueeze(1)
        elif batch_first:
            x = x.transpose(0, 1)
        if state is not None and not batched:
            state = tuple(part.unsqueeze(1) for part in state)
        state = self._first_state(x, state)
        last: list[tuple[Tensor, ...]] = []
        for layer in range(self.num_layers):
            if layer > 0 and self.dropout:
                x = functional.dropout(x, self.dropout, self.training)
            sides = []
            for index in range(layer * self.directions, (layer + 1) * self.directions):
                side, end = self._walk_one(index, x, tuple(part[index] for part in state))
                sides.append(side)
                last.append(end)
            x = torch.cat(sides, -1) if self.bidirectional else sides[0]
        ends = tuple(torch.stack(parts) for parts in zip(*last, strict=True))
        if not batched:
            return x.squeeze(1), tuple(part.squeeze(1) for part in ends)
        return (x.transpose(0, 1) if batch_first else x), ends

    def _walk_one(
        self, index: int, x: Tensor, state: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Outputs ``(T, N, H)`` of one layer in one direction, and its last state."""
        backward = self.bidirectional and index % 2 == 1
        outputs = []
        gates = self.input_maps[index](x).unbind(0)
        for step in reversed(gates) if backward else gates:
            state = self._step(index, step, state)
            outputs.append(state[0])
        return torch.stack(outputs[::-1] if backward else outputs), state

    def _first_state(self, x: Tensor, state: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        """The given state, or zeros; x : ``(T, N, I)``."""
        count, batch = len(self.input_maps), x.shape[1]
        if state is None:
            return tuple(x.new_zeros(count, batch, size) for size in self.state_sizes)
        for part, size in zip(state, self.state_sizes, strict=True):
            if part.shape != (count, batch, size):
                raise InputError(
                    f"{type(self).__name__} ({self.extra_repr()}) needs a first state of "
                    f"{count} x {batch} x {size} (layers and directions, samples, channels), not "
                    f"{'x'.join(map(str, part.shape))}."
                )
        return state

    def _check_input(self, x: Tensor) -> None:
        name = type(self).__name__
        if isinstance(x, PackedSequence):
            raise InputError(
                f"{name} takes no PackedSequence: its time steps are the same for all samples. "
                "Give a padded tensor, or run samples of one length together."
            )
        if x.ndim not in (2, 3) or x.shape[-1] != self.input_size:
            order = "(N, T, I)" if self.batch_first else "(T, N, I)"
            raise InputError(
                f"{name} ({self.extra_repr()}) takes {order} or (T, I), not {tuple(x.shape)}."
            )
        if x.shape[1 if self.batch_first and x.ndim == 3 else 0] == 0:
            raise InputError(f"{name}: the sequence {tuple(x.shape)} has no time steps.")

    def _check_arguments(self) -> None:
        name, sizes = type(self).__name__, (self.input_size, self.hidden_size, self.num_layers)
        if min(sizes) < 1:
            raise InputError(
                f"{name}(input_size={sizes[0]}, hidden_size={sizes[1]}, num_layers={sizes[2]}): "
                "each must be at least 1."
            )
        if not 0 <= self.proj_size < self.hidden_size:
            raise InputError(
                f"{name}: proj_size={self.proj_size} must be 0 (no projection) or below "
                f"hidden_size={self.hidden_size}."
            )
        if not 0 <= self.dropout <= 1:
            raise InputError(f"{name}: dropout={self.dropout} is no probability.")

    def extra_repr(self) -> str:
        shown = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0}
        shown |= {"bidirectional": False, "proj_size": 0}
        parts = [f"{self.input_size}, {self.hidden_size}"]
        parts += [
            f"{k}={getattr(self, k)}" for k, usual in shown.items() if getattr(self, k) != usual
        ]
        return ", ".join(parts)


class LSTMSFT(_RecurrentSFT):
    """`nn.LSTM` made of linear layers; the same arguments, inputs, outputs and states.

    ``(T, N, I)``, ``(N, T, I)`` with `batch_first`, or ``(T, I)``. Each of `input_maps` is applied
    once to all time steps, each of `hidden_maps` at every step; with `proj_size`, `projections`
    map each hidden state. `PackedSequence` is refused.
    """

    gates = 4

    @property
    def state_sizes(self) -> tuple[int, ...]:
        return (self.proj_size or self.hidden_size, self.hidden_size)

    def forward(self, input: Tensor, hx: LSTMState | None = None) -> tuple[Tensor, LSTMState]:
        outputs, (hidden, cell) = self._walk(input, hx)
        return outputs, (hidden, cell)

    def _step(self, index: int, gates: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, cell = lstm_step(gates + self.hidden_maps[index](state[0]), state[1], -1)
        return (self.projections[index](hidden) if self.proj_size else hidden), cell


class GRUSFT(_RecurrentSFT):
    """`nn.GRU` made of linear layers; the same arguments, inputs, outputs and states.

    ``(T, N, I)``, ``(N, T, I)`` with `batch_first`, or ``(T, I)``. Each of `input_maps` is applied
    once to all time steps, each of `hidden_maps` at every step. `PackedSequence` is refused.
    """

    gates = 3

    @property
    def state_sizes(self) -> tuple[int, ...]:
        return (self.hidden_size,)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        outputs, (hidden,) = self._walk(input, None if hx is None else (hx,))
        return outputs, hidden

    def _step(self, index: int, gates: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (gru_step(gates, self.hidden_maps[index](state[0]), state[0], -1),)


class _CellSFT(nn.Module):
    """What the cells share: `input_map` and `hidden_map`, an `nn.Linear` each."""

    gates: ClassVar[int]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(input_size, hidden_size) < 1:
            raise InputError(
                f"{type(self).__name__}(input_size={input_size}, hidden_size={hidden_size}): each "
                "must be at least 1."
            )
        self.input_size, self.hidden_size, self.bias = input_size, hidden_size, bias
        wide = self.gates * hidden_size
        self.input_map = nn.Linear(input_size, wide, bias, device=device, dtype=dtype)
        self.hidden_map = nn.Linear(hidden_size, wide, bias, device=device, dtype=dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew, within ``1 / sqrt(H)`` as `torch.nn` does."""
        bound = self.hidden_size**-0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def _zeros(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.hidden_size)

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}"


class LSTMCellSFT(_CellSFT):
    """`nn.LSTMCell` made of linear layers: ``(N, I)`` or ``(I)``, and a state of two parts."""

    gates = 4

    def forward(self, input: Tensor, hx: LSTMState | None = None) -> LSTMState:
        hidden, cell = (self._zeros(input), self._zeros(input)) if hx is None else hx
        return lstm_step(self.input_map(input) + self.hidden_map(hidden), cell, -1)


class GRUCellSFT(_CellSFT):
    """`nn.GRUCell` made of linear layers: ``(N, I)`` or ``(I)``, and a hidden state."""

    gates = 3

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        hidden = self._zeros(input) if hx is None else hx
        return gru_step(self.input_map(input), self.hidden_map(hidden), hidden, -1)
