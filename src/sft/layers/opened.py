"""From the closed recurrent modules of `torch.nn` to the ones made of linear layers, and back."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sft.core.errors import InputError
from sft.core.kernels import bias_of, weight_of
from sft.layers.factorized import FactorizedSFT
from sft.layers.recurrent import GRUSFT, LSTMSFT, GRUCellSFT, LSTMCellSFT

Opened = LSTMSFT | GRUSFT | LSTMCellSFT | GRUCellSFT

OPENED: dict[type[nn.Module], type[Opened]] = {
    nn.LSTM: LSTMSFT,
    nn.GRU: GRUSFT,
    nn.LSTMCell: LSTMCellSFT,
    nn.GRUCell: GRUCellSFT,
}


def open_recurrent(module: nn.Module) -> Opened:
    """The same recurrence made of linear layers, equal to float accuracy; a copy.

    module : `nn.LSTM` (also with projections), `nn.GRU`, `nn.LSTMCell` or `nn.GRUCell`. Device,
    dtype, training and gradient flags go along; the random state is untouched. Raises `InputError`
    for any other module, and for weights that are computed from others.
    """
    kind = type(module)
    if nn.utils.parametrize.is_parametrized(module):
        raise InputError(
            f"{kind.__name__} computes weights by a parametrisation, which linear layers cannot "
            "carry over. Call torch.nn.utils.parametrize.remove_parametrizations first."
        )
    if kind not in OPENED:
        known = ", ".join(f"nn.{known.__name__}" for known in OPENED)
        raise InputError(f"{kind.__name__} is no recurrent module that can be opened: {known}.")
    given = dict(module.named_parameters(recurse=False))
    opened = OPENED[kind](
        **_arguments(module), device="meta", dtype=next(iter(given.values())).dtype
    )
    slots = list(_slots(opened))
    missing = [slot.weight for slot in slots if slot.weight not in given]
    if missing:
        raise InputError(
            f"{kind.__name__}: {', '.join(missing)} is computed from other parameters (weight norm "
            "or pruning). Remove that first, or keep the module as it is."
        )
    opened.to_empty(device=given[slots[0].weight].device)
    for slot in slots:
        _copy(given[slot.weight], weight_of(slot.map))
        _copy(given.get(slot.bias), bias_of(slot.map))
    return opened.train(module.training)


def close_recurrent(module: Opened) -> nn.Module:
    """The recurrent module of `torch.nn` that computes the same; a copy, factorised maps merged.

    Raises `InputError` if a map is neither linear nor factorised, or if a projection has a bias,
    which `nn.LSTM` cannot hold.
    """
    slots = [(slot, _dense(slot)) for slot in _slots(module)]
    kind = {opened: closed for closed, opened in OPENED.items()}[type(module)]
    arguments = _arguments(module) | {
        "bias": any(bias_of(dense) is not None for slot, dense in slots if slot.bias)
    }
    dropout = arguments.pop("dropout", 0.0)  # the constructor warns of one that a user may have set
    weight = weight_of(slots[0][1])
    closed = kind(**arguments, device="meta", dtype=weight.dtype).to_empty(device=weight.device)
    if isinstance(closed, nn.RNNBase):
        closed.dropout = dropout
    taken = dict(closed.named_parameters())
    for slot, dense in slots:
        bias = bias_of(dense)
        if not slot.bias and bias is not None and bias.any():
            raise InputError(
                f"{type(module).__name__}: the projection of {slot.weight} has a bias, which "
                "nn.LSTM cannot hold. Keep the module open."
            )
        _copy(weight_of(dense), taken[slot.weight])
        _copy(bias, taken.get(slot.bias))
    return closed.train(module.training)


@dataclasses.dataclass(frozen=True)
class _Slot:
    """A map, and the names of its weight and bias in `torch.nn` (no bias: "")."""

    weight: str
    bias: str
    map: nn.Module


def _slots(module: Opened) -> Iterator[_Slot]:
    if isinstance(module, LSTMCellSFT | GRUCellSFT):
        yield _Slot("weight_ih", "bias_ih", module.input_map)
        yield _Slot("weight_hh", "bias_hh", module.hidden_map)
        return
    for index in range(len(module.input_maps)):
        layer, backward = divmod(index, module.directions)
        end = f"l{layer}" + ("_reverse" if backward else "")
        yield _Slot(f"weight_ih_{end}", f"bias_ih_{end}", module.input_maps[index])
        yield _Slot(f"weight_hh_{end}", f"bias_hh_{end}", module.hidden_maps[index])
        if module.proj_size:
            yield _Slot(f"weight_hr_{end}", "", module.projections[index])


def _arguments(module: nn.Module) -> dict[str, Any]:
    """The constructor's arguments, which open and closed modules share."""
    names = ["input_size", "hidden_size", "bias"]
    if isinstance(module, nn.RNNBase | LSTMSFT | GRUSFT):
        names += ["num_layers", "batch_first", "dropout", "bidirectional"]
    if isinstance(module, nn.LSTM | LSTMSFT):
        names.append("proj_size")
    return {name: getattr(module, name) for name in names}


def _dense(slot: _Slot) -> nn.Module:
    """The map as one linear layer."""
    if isinstance(slot.map, FactorizedSFT):
        return slot.map.merge()
    if type(slot.map) is not nn.Linear:
        raise InputError(
            f"The map of {slot.weight} is a {type(slot.map).__name__}; only nn.Linear and "
            "factorised layers can be closed into a module of torch.nn."
        )
    return slot.map


@torch.no_grad()
def _copy(source: Tensor | None, target: Tensor | None) -> None:
    """Values and gradient flag; zero where there is no source."""
    if target is None:
        return
    if source is None:
        target.zero_()
    else:
        target.copy_(source).requires_grad_(source.requires_grad)
