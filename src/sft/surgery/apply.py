"""A plan and a model in, a factorised model out."""

import torch
from torch import nn

from sft.core.errors import InputError
from sft.core.records import DENSE, KEEP, Plan
from sft.decompositions import decompositions, factorize
from sft.surgery.modules import fold_batch_norm, get_module, replace_module


def apply(model: nn.Module, plan: Plan) -> nn.Module:
    """Split the layers that the plan splits; weights stay float here.

    Batch norm is folded first. Returns a new model in eval mode; `model` is untouched. Every row
    is checked before anything is built; an `InputError` names the layer and its shape.
    """
    _check_rows(model, plan)
    example = torch.zeros(1, *plan.input_shape, device=_device(model))
    small = fold_batch_norm(model, example)
    for row in plan.rows:
        option = row.option
        if option.scheme in (KEEP, DENSE):
            continue
        layer = get_module(small, row.name)
        statistics = (plan.statistics or {}).get(row.name)
        replace_module(small, row.name, factorize(layer, option.scheme, option.rank[0], statistics))
    return small


def _check_rows(model: nn.Module, plan: Plan) -> None:
    if not plan.input_shape:
        raise InputError("The plan does not say the model's input shape. Make it with `plan`.")
    for row in plan.rows:
        layer, option = get_module(model, row.name), row.option
        if option.scheme in (KEEP, DENSE):
            continue
        shape = tuple(getattr(getattr(layer, "weight", None), "shape", ()))
        method = decompositions[option.scheme]
        reason = method.unsupported(layer)
        if reason is not None:
            raise InputError(
                f"Layer '{row.name}' with weight {shape} cannot be '{option.scheme}': {reason}. "
                f'Set its scheme to "dense" or "keep".'
            )
        full = method.full_rank(shape)
        if len(option.rank) != 1 or option.rank[0] > full:
            raise InputError(
                f"Layer '{row.name}' with weight {shape}: '{option.scheme}' takes one rank from 1 "
                f"to {full}, the plan says {list(option.rank)}."
            )


def _device(model: nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    return first.device if first is not None else torch.device("cpu")
