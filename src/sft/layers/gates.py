"""One time step of the gated recurrences, after the maps of the input and of the hidden state.

The order and the meaning of the gates are those of `torch.nn`. `axis` is that of the gates'
channels: -1 for linear maps, -3 for maps of images.
"""

from torch import Tensor


def lstm_step(gates: Tensor, cell: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """New hidden and cell state of an LSTM (Hochreiter, Schmidhuber 1997).

    gates : both maps added, ``4H`` channels: input, forget, cell, output. cell : ``H`` channels.
    """
    enter, forget, new, leave = gates.chunk(4, axis)
    cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
    return leave.sigmoid() * cell.tanh(), cell


def gru_step(from_input: Tensor, from_hidden: Tensor, hidden: Tensor, axis: int) -> Tensor:
    """New hidden state of a GRU (Cho et al. 2014; the reset gate acts after the hidden map).

    from_input, from_hidden : the two maps with their biases, ``3H`` channels: reset, update, new.
    """
    reset_in, update_in, new_in = from_input.chunk(3, axis)
    reset_hidden, update_hidden, new_hidden = from_hidden.chunk(3, axis)
    reset = (reset_in + reset_hidden).sigmoid()
    update = (update_in + update_hidden).sigmoid()
    new = (new_in + reset * new_hidden).tanh()
    return new + update * (hidden - new)
